"""Adapters: what they compute, what trains, which one is used, and every wrong flag."""

import math
import re

import pytest
import torch
from tiny_models import SIDES, adapters, batch, both, build, build_from, logits, parameters, randomize, settings

from kd_ext.errors import ConfigError
from kd_ext.modules.adapter import Adapter, AdapterSet, adapter_of

FUNCTIONS = {
    "relu": lambda v: max(v, 0.0),
    "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
    "silu": lambda v: v / (1 + math.exp(-v)),
    "tanh": math.tanh,
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_an_adapter_computes_its_formula(activation, gated):
    torch.manual_seed(1)
    adapter = Adapter(5, 3, activation, dropout=torch.nn.Dropout(0.5), gated=gated).eval().double()
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    weights = {name: p.tolist() for name, p in adapter.named_parameters()}
    x = torch.randn(5, dtype=torch.double).tolist()

    mean = sum(x) / 5
    deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / 5 + 1e-5)
    scale = zip(x, weights["layer_norm.weight"], weights["layer_norm.bias"])
    normed = [(v - mean) / deviation * w + b for v, w, b in scale]

    def affine(name, values):
        rows = zip(weights[f"{name}.weight"], weights[f"{name}.bias"])
        return [sum(w * v for w, v in zip(row, values)) + b for row, b in rows]

    added = affine("up", [FUNCTIONS[activation](v) for v in affine("down", normed)])
    gate = 1 / (1 + math.exp(-affine("gate", normed)[0])) if gated else 1.0
    expected = [v + gate * a for v, a in zip(x, added)]
    assert adapter(torch.tensor(x, dtype=torch.double)).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_new_adapters_change_no_bit_of_a_model(pre_norm, gated):
    norm = both(normalize_before=pre_norm)
    base = build("transformer", **norm).eval()
    model = build(load_checkpoint_liberally=True, seed=2, **norm, **adapters(train="hi", gated=gated)).eval()
    model.load_state_dict(base.state_dict())
    model.requires_grad_(True)  # as when it is loaded to translate: torch takes other kernels for frozen weights
    src, prev = batch()
    assert torch.equal(logits(model, src, prev), logits(base, src, prev))
    assert not torch.equal(logits(randomize(model), src, prev), logits(base, src, prev))


@pytest.mark.parametrize("gated", [False, True])
def test_a_sentence_does_not_depend_on_its_batch(gated):
    model = randomize(build(**adapters(train="hi", gated=gated))).eval()
    src, prev = batch()
    together = logits(model, src, prev)
    for i in range(len(src)):
        alone = src[i : i + 1, src[i].ne(1)]  # without padding
        torch.testing.assert_close(logits(model, alone, prev[i : i + 1])[0], together[i], rtol=0, atol=1e-5)


def test_parameter_count():
    for gated in (False, True):
        flags = adapters(ids="as,bn,hi", factor=3, gated=gated)
        width, bottleneck = 16, 5
        one = 2 * width + width * bottleneck + bottleneck + bottleneck * width + width + gated * (width + 1)
        assert parameters(build(**flags)) == parameters(build()) + 3 * (2 + 2) * one


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_gradient(model):
    logits(model, *batch()).pow(2).mean().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trained", [{"encoder": "hi"}, {"decoder": "ta"}, {"encoder": "hi", "decoder": "ta"}], ids=str)
def test_exactly_the_trained_adapters_get_gradients(trained, checkpointing):
    ids = {f"{side}_train_adapter": name for side, name in trained.items()}
    flags = {**adapters(gated=True), **ids, "checkpoint_activations": checkpointing}
    model = randomize(build(**flags))
    kinds = ["layer_norm.weight", "layer_norm.bias", "down.weight", "down.bias", "up.weight", "up.bias"]
    kinds += ["gate.weight", "gate.bias"]
    expected = {
        f"{side}.layers.{layer}.adapters.{name}.{kind}"
        for side, name in trained.items()
        for layer in (0, 1)
        for kind in kinds
    }
    assert trainable(model) == expected
    assert with_gradient(model) == expected
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)
    for side in SIDES:
        assert getattr(model, side).layers[0].adapters.active == trained.get(side)


def test_nothing_is_kept_for_a_side_without_a_trained_adapter():
    src, _ = batch()
    encoded = build(**{**adapters(), "decoder_train_adapter": "hi"}).encoder(src, src.ne(1).sum(1))
    assert not any(tensor.requires_grad for tensor in encoded["encoder_out"])


def test_adapters_on_one_side_alone():
    flags = {k: v for k, v in adapters(train="hi").items() if k.startswith("decoder")}
    model = build(**flags)
    assert {adapter_of(name) for name in trainable(model)} == {("decoder", "hi")}
    assert not any("adapters" in name for name in model.encoder.state_dict())


def test_without_an_id_to_train_the_base_trains_and_the_adapters_rest(caplog):
    caplog.set_level("INFO")
    model = randomize(build(**adapters()))
    assert trainable(model) == with_gradient(model) == {n for n, _ in build().named_parameters()}
    assert "encoder adapters: hi, ta; trained: none; active: none" in caplog.text


def test_the_log_says_how_many_parameters_train(caplog):
    caplog.set_level("INFO")
    model = build(**adapters(train="hi"))
    one = 2 * 16 + 16 * 8 + 8 + 8 * 16 + 16
    assert f"{4 * one:,} of {parameters(model):,} parameters are trainable" in caplog.text


def test_dropout_is_between_the_gate_and_the_residual():
    """What is dropped is what is added; the residual is neither dropped nor scaled, and the gate has its part."""
    torch.manual_seed(1)
    adapter = Adapter(400, 4, "relu", dropout=torch.nn.Dropout(0.25), gated=True)
    torch.nn.init.ones_(adapter.up.bias)
    torch.nn.init.constant_(adapter.gate.weight, 0)
    torch.nn.init.constant_(adapter.gate.bias, math.log(3))  # of 3/4
    x = torch.arange(1.0, 401.0) * 10
    added = adapter(x) - x
    assert 0.15 < added.eq(0).float().mean() < 0.35
    kept = added[added.ne(0)]
    torch.testing.assert_close(kept, torch.ones_like(kept), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("names", [None, ["Adapter"], ["TransformerDecoderLayer"]])
def test_dropout_that_is_retained_at_inference(names):
    model = randomize(build(**adapters(train="hi"), dropout=0.3)).eval()
    model.make_generation_fast_(retain_dropout=True, retain_dropout_modules=names)
    sets = [module for module in model.modules() if isinstance(module, AdapterSet)]
    for adapter in (each._modules["hi"] for each in sets):
        outputs = adapter(torch.ones(16)), adapter(torch.ones(16))
        assert torch.equal(*outputs) == (names == ["TransformerDecoderLayer"])
    assert len(sets) == 4


@pytest.mark.parametrize("kind", [{}, adapters(train="hi"), both(recurrent_stacking=2)], ids=["", "adapted", "stacked"])
@pytest.mark.parametrize("side", ["Encoder", "Decoder"])
@pytest.mark.parametrize("part", ["", "LayerBase"])
def test_dropout_is_retained_by_the_names_of_upstreams_classes(kind, side, part):
    """As of an upstream model, whose layers have these names."""
    model = build(**kind, dropout=0.3).eval()
    upstream = build("transformer", dropout=0.3).eval()
    name = f"Transformer{side}{part}"
    kept = []
    for each in (model, upstream):
        each.make_generation_fast_(retain_dropout=True, retain_dropout_modules=[name])
        found = [path for path, x in each.named_modules() if getattr(x, "apply_during_inference", False)]
        kept.append({re.sub(r"\.layers\.\d+", ".layers.N", path) for path in found})
    assert kept[0] == kept[1]
    assert kept[0]


def test_activation_at_inference():
    args = settings(**adapters(train="hi"))
    trained = randomize(build_from(args)).eval()
    state, (src, prev) = trained.state_dict(), batch()
    outputs = {}
    for asked in (None, "hi", "ta", "none"):
        args.activate_encoder_adapter = args.activate_decoder_adapter = asked
        model = build_from(args).eval()
        model.load_state_dict(state)
        outputs[asked] = logits(model, src, prev)
    torch.testing.assert_close(outputs[None], outputs["hi"])
    base = build().eval()
    base.load_state_dict({k: v for k, v in state.items() if ".adapters." not in k})
    torch.testing.assert_close(outputs["none"], logits(base, src, prev))
    for one, other in (("hi", "ta"), ("hi", "none"), ("ta", "none")):
        assert (outputs[one] - outputs[other]).abs().max() > 1e-3
    trained.requires_grad_(True)
    trained.activate_adapter("none", "none")
    assert torch.equal(logits(trained, src, prev), outputs["none"])


def test_ids_may_be_names_of_module_methods():
    model = build(**adapters(ids="to,half,type", train="to")).half().float().eval()  # "to" is Tongan
    assert {adapter_of(name) for name in trainable(model)} == {("encoder", "to"), ("decoder", "to")}
    model.load_state_dict(model.state_dict())


WRONG = {
    "ids missing": ({"encoder_adapter_ids": None}, "--encoder-adapter-ids is missing.*as in de,hi,ta"),
    "empty id": ({"decoder_adapter_ids": "hi,,ta"}, "--decoder-adapter-ids hi,,ta: '' cannot be an id"),
    "twice": ({"decoder_adapter_ids": "hi,hi"}, "--decoder-adapter-ids hi,hi: 'hi' is there twice"),
    "dot": ({"encoder_adapter_ids": "a.b"}, "'a.b' cannot be an id"),
    "none": ({"encoder_adapter_ids": "none"}, "'none' cannot be an id"),
    "training": ({"encoder_adapter_ids": "training"}, "'training' cannot be an id"),
    "unknown": ({"encoder_train_adapter": "xx"}, "--encoder-train-adapter xx: unknown; the encoder has hi, ta"),
    "none trained": (
        {"encoder_train_adapter": "none"},
        "--encoder-train-adapter none: unknown; the encoder has hi, ta",
    ),
    "activate": ({"activate_decoder_adapter": "xx"}, "--activate-decoder-adapter xx: unknown; the decoder has hi, ta"),
    "narrow": (
        {"encoder_adapter_reduction_factor": 17},
        "reduction-factor 17: must be from 1 to --encoder-embed-dim 16",
    ),
    "zero": ({"decoder_adapter_reduction_factor": 0}, "--decoder-adapter-reduction-factor 0: must be from 1 to"),
    "quote": ({"encoder_adapter_ids": "${oc}"}, "'.{oc}' cannot be an id"),
    "number": ({"encoder_adapter_ids": 1}, "--encoder-adapter-ids 1: not a name but a int: quote"),
    "list": ({"adapter_activation_fn": ["relu"]}, r"--adapter-activation-fn \['relu'\]: is a list; give a name"),
    "factor": (
        {"encoder_adapter_reduction_factor": 2.5},
        "--encoder-adapter-reduction-factor 2.5: is a float; give a whole number, without quotes",
    ),
    "switch": (
        {"decoder_adapter_use_gating": "false"},
        "--decoder-adapter-use-gating 'false': is a str; give true or false, without quotes",
    ),
    "norwegian": ({"encoder_train_adapter": False}, "--encoder-train-adapter False: not a name but a bool: quote"),
    "activation": (
        {"adapter_activation_fn": "swish"},
        "--adapter-activation-fn swish: unknown; one of relu, gelu, silu",
    ),
    "no adapters": ({"encoder_add_adapters": False}, "--encoder-adapter-ids hi,ta: the encoder has no adapters; add"),
    "offload": ({"offload_activations": True}, "--offload-activations: not with adapters or recurrent stacking"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_flags_are_told_before_training(case):
    flags, message = WRONG[case]
    with pytest.raises(ConfigError, match=message) as raised:
        build(**{**adapters(), **flags})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "flags",
    [
        {"encoder_train_adapter": "hi"},
        {"encoder_adapter_use_gating": True},
        {"activate_encoder_adapter": "hi"},
    ],
)
def test_flags_of_adapters_without_adapters(flags):
    with pytest.raises(ConfigError, match="has no adapters"):
        build(**flags)
    build(activate_encoder_adapter="none")


def test_flags_without_effect_are_told(caplog):
    build(encoder_adapter_reduction_factor=4, adapter_activation_fn="gelu")
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == [
        "--encoder-adapter-reduction-factor 4 has no effect: the encoder has no adapters",
        "--adapter-activation-fn gelu has no effect: there are no adapters",
    ]
