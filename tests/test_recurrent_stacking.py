"""One layer at N depths against upstream's transformer with N layers of the same weights, and its caches."""

import copy
import io

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from tiny_models import adapters, batch, both, build, dictionary, logits, parameters, randomize

from kd_ext.errors import ConfigError
from kd_ext.modules.recurrent_stack import RepeatedDecoderLayer

ENCODER_LAYER = 4 * (16 * 16 + 16) + (16 * 24 + 24) + (24 * 16 + 16) + 2 * 2 * 16
DECODER_LAYER = ENCODER_LAYER + 4 * (16 * 16 + 16) + 2 * 16


def stacked(depths, **flags):
    return build(**both(recurrent_stacking=depths), **flags)


def unrolled(model, depths, **flags):
    """Upstream's transformer, every layer with the weights of the stack's one."""
    upstream = build("transformer", layers=depths, **flags)
    state = {}
    for name, tensor in model.state_dict().items():
        if ".layers.0." in name:
            state.update({name.replace(".0.", f".{i}.", 1): tensor for i in range(depths)})
        else:
            state[name] = tensor
    upstream.load_state_dict(state)
    return upstream


def step_by_step(model, src, prev, orders):
    """Decode as beam search does; returns the worst difference from full passes over the same prefixes."""
    with torch.no_grad():
        encoded, cache, worst = model.encoder(src, src.ne(1).sum(1)), {}, 0.0
        for length, order in enumerate(orders, start=1):
            step = model.decoder(prev[:, :length], encoder_out=encoded, incremental_state=cache)[0][:, -1]
            full = model.decoder(prev[:, :length], encoder_out=encoded)[0][:, -1]
            worst = max(worst, (step - full).abs().max().item())
            src, prev = src[order], prev[order]
            encoded = model.encoder.reorder_encoder_out(encoded, order)
            model.decoder.reorder_incremental_state_scripting(cache, order)
    return worst


# two sentences with three hypotheses each: which of them go on, swapped, doubled and dropped
ORDERS = [torch.tensor(o + p) for o, p in (([1, 0, 2], [4, 4, 3]), ([2, 2, 0], [5, 3, 4]), ([0, 1, 1], [3, 3, 3]))]
ORDERS += ORDERS[:2]


def beams():
    src, _ = batch(sentences=2)
    return src.repeat_interleave(3, dim=0), batch(sentences=6)[1]


@pytest.mark.parametrize("depths", [1, 2, 6])
@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize(
    "extra", [{}, adapters(train="hi"), adapters(train="hi", gated=True)], ids=["", "adapters", "gates"]
)
def test_step_by_step_equals_the_full_pass(depths, pre_norm, extra):
    model = randomize(stacked(depths, **both(normalize_before=pre_norm), **extra)).eval()
    assert step_by_step(model, *beams(), ORDERS) < 1e-5


def test_the_test_above_notices_a_shared_cache(monkeypatch):
    def forward_with_shared_cache(self, x, *args, **kwargs):
        return self._forward(self._first[0], x, *args, **kwargs)

    monkeypatch.setattr(RepeatedDecoderLayer, "forward", forward_with_shared_cache)
    assert step_by_step(stacked(2).eval(), *beams(), ORDERS) > 1e-2


def test_the_test_above_notices_caches_left_in_the_old_order(monkeypatch):
    monkeypatch.setattr(RepeatedDecoderLayer, "reorder_incremental_state", lambda *_: None)
    assert step_by_step(stacked(2).eval(), *beams(), ORDERS) > 1e-3


@pytest.mark.parametrize("depths", [1, 2, 6])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_full_pass_and_gradients_are_those_of_the_unrolled_model(depths, pre_norm):
    norm = both(normalize_before=pre_norm)
    model = stacked(depths, **norm)
    upstream = unrolled(model, depths, **norm)
    src, prev = batch()
    out = logits(model, src, prev)
    torch.testing.assert_close(out, logits(upstream, src, prev))
    out.pow(2).mean().backward()
    logits(upstream, src, prev).pow(2).mean().backward()
    theirs = dict(upstream.named_parameters())
    for name, parameter in model.named_parameters():
        copies = [theirs[name.replace(".0.", f".{i}.", 1)] for i in range(depths if ".layers." in name else 1)]
        torch.testing.assert_close(parameter.grad, sum(c.grad for c in copies), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_layerdrop_drops_depths(seed):
    drop = both(layerdrop=0.5)
    model, src, prev = stacked(6, **drop), *batch()
    upstream = unrolled(model, 6, **drop)
    torch.manual_seed(seed)
    out = logits(model, src, prev)
    torch.manual_seed(seed)
    torch.testing.assert_close(out, logits(upstream, src, prev))
    assert not torch.allclose(out, logits(model.eval(), src, prev))


@pytest.mark.parametrize("extra", [{}, adapters(train="hi", gated=True)], ids=["", "adapters"])
def test_activation_checkpointing_changes_no_gradient(extra):
    gradients = []
    for checkpointing in (False, True):
        flags = {"dropout": 0.1, "checkpoint_activations": checkpointing}
        model = randomize(stacked(3, **{**extra, **flags}))
        torch.manual_seed(5)
        logits(model, *batch()).pow(2).mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def generate(models, src, beam=4):
    generator = SequenceGenerator(models, dictionary(), beam_size=beam, max_len_b=8)
    sample = {"net_input": {"src_tokens": src, "src_lengths": src.ne(1).sum(1)}}
    for model in models:
        model.eval().make_generation_fast_(beamable_mm_beam_size=beam, need_attn=False)
    return [
        [(h["tokens"].tolist(), h["score"].item()) for h in hypotheses]
        for hypotheses in generator.generate(models, sample)
    ]


def test_beam_search_of_an_ensemble_finds_what_the_unrolled_models_find():
    models = [stacked(3, seed=1), stacked(2, seed=2, layers=1)]
    upstream = [unrolled(models[0], 3), unrolled(models[1], 2)]
    found, expected = generate(models, batch()[0]), generate(upstream, batch()[0])
    for ours, theirs in zip(found, expected):
        assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
        assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=1e-5)


def test_attention_weights_come_from_the_last_depth():
    model, (src, prev) = stacked(3).eval(), batch()
    ours = model(src, src.ne(1).sum(1), prev)[1]["attn"][0]
    theirs = unrolled(model, 3).eval()(src, src.ne(1).sum(1), prev)[1]["attn"][0]
    torch.testing.assert_close(ours, theirs)


def test_parameters_exist_once():
    model = stacked(6)
    assert parameters(model) == 3 * 30 * 16 + ENCODER_LAYER + DECODER_LAYER
    assert parameters(model) == parameters(stacked(1))
    assert {name.split(".")[2] for name in model.state_dict() if ".layers." in name} == {"0"}
    sizes = []
    for depths in (1, 6):
        file = io.BytesIO()
        torch.save(stacked(depths).state_dict(), file)
        sizes.append(file.tell())
    assert sizes[1] < sizes[0] + 1000  # torch notes the names of modules


def test_adapters_are_each_depths_own():
    model = stacked(3, **adapters(ids="hi", train="hi"))
    adapter = 2 * 16 + 16 * 8 + 8 + 8 * 16 + 16
    assert parameters(model) == parameters(stacked(3)) + 2 * 3 * adapter
    randomize(model)
    logits(model, *batch()).pow(2).mean().backward()
    up = [model.get_parameter(f"decoder.layers.{i}.adapters.hi.up.weight") for i in range(3)]
    assert all(p.grad.abs().sum() > 0 for p in up)
    assert not torch.equal(up[0].grad, up[1].grad)


def test_a_copy_shares_within_itself_alone():
    model, (src, prev) = stacked(2).eval(), batch()
    before, other = logits(model, src, prev), copy.deepcopy(model)  # as --store-ema does
    torch.testing.assert_close(logits(other, src, prev), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(logits(model, src, prev), before)
    fresh = stacked(2, seed=9).eval()
    fresh.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits(fresh, src, prev), logits(other, src, prev))


def test_a_cast_reaches_every_depth():
    model, (src, prev) = stacked(2).eval().to(torch.bfloat16), batch()
    assert logits(model, src, prev).dtype == torch.bfloat16


def test_quantization_noise_is_refused():
    """Upstream's is put on the weights themselves, whenever they are used."""
    with pytest.raises(ConfigError, match=r"--quant-noise-pq 0\.1: not with --decoder-recurrent-stacking 3"):
        build(decoder_recurrent_stacking=3, quant_noise_pq=0.1)
    build(quant_noise_pq=0.1)


def test_another_number_of_layers_is_mentioned(caplog):
    caplog.set_level("INFO")
    build(encoder_recurrent_stacking=3, layers=2)
    assert "--encoder-recurrent-stacking 3: the encoder has 3 depths; --encoder-layers 2 has no effect" in caplog.text
    assert "--decoder" not in caplog.text
    assert build(encoder_recurrent_stacking=0, layers=2).encoder.num_layers == 2
