"""The optimizer of ``--bf16`` with all parameters as one: the same training, and either state read into the other."""

import pytest
import torch
from fairseq import optim
from fairseq.dataclass.configs import FairseqConfig
from fairseq.optim.adam import FairseqAdamConfig
from omegaconf import OmegaConf

from kd_ext.upstream import flat_bf16

ADAFACTOR = {
    **{"adafactor_eps": "(1e-30, 1e-3)", "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None, "weight_decay": 0.0},
    **{"scale_parameter": False, "relative_step": False, "warmup_init": False, "lr": [0.01]},
}
SHAPES = [(3, 4), (5,), (2, 2, 2)]


@pytest.fixture
def on_gpu(monkeypatch):
    """A CPU that says that it is a GPU."""
    monkeypatch.setattr(flat_bf16, "_is_on_gpu", lambda parameter: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)


def config(**common):
    cfg = OmegaConf.structured(FairseqConfig())
    cfg.common.bf16, cfg.optimization.update_freq, cfg.optimization.lr = True, [1], [0.01]
    cfg.distributed_training.distributed_world_size = 1
    cfg.optimizer = OmegaConf.structured(FairseqAdamConfig(_name="adam", lr=[0.01], weight_decay=0.01))
    for name, value in common.items():
        setattr(cfg.common, name, value)
    return cfg


def build(*, flat, like=None):
    generator = torch.Generator().manual_seed(0)
    values = like or [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
    params = [torch.nn.Parameter(value.detach().clone()) for value in values]
    return params, optim.FP16Optimizer.build_optimizer(config(fp16_no_flatten_grads=not flat), params)


def train(params, optimizer, updates):
    """Some updates; the gradients of each are the same for every optimizer."""
    for update in updates:
        generator = torch.Generator().manual_seed(1 + update)
        optimizer.zero_grad()
        optimizer.backward(sum((p * torch.randn(p.shape, generator=generator).bfloat16()).sum() for p in params))
        optimizer.multiply_grads(0.25)
        optimizer.clip_grad_norm(0.5)
        optimizer.step()
    return torch.cat([p.detach().float().reshape(-1) for p in params])


@pytest.mark.usefixtures("on_gpu")
def test_training_is_the_same():
    flat, plain = build(flat=True), build(flat=False)
    assert flat[1].has_flat_params
    assert not plain[1].has_flat_params
    begin = torch.cat([p.detach().float().reshape(-1) for p in flat[0]])
    found, expected = (train(*each, range(6)) for each in (flat, plain))
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)
    assert (found - begin).abs().max() > 0.02


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("flat_first", [True, False])
def test_either_state_is_read_into_the_other(flat_first):
    params, optimizer = build(flat=flat_first)
    train(params, optimizer, range(4))
    other_params, other = build(flat=not flat_first, like=params)
    other.load_state_dict(optimizer.state_dict())
    states = [o.fp32_optimizer.optimizer.state_dict()["state"] for o in (optimizer, other)]
    for name in ("exp_avg", "exp_avg_sq"):
        one, two = (torch.cat([state[name].reshape(-1) for state in each.values()]) for each in states)
        assert torch.equal(one, two), name
        assert one.any()
    assert {state["step"] for each in states for state in each.values()} == {4}
    # fairseq makes the float32 weights of the rounded ones
    found, expected = train(other_params, other, range(4, 6)), train(params, optimizer, range(4, 6))
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=1e-3)


def test_a_state_before_the_first_update_and_one_that_does_not_fit():
    shapes = [torch.Size((2, 2)), torch.Size((3,))]
    empty = {"state": {}, "param_groups": [{"params": [0]}]}
    assert flat_bf16.fitted(empty, shapes) is empty
    larger = {"state": {0: {"exp_avg": torch.zeros(8)}}, "param_groups": [{"params": [0]}]}
    assert flat_bf16.fitted(larger, shapes) is larger


def test_not_on_a_cpu():
    assert not build(flat=True)[1].has_flat_params


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("other", ["sharded", "adafactor"])
def test_not_where_it_cannot_be(other):
    cfg = config()
    if other == "sharded":
        cfg.distributed_training.zero_sharding = "os"
    else:
        cfg = OmegaConf.create({**OmegaConf.to_container(cfg), "optimizer": {"_name": "adafactor", **ADAFACTOR}})
    params = [torch.nn.Parameter(torch.ones(shape).bfloat16()) for shape in SHAPES]
    optimizer = optim.FP16Optimizer.build_optimizer(cfg, params)
    assert isinstance(optimizer.fp32_params, list)
