"""A checkpoint's weights under other settings than their own: refused where they would compute something else."""

import random
from argparse import Namespace

import numpy as np
import pytest
import torch
from commands import run
from conftest import TRAINING
from test_cli_architectures import CRITERION, FLAGS, adapter_flags
from tiny_models import adapters, batch, both, build_from, dictionary, logits, settings

from kd_ext.errors import ConfigError
from kd_ext.models.same_function import Probe, check_same_function
from kd_ext.modules.random_state import random_state_kept


class Task:
    source_dictionary = target_dictionary = dictionary()


def check(trained, run, liberally=True, trained_arch="transformer", arch="transformer_ext"):
    """Checks, and sees by models of its own that what the check says is so."""
    saved = settings(trained_arch, **trained)
    model = build_from(saved)
    src, prev = batch()
    inputs = {"src_tokens": src, "src_lengths": src.ne(1).sum(1), "prev_output_tokens": prev}
    probe = Probe(Task(), model.state_dict(), inputs)
    given = settings(arch, **run)
    before = torch.get_rng_state()
    try:
        check_same_function("base.pt", saved, given, liberally, probe)
    finally:
        assert torch.equal(torch.get_rng_state(), before)
    given.load_checkpoint_liberally = liberally
    loaded = build_from(given)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(logits(loaded.eval(), src, prev), logits(model.eval(), src, prev))


GELU = {"activation_fn": "gelu"}
PRENORM = both(normalize_before=True)
# what the base was trained with, what the run is given, what the message says
OTHERS = {
    "activation": ({}, GELU, "--activation-fn gelu: base.pt was trained with --activation-fn relu,"),
    "nearly the same": (GELU, {"activation_fn": "gelu_accurate"}, "--activation-fn gelu_accurate: "),
    "heads": ({}, both(attention_heads=4), "--decoder-attention-heads 4, --encoder-attention-heads 4: "),
    "heads of one side": ({}, {"encoder_attention_heads": 1}, "--encoder-attention-heads 1: "),
    "norms": (PRENORM, {"encoder_normalize_before": True}, "no --decoder-normalize-before: "),
    "last norm": (PRENORM, {**PRENORM, "no_decoder_final_norm": True}, "--no-decoder-final-norm: "),
    "norms of embeddings": ({"layernorm_embedding": True}, {}, "no --layernorm-embedding: "),
    "positions": ({}, {"no_token_positional_embeddings": True}, "--no-token-positional-embeddings: "),
    "learned positions": ({}, {"decoder_learned_pos": True}, "--decoder-learned-pos: "),
    "scale": ({}, {"no_scale_embedding": True}, "--no-scale-embedding: "),
    "tie": ({}, {"share_decoder_input_output_embed": True}, "--share-decoder-input-output-embed: "),
    "all tied": ({}, {"share_all_embeddings": True}, "--share-all-embeddings: "),
    "no cross-attention": ({}, {"no_cross_attention": True}, "--no-cross-attention: "),
    "cross and self": ({}, {"cross_self_attention": True}, "--cross-self-attention: "),
    "fewer layers": ({}, {"encoder_layers": 1}, "--encoder-layers 1: base.pt was trained with --encoder-layers 2,"),
    "wider": ({}, {"decoder_ffn_embed_dim": 32}, "--decoder-ffn-embed-dim 32: "),
    "stacked": ({}, both(recurrent_stacking=2), "--decoder-recurrent-stacking 2, --encoder-recurrent-stacking 2: "),
    "factorized": ({}, {"encoder_factorized_embed_dim": 4}, "--encoder-factorized-embed-dim 4: "),
    "two at once": (GELU, both(attention_heads=1), "--activation-fn relu, --decoder-attention-heads 1, --enc"),
}
TRAINED = adapters(ids="hi", train="hi")


@pytest.mark.parametrize("name", OTHERS)
def test_a_frozen_base_under_other_settings(name):
    trained, run, message = OTHERS[name]
    with pytest.raises(ConfigError) as error:
        check(trained, {**run, **TRAINED})
    assert str(error.value).startswith(message)
    assert "its weights compute something else now" in str(error.value)
    assert "adapter" not in str(error.value)  # the settings that differ and are not to blame
    check(trained, {**trained, **TRAINED})


ALIKE = {
    "what is for training": {"dropout": 0.3, "attention_dropout": 0.1, "activation_dropout": 0.1, "relu_dropout": 0.1},
    "how it is computed": {"checkpoint_activations": True, "min_params_to_wrap": 3},
    "layer drop": both(layerdrop=0.2),
    "noise": {"quant_noise_pq_block_size": 4, "quant_noise_scalar": 0.1},
    "longest sentences": {"max_source_positions": 99, "max_target_positions": 88},
    "of no model": {"lr": [1.0], "save_dir": "elsewhere", "max_update": 3},
}


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("liberally", [True, False])
def test_what_may_differ(name, liberally):
    if liberally:
        check({}, {**ALIKE[name], **TRAINED})
    else:
        check({}, ALIKE[name], liberally, arch="transformer")


@pytest.mark.parametrize("name", ["activation", "heads", "norms", "fewer layers", "two at once"])
def test_a_run_that_goes_on_under_other_settings(name):
    trained, run, message = OTHERS[name]
    with pytest.raises(ConfigError) as error:
        check(trained, run, liberally=False, arch="transformer")
    assert str(error.value).startswith(message)


def test_the_named_architecture_of_another_size():
    """Heads and feed-forward width are those of the names; the rest is made small."""
    small = {**both(embed_dim=16, layers=1), **TRAINED}
    saved, base = (Namespace(arch=a, _name=a, **small) for a in ("transformer_iwslt_de_en", "transformer_adapter"))
    src, prev = batch()
    inputs = {"src_tokens": src, "src_lengths": src.ne(1).sum(1), "prev_output_tokens": prev}
    probe = Probe(Task(), build_from(Namespace(**vars(saved))).state_dict(), inputs)
    with pytest.raises(ConfigError) as error:
        check_same_function("base.pt", saved, base, True, probe)
    assert str(error.value).startswith("--decoder-attention-heads 8, --decoder-ffn-embed-dim 2048, --encoder-attention")
    base.arch = base._name = "transformer_adapter_iwslt_de_en"
    check_same_function("base.pt", saved, base, True, probe)


def test_adapters_that_are_there_keep_their_settings():
    """Of the adapter that the checkpoint has; another one may be added."""
    trained = {**adapters(ids="hi", train="hi"), "adapter_activation_fn": "gelu"}
    saved, given = settings(**trained), settings(**adapters(ids="hi,ta", train="ta"))
    model = build_from(saved)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".up." in name:
                parameter.normal_()
    src, prev = batch()
    inputs = {"src_tokens": src, "src_lengths": src.ne(1).sum(1), "prev_output_tokens": prev}
    probe = Probe(Task(), model.state_dict(), inputs)
    with pytest.raises(ConfigError, match=r"^--adapter-activation-fn relu: base.pt was trained with .*-fn gelu"):
        check_same_function("base.pt", saved, given, True, probe)
    given.adapter_activation_fn = "gelu"
    check_same_function("base.pt", saved, given, True, probe)


def test_a_base_of_an_architecture_that_is_not_here():
    """Its settings are read as this model class reads them."""
    saved = settings("transformer", **GELU)
    weights = build_from(saved).state_dict()
    saved.arch = saved._name = "of_another_plugin"
    src, prev = batch()
    probe = Probe(Task(), weights, {"src_tokens": src, "src_lengths": src.ne(1).sum(1), "prev_output_tokens": prev})
    check_same_function("base.pt", saved, settings(**GELU, **TRAINED), True, probe)
    with pytest.raises(ConfigError, match=r"^--activation-fn relu: "):
        check_same_function("base.pt", saved, settings(**TRAINED), True, probe)


def test_what_cannot_be_compared_is_said(caplog):
    check_same_function("x.pt", settings("transformer"), settings(**GELU), True, Probe(Task(), {}, None))
    assert "cannot tell whether the weights of x.pt compute the same here: other activation_fn" in caplog.text


def test_commands(train, teacher, tmp_path):
    """The README's two commands with other settings; then a run that goes on with others."""
    flags = [*CRITERION, *adapter_flags("hi"), *FLAGS, "--finetune-from-model", teacher, "--max-update", "1"]
    for i, (other, said) in enumerate([("--activation-fn gelu", "relu"), ("--encoder-attention-heads 4", "heads 2")]):
        result = train(tmp_path / str(i), *flags, *other.split(), arch="transformer_adapter")
        assert result.returncode != 0
        assert result.last_line.startswith(f"kd_ext: error: {other}: {teacher} was trained with ")
        assert said in result.last_line
        assert "Traceback" not in result.output
        assert not list((tmp_path / str(i)).glob("*.pt"))
    save_dir = tmp_path / "resumed"
    flags = [*CRITERION, "--max-update"]
    assert train(save_dir, *flags, "1").returncode == 0
    before = (save_dir / "checkpoint_last.pt").read_bytes()
    result = train(save_dir, *flags, "2", "--encoder-normalize-before")
    assert result.returncode != 0
    assert result.last_line.startswith(f"kd_ext: error: --encoder-normalize-before: {save_dir}/checkpoint_last.pt was")
    assert (save_dir / "checkpoint_last.pt").read_bytes() == before
    assert train(save_dir, *flags, "2", "--dropout", "0.3", "--lr", "0.1").returncode == 0


def test_another_class_of_models(data, tmp_path):
    flags = [data, *TRAINING, *CRITERION, "--arch", "lstm", "--save-dir", tmp_path / "lstm", "--max-update"]
    sizes = ["--encoder-hidden-size", 16, "--decoder-hidden-size", 16, "--encoder-embed-dim", 16]
    sizes += ["--decoder-embed-dim", 16, "--decoder-out-embed-dim", 16]
    assert run(tmp_path / "log", "fairseq-train", *flags, 1, *sizes).returncode == 0
    result = run(tmp_path / "log", "fairseq-train", *flags, 2, *sizes, "--decoder-attention", 0)
    assert result.returncode != 0
    assert result.last_line.startswith("kd_ext: error: --decoder-attention 0: ")
    assert run(tmp_path / "log", "fairseq-train", *flags, 2, *sizes, "--encoder-dropout-in", 0.3).returncode == 0


@pytest.mark.parametrize("kept", ["0,2", "1"])
def test_layers_to_keep(kept):
    """A flag that asks for another function; what else differs is refused as ever. (Of both sides: of one alone
    fairseq 0.12.2 loses the layers of the other.)"""
    saved = settings("transformer", layers=3)
    src, prev = batch()
    inputs = {"src_tokens": src, "src_lengths": src.ne(1).sum(1), "prev_output_tokens": prev}
    probe = Probe(Task(), build_from(settings("transformer", layers=3)).state_dict(), inputs)
    pruned = both(layers_to_keep=kept)
    check_same_function("base.pt", saved, settings("transformer", layers=3, **pruned), False, probe)
    with pytest.raises(ConfigError, match=r"^--activation-fn gelu: "):
        check_same_function("base.pt", saved, settings("transformer", layers=3, **pruned, **GELU), False, probe)


@pytest.mark.parametrize("fails", [False, True])
def test_random_numbers_go_on_as_if_nothing_had_been(fails):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    try:
        with random_state_kept():
            draw()
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert draw() == expected
