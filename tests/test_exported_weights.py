"""What is exported, as tensors: upstream's own model computes with them what the student does."""

import itertools
import re
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from fairseq import models
from fairseq.models.transformer import TransformerModel
from fairseq.tasks.translation import TranslationConfig
from omegaconf import OmegaConf
from tiny_models import FFN, WIDTH, adapters, batch, both, build_from, dictionary, logits, settings

from kd_ext.exporting.plain import upstream_weights
from kd_ext.exporting.settings import checkpoint_settings, model_settings
from kd_ext.models.extension_flags import read_extensions
from kd_ext.models.transformer_ext import transformer_ext

K = 6
TIES = {"untied": {}, "decoder": {"share_decoder_input_output_embed": True}, "all": {"share_all_embeddings": True}}
SWITCHES = [False, True]


def student_of(args, dtype=torch.double):
    """A model with random values in every parameter, norms and biases too, and its extensions."""
    model = build_from(args, words=dictionary())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.double).to(parameter.dtype)
            parameter.add_(noise * 0.3)
    transformer_ext(args)
    return model.to(dtype).eval(), read_extensions(args)


def exported(args, model, extensions, dtype=torch.double, one_projection=False):
    """Upstream's model from the exported weights and settings, and these."""
    weights, _ = upstream_weights(model.state_dict(), extensions, dtype, one_projection)
    found = model_settings(args, weights)
    words = dictionary()
    tables = SimpleNamespace(source_dictionary=words, target_dictionary=words)
    plain = models.build_model(Namespace(**found), tables)
    assert type(plain) is TransformerModel
    plain = plain.to(dtype)
    plain.load_state_dict(dict(weights), strict=True)
    return plain.eval(), weights, found


def difference(model, plain):
    src, prev = batch()
    with torch.no_grad():
        return float((logits(model, src, prev) - logits(plain, src, prev)).abs().max())


@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("factorized", SWITCHES)
@pytest.mark.parametrize("stacked", SWITCHES)
def test_logits_over_the_whole_product(stacked, factorized, tie):
    rest = itertools.product((None, "hi", "none"), SWITCHES, SWITCHES, SWITCHES, SWITCHES)
    tried = 0
    for active, pre_norm, output_dim, learned, normed in rest:
        if (active == "hi" and not pre_norm) or (output_dim and tie != "untied"):
            continue  # refused; upstream cannot
        flags = {**TIES[tie], "layernorm_embedding": normed, **both(normalize_before=pre_norm, learned_pos=learned)}
        if stacked:
            flags.update(encoder_recurrent_stacking=3, decoder_recurrent_stacking=2)
        if factorized:
            flags.update(both(factorized_embed_dim=K))
        if active:
            flags.update(adapters(), activate_encoder_adapter=active, activate_decoder_adapter=active)
        if output_dim:
            flags.update(decoder_output_dim=12)
        args = settings(layers=2, **flags)
        model, extensions = student_of(args)
        plain, weights, _ = exported(args, model, extensions)
        assert difference(model, plain) < 1e-9, flags
        if tie == "untied" and (factorized or output_dim):
            plain, _, found = exported(args, model, extensions, one_projection=True)
            assert found["decoder_output_dim"] == WIDTH
            assert difference(model, plain) < 1e-9, flags
        single = model.float()
        plain, _, _ = exported(args, single, extensions, torch.float32)
        found = difference(single, plain)
        assert found < 2e-5, flags
        if not factorized and active != "hi":
            assert found == 0, "bit-equal where nothing is multiplied out"
        assert not any("adapter" in name or ".up." in name or ".down." in name for name in weights)
        tried += 1
    assert tried == (5 * 8 if tie == "untied" else 5 * 4)


@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_an_adapter_of_the_models_other_activations(activation):
    args = settings(activation_fn=activation, adapter_activation_fn=activation, **both(normalize_before=True),
                    **adapters(train="ta"))  # fmt: skip
    model, extensions = student_of(args, torch.float32)
    plain, _, found = exported(args, model, extensions, torch.float32)
    assert found["encoder_layers"] == found["decoder_layers"] == 4
    assert difference(model, plain) < 2e-5
    model.activate_adapter()
    assert difference(model, plain) > 1e-2, "the trained adapter is the one that is written"


def test_an_adapter_wider_than_the_feed_forward_part():
    args = settings(**both(normalize_before=True), **adapters(train="hi", factor=1))
    args.encoder_ffn_embed_dim = 5
    model, extensions = student_of(args)
    plain, _, found = exported(args, model, extensions)
    assert (found["encoder_ffn_embed_dim"], found["decoder_ffn_embed_dim"]) == (WIDTH, FFN)
    assert difference(model, plain) < 1e-9


def test_adapters_of_one_side_alone():
    args = settings(**both(normalize_before=True), **adapters(), activate_encoder_adapter="hi")
    model, extensions = student_of(args)
    plain, _, found = exported(args, model, extensions)
    assert (found["encoder_layers"], found["decoder_layers"]) == (4, 2)
    assert difference(model, plain) < 1e-9


def test_products_are_rounded_once():
    args = settings(**both(factorized_embed_dim=K))
    model, extensions = student_of(args, torch.float32)
    weights, _ = upstream_weights(model.state_dict(), extensions, torch.float32)
    table = model.encoder.embed_tokens
    exact = table.weight.double() @ table.up.weight.double().t()
    assert torch.equal(weights["encoder.embed_tokens.weight"], exact.float())


def test_an_untied_projection_keeps_its_factors_and_tied_ones_are_one_table():
    untied = settings(**both(factorized_embed_dim=K))
    weights, _ = upstream_weights(*_parts(untied), torch.float32)
    assert weights["decoder.output_projection.weight"].shape == (30, K)
    assert weights["decoder.project_out_dim.weight"].shape == (K, WIDTH)
    tied = settings(share_all_embeddings=True, **both(factorized_embed_dim=K))
    weights, _ = upstream_weights(*_parts(tied), torch.float32)
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")
    assert len({weights[name].data_ptr() for name in names}) == 1


def test_stacked_layers_are_one_storage():
    weights, _ = upstream_weights(*_parts(settings(**both(recurrent_stacking=4))), torch.float32)
    pointers = {weights[f"decoder.layers.{i}.fc1.weight"].data_ptr() for i in range(4)}
    assert len(pointers) == 1


def _parts(args):
    model, extensions = student_of(args, torch.float32)
    return model.state_dict(), extensions


def test_settings_have_no_trace_of_the_project():
    args = settings(kd_rate=0.5, teacher_checkpoint_path="teacher.pt", torch_compile=True, data="x",
                    **both(normalize_before=True, recurrent_stacking=3, factorized_embed_dim=K), **adapters(train="hi"),
                    share_all_embeddings=True)  # fmt: skip
    model, extensions = student_of(args, torch.float32)
    _, weights, found = exported(args, model, extensions, torch.float32)
    task = OmegaConf.structured(TranslationConfig(source_lang="src", target_lang="tgt"))
    groups = checkpoint_settings(found, task, "data")
    words = re.compile("kd|teacher|adapter|stacking|factorized|transformer_|torch_compile|sanity|liberally")
    assert not [text for text in _texts(groups) if words.search(text)]
    assert not [name for name in weights if words.search(name)]
    assert groups["model"]["arch"] == groups["model"]["_name"] == groups["model"].arch == "transformer"
    assert groups["task"]["_name"] == groups["model"].task == "translation"


def _texts(groups):
    """Every name and every text in settings."""
    for key, value in groups.items():
        yield key
        if isinstance(value, dict):
            yield from _texts({**value, **vars(value)} if hasattr(value, "__dict__") else value)
        elif isinstance(value, str):
            yield value
