"""The named architectures against upstream's, and checkpoints that go from one to the other."""

import copy
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils, models, options
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from omegaconf import OmegaConf
from tiny_models import SIDES, adapters, batch, both, build, build_from, dictionary, logits, settings

from kd_ext.errors import ConfigError
from kd_ext.models.transformer_ext import TransformerExtModel

SIZES = ["", "_tiny", "_iwslt_de_en", "_wmt_en_de", "_vaswani_wmt_en_de_big", "_vaswani_wmt_en_fr_big"]
SIZES += ["_wmt_en_de_big", "_wmt_en_de_big_t2t"]
NAMES = [
    f"transformer_{family}{size}"
    for family in ("adapter", "recurrent_stacking", "factorized_embedding")
    for size in SIZES
]
OFF = {
    "adapter": {},
    "recurrent_stacking": {"encoder_recurrent_stacking": 0, "decoder_recurrent_stacking": 0},
    "factorized_embedding": {"encoder_factorized_embed_dim": 0, "decoder_factorized_embed_dim": 0},
}
DEAD = [f"{name}_{kind}" for name in ("in_proj", "out_proj", "fc1", "fc2") for kind in ("weight", "bias")]


def defaults(name):
    args = Namespace()
    ARCH_CONFIG_REGISTRY[name](args)
    return vars(args)


@pytest.mark.parametrize("size", SIZES)
def test_architectures_differ_from_upstreams_in_their_own_defaults_alone(size):
    upstream = defaults(f"transformer{size}")
    plain = defaults("transformer_ext")
    own = {k: v for k, v in plain.items() if k not in defaults("transformer")}
    width = upstream["encoder_embed_dim"]
    k = 128 if width > 128 else width // 2
    changed = {
        "adapter": {},
        "recurrent_stacking": both(recurrent_stacking=upstream["encoder_layers"]),
        "factorized_embedding": both(factorized_embed_dim=k),
    }
    for family, values in changed.items():
        assert defaults(f"transformer_{family}{size}") == {**own, **upstream, **values}
    assert upstream["encoder_layers"] == upstream["decoder_layers"]


def test_there_are_24_and_each_takes_every_flag():
    assert len(NAMES) == 24
    flags = ["data", "--adapter-activation-fn", "gelu", "--load-checkpoint-liberally"]
    expected = {"adapter_activation_fn": "gelu", "load_checkpoint_liberally": True}
    for side in SIDES:
        flags += [f"--{side}-add-adapters", f"--{side}-adapter-use-gating", f"--{side}-adapter-reduction-factor", "3"]
        flags += [f"--{side}-adapter-ids", "hi,ta", f"--{side}-train-adapter", "ta"]
        flags += [f"--{side}-recurrent-stacking", "2", f"--{side}-factorized-embed-dim", "7"]
    expected.update(both(add_adapters=True, adapter_use_gating=True, adapter_reduction_factor=3, adapter_ids="hi,ta"))
    expected.update(both(train_adapter="ta", recurrent_stacking=2, factorized_embed_dim=7))
    for name in [*NAMES, "transformer_ext"]:
        parser = options.get_training_parser()
        args = vars(options.parse_args_and_arch(parser, [*flags, "--arch", name]))
        assert {key: args[key] for key in expected} == expected
        assert ARCH_MODEL_REGISTRY[name] is TransformerExtModel


@pytest.mark.skipif(not hasattr(torch.device, "__enter__"), reason="torch < 2 cannot build without memory for weights")
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_builds(name):
    words = dictionary()
    with torch.device("meta"):
        model = models.build_model(
            Namespace(arch=name, _name=name), SimpleNamespace(source_dictionary=words, target_dictionary=words)
        )
    assert model.encoder.num_layers == model.decoder.num_layers == defaults(name)["encoder_layers"]


@pytest.mark.parametrize("family", OFF)
@pytest.mark.parametrize("pre_norm", [False, True])
def test_with_every_feature_off_it_is_upstreams_transformer(family, pre_norm):
    flags = {"dropout": 0.1, "share_decoder_input_output_embed": pre_norm, **both(normalize_before=pre_norm)}
    ours, upstream = build(f"transformer_{family}", **flags, **OFF[family]), build("transformer", **flags)
    live = {n: p for n, p in upstream.named_parameters() if n.split(".")[-1] not in DEAD}
    assert {n for n, _ in ours.named_parameters()} == set(live)
    assert all(torch.equal(p, live[n]) for n, p in ours.named_parameters())  # one seed, one start
    src, prev = batch()
    outputs = []
    for model in (ours, upstream):
        torch.manual_seed(3)
        outputs.append((logits(model, src, prev), logits(model.eval(), src, prev)))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_no_dead_parameters():
    upstream = build("transformer").state_dict()
    assert sum(name.split(".")[-1] in DEAD for name in upstream) == 2 * 8
    for flags in ({}, adapters(train="hi"), both(recurrent_stacking=2)):
        assert not any(name.split(".")[-1] in DEAD for name in build(**flags).state_dict())


def test_checkpoints_of_either_load_in_the_other():
    upstream, (src, prev) = build("transformer", seed=1).eval(), batch()
    with_dead = upstream.state_dict()
    without = {name: tensor for name, tensor in with_dead.items() if name.split(".")[-1] not in DEAD}
    for state in (with_dead, without):
        ours = build(seed=2).eval()
        ours.load_state_dict(dict(state), strict=True)
        assert torch.equal(logits(ours, src, prev), logits(upstream, src, prev))
    back = build("transformer", seed=3).eval()
    back.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(logits(back, src, prev), logits(upstream, src, prev))


def test_an_unknown_key_is_still_refused():
    state = build().state_dict()
    state["encoder.layers.0.fc3_weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="fc3_weight"):
        build().load_state_dict(state)


def test_settings_of_hydra_build_the_same_model():
    """A DictConfig answers None for what it does not have; upstream's own presets fail there."""
    cfg = OmegaConf.create({"_name": "transformer_recurrent_stacking_tiny", "encoder_add_adapters": True})
    cfg.encoder_adapter_ids, cfg.load_checkpoint_liberally = "hi", True
    OmegaConf.set_struct(cfg, True)
    model = build_from(cfg)
    assert (model.encoder.num_layers, model.decoder.embed_dim) == (2, 64)
    assert sum(".layers.0.adapters.hi." in name for name in model.state_dict()) == 6
    assert model._load_liberally
    again = build_from(OmegaConf.create(OmegaConf.to_container(cfg)))  # from what a checkpoint keeps
    again.load_state_dict(model.state_dict())
    assert (cfg.base_layers, cfg.activate_encoder_adapter) == (0, None)


def test_layerdrop_pruning_still_works():
    whole = build(layers=3)
    args = settings(layers=3, encoder_layers_to_keep="0,2", decoder_layers_to_keep="0,1,2")
    pruned = build_from(args)
    pruned.load_state_dict(whole.state_dict(), strict=True, model_cfg=args)
    theirs = whole.encoder.layers[2].fc1.weight
    assert torch.equal(pruned.encoder.layers[1].fc1.weight, theirs)
    assert build_from(args).encoder.num_layers == 2  # loading has cleared the flag; the depth is saved
    with pytest.raises(ConfigError, match=r"--encoder-layers-to-keep 0,1: .*--encoder-recurrent-stacking 3"):
        build(encoder_layers_to_keep="0,1", encoder_recurrent_stacking=3)
    with pytest.raises(ConfigError, match=r"--encoder-layers-to-keep 0,1: .*--decoder-recurrent-stacking 3"):
        build(encoder_layers_to_keep="0,1", decoder_recurrent_stacking=3)


@pytest.mark.parametrize("name", ["encoder_recurrent_stacking", "decoder_factorized_embed_dim"])
@pytest.mark.parametrize("value", ["3", 2.0, None, True])
def test_numbers_of_another_type_are_told(name, value):
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')} {value!r}: is a .*; give a whole number"):
        build(**{name: value})


def test_depths_that_no_checkpoint_may_have_are_told():
    with pytest.raises(ConfigError, match="--encoder-recurrent-stacking 1000000000: out of range; at most 1000 depths"):
        build(encoder_recurrent_stacking=10**9)


def test_negative_depths_are_told():
    with pytest.raises(ConfigError, match="--decoder-recurrent-stacking -2: negative"):
        build(decoder_recurrent_stacking=-2)


def test_all_features_at_once():
    flags = {**adapters(train="hi", gated=True), **both(recurrent_stacking=3, factorized_embed_dim=4)}
    model, (src, prev) = build(share_all_embeddings=True, **flags).eval(), batch()
    other = build(share_all_embeddings=True, seed=2, **flags).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, src, prev), logits(other, src, prev))
    torch.testing.assert_close(logits(copy.deepcopy(model), src, prev), logits(model, src, prev))


def test_layers_to_keep_that_are_not_there(caplog):
    state = build(layers=3).state_dict()
    with pytest.raises(ConfigError, match=r"^--encoder-layers-to-keep 0,7: the weights have the layers 0 to 2"):
        checkpoint_utils.prune_state_dict(state, settings(layers=3, encoder_layers_to_keep="0,7"))
    kept = checkpoint_utils.prune_state_dict(state, settings(layers=3, encoder_layers_to_keep="0,4,5"))
    assert kept.keys() == state.keys()
    assert "--encoder-layers-to-keep 0,4,5: the weights have 3 layers, as many; all are taken" in caplog.text
