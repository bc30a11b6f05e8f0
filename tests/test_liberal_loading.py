"""--load-checkpoint-liberally: off, on, and where nothing fits."""

import pytest
import torch
from tiny_models import adapters, both, build, build_from, settings

from kd_ext.errors import ConfigError
from kd_ext.modules.liberal_loading import match, summary


def test_off_by_default():
    with pytest.raises(RuntimeError, match=r"adapters\.hi"):
        build(**adapters(train="hi")).load_state_dict(build("transformer").state_dict())


def test_what_fits_is_loaded_and_the_rest_is_named(caplog):
    caplog.set_level("INFO")
    base = build("transformer", seed=1, layers=3).state_dict()
    model = build(seed=2, layers=2, decoder_ffn_embed_dim=20, load_checkpoint_liberally=True, **adapters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = dict(base)
    model.load_state_dict(base, strict=True)
    for name, tensor in model.state_dict().items():
        if "_float_tensor" in name:
            continue
        fits = name in given and given[name].shape == tensor.shape
        assert torch.equal(tensor, given[name] if fits else before[name]), name
    log = caplog.text
    adapters_missing = ", ".join(f"{s}.layers.{i}.adapters.* (12)" for s in ("encoder", "decoder") for i in (0, 1))
    assert f"liberally: missing: {adapters_missing}\n" in log
    assert "liberally: unexpected: encoder.layers.2.* (16), decoder.layers.2.* (26)\n" in log
    assert "misshapen: decoder.layers.0.fc1.weight (model (20, 16), checkpoint (24, 16))" in log
    assert "in_proj" not in log  # upstream's dead parameters are missed by nobody


def test_pruned_layers_are_matched_by_their_new_names(caplog):
    caplog.set_level("INFO")
    args = settings(layers=3, load_checkpoint_liberally=True, **both(layers_to_keep="0,2"))
    base, model = build("transformer", layers=3), build_from(args)
    model.load_state_dict(base.state_dict(), model_cfg=args)
    assert torch.equal(model.encoder.layers[1].fc1.weight, base.encoder.layers[2].fc1.weight)
    assert "liberally: missing: none" in caplog.text


@pytest.mark.parametrize("ties", [{}, {"share_decoder_input_output_embed": True}, {"share_all_embeddings": True}])
def test_a_base_with_whole_embeddings_for_factorized_ones(ties):
    base = build("transformer", **ties)
    model = build(seed=2, load_checkpoint_liberally=True, **both(factorized_embed_dim=4), **ties)
    model.load_state_dict(base.state_dict())
    assert torch.equal(model.decoder.layers[1].fc1.weight, base.decoder.layers[1].fc1.weight)
    assert model.encoder.embed_tokens.weight.shape == (30, 4)


def test_frozen_weights_that_would_be_left_random_are_an_error(caplog):
    caplog.set_level("WARNING")
    base = build("transformer").state_dict()
    build(load_checkpoint_liberally=True, **adapters(train="hi")).load_state_dict(dict(base))
    build(load_checkpoint_liberally=True, decoder_ffn_embed_dim=20).load_state_dict(dict(base))  # they are trained
    assert not caplog.records
    narrow = build(load_checkpoint_liberally=True, decoder_ffn_embed_dim=20, **adapters(train="hi"))
    expected = (
        r"random values: decoder\.layers\.0\.fc1\.\* \(2\), decoder\.layers\.0\.fc2\.weight, decoder\.layers\.1\.fc1"
    )
    with pytest.raises(ConfigError, match=expected):
        narrow.load_state_dict(base)


def test_what_a_frozen_model_has_no_place_for_is_a_warning(caplog):
    caplog.set_level("WARNING")
    base = build("transformer", layers=3).state_dict()
    build(load_checkpoint_liberally=True, layers=2).load_state_dict(dict(base))  # it is trained
    assert not caplog.records
    build(load_checkpoint_liberally=True, layers=2, **adapters(train="hi")).load_state_dict(base)
    (warning,) = caplog.records
    assert "no place for: encoder.layers.2.* (16), decoder.layers.2.* (26)" in warning.getMessage()


def test_nothing_that_fits_is_an_error():
    other = build("transformer", **both(embed_dim=32, ffn_embed_dim=64)).state_dict()
    with pytest.raises(ConfigError, match="no parameter of the checkpoint fits"):
        build(load_checkpoint_liberally=True).load_state_dict(other)


def test_checkpoints_do_not_keep_the_flag():
    """A student that is loaded to translate, or as a teacher, must fit its checkpoint."""
    args = settings(load_checkpoint_liberally=True)
    assert build_from(args)._load_liberally
    assert not args.load_checkpoint_liberally
    with pytest.raises(RuntimeError, match="size mismatch"):
        build_from(args).load_state_dict(build(decoder_ffn_embed_dim=20).state_dict())


def test_match():
    found = match(
        {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)},
        {"a": torch.ones(2), "b": torch.ones(4), "d": torch.ones(1)},
    )
    assert found.fitting.keys() == {"a"}
    assert (found.missing, found.unexpected) == (["c"], ["d"])
    assert found.misshapen == ["b (model (3,), checkpoint (4,))"]


def test_summary_shortens_whole_branches_alone():
    every = ["x.a.1", "x.a.2", "x.b.1", "y.1", "z"]
    assert summary(["x.a.1", "x.a.2", "y.1"], every) == ["x.a.* (2)", "y.* (1)"]
    assert summary(["x.a.1", "z"], every) == ["x.a.1", "z"]
    assert summary(every[:3], every) == ["x.* (3)"]
