"""Factorized embeddings: counts, ties, scale, and what they do not go with."""

import math

import pytest
import torch
from tiny_models import batch, both, build, dictionary, logits, parameters

from kd_ext.errors import ConfigError
from kd_ext.models.output_projection import find_projection
from kd_ext.modules.factorized_embedding import FactorizedEmbedding, FactorizedProjection

V, D, K = 30, 16, 5
TIED = {"share_decoder_input_output_embed": True}
SHARED = {"share_all_embeddings": True}
FACTORIZED = both(factorized_embed_dim=K)


def body():
    """The parameters that are no embeddings."""
    return parameters(build("transformer_ext")) - 3 * V * D


@pytest.mark.parametrize(("ties", "tables"), [({}, 3), (TIED, 2), (SHARED, 1)])
def test_parameter_count(ties, tables):
    model = build(**FACTORIZED, **ties)
    assert parameters(model) == body() + tables * (V * K + K * D)
    saved = {
        t.data_ptr(): t.numel()
        for n, t in model.state_dict().items()
        if n.split(".")[-1] not in ("version", "_float_tensor")
    }
    assert sum(saved.values()) == parameters(model)


def test_one_side_alone():
    assert parameters(build(decoder_factorized_embed_dim=K, **TIED)) == body() + V * D + V * K + K * D
    assert parameters(build(encoder_factorized_embed_dim=K)) == body() + 2 * V * D + V * K + K * D


@pytest.mark.parametrize("ties", [TIED, SHARED])
def test_tied_logits_are_the_explicit_product(ties):
    model, (src, prev) = build(**FACTORIZED, **ties).eval(), batch()
    features = model(src, src.ne(1).sum(1), prev, features_only=True)[0]
    table = torch.stack([model.decoder.embed_tokens(torch.tensor(i)) for i in range(V)])  # V x D
    torch.testing.assert_close(logits(model, src, prev), torch.einsum("btd,vd->btv", features, table))


def test_untied_logits_are_of_factors_of_their_own():
    model, (src, prev) = build(**FACTORIZED).eval(), batch()
    features = model(src, src.ne(1).sum(1), prev, features_only=True)[0]
    projection = model.decoder.output_projection
    expected = features @ (projection.weight @ projection.down.weight).t()
    torch.testing.assert_close(logits(model, src, prev), expected)


def test_the_model_is_upstreams_with_the_product_as_its_table():
    model, (src, prev) = build(**FACTORIZED, **SHARED).eval(), batch()
    upstream = build("transformer", **SHARED).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    embedding = model.encoder.embed_tokens
    table = embedding.weight @ embedding.up.weight.t()
    state.update(
        {f"{s}.weight": table for s in ("encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection")}
    )
    upstream.load_state_dict(state)
    torch.testing.assert_close(logits(model, src, prev), logits(upstream, src, prev))


@pytest.mark.parametrize(("k", "d"), [(8, 512), (128, 512), (64, 256)])
def test_scaled_embeddings_have_unit_variance_at_the_start(k, d):
    torch.manual_seed(1)
    embedding = FactorizedEmbedding(4000, k, d, padding_idx=1)
    scaled = math.sqrt(d) * embedding(torch.arange(2, 4000))
    assert scaled.var().item() == pytest.approx(1, rel=0.1)
    assert scaled.mean().item() == pytest.approx(0, abs=0.05)


def test_padding_stays_zero():
    model = build(**FACTORIZED)
    src, prev = batch()
    logits(model, src, prev).pow(2).mean().backward()
    embedding = model.encoder.embed_tokens
    assert embedding(torch.tensor([1])).eq(0).all()
    assert embedding.weight.grad[1].eq(0).all()
    assert embedding.weight.grad[src[0, 0]].ne(0).any()


@pytest.mark.parametrize("ties", [{}, TIED, SHARED])
def test_saved_and_loaded(ties):
    one, other = build(seed=1, **FACTORIZED, **ties).eval(), build(seed=2, **FACTORIZED, **ties).eval()
    src, prev = batch()
    assert not torch.allclose(logits(one, src, prev), logits(other, src, prev))
    other.load_state_dict(one.state_dict())
    assert torch.equal(logits(one, src, prev), logits(other, src, prev))
    with pytest.raises(RuntimeError, match="embed_tokens"):
        one.load_state_dict(build("transformer", **ties).state_dict())


WRONG = {
    "as wide": ({"encoder_factorized_embed_dim": 16}, "--encoder-factorized-embed-dim 16: must be .*less than.* 16"),
    "negative": ({"decoder_factorized_embed_dim": -1}, "--decoder-factorized-embed-dim -1: must be over 0"),
    "k": (
        {**SHARED, "decoder_factorized_embed_dim": 4},
        "--encoder-factorized-embed-dim 5 and --decoder-.* 4 must be equal",
    ),
    "d": ({**SHARED, "decoder_embed_dim": 32}, "--encoder-embed-dim 16 and --decoder-embed-dim 32 must be equal"),
    "path": (
        {"encoder_embed_path": "vectors.txt"},
        "--encoder-embed-path vectors.txt: .*--encoder-factorized-embed-dim 5",
    ),
    "adaptive": ({"adaptive_softmax_cutoff": [10]}, "--adaptive-softmax-cutoff .*: not with factorized embeddings"),
    "output": ({**TIED, "decoder_output_dim": 8}, "--decoder-output-dim 8: .*--decoder-embed-dim 16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_flags_are_told_before_training(case):
    flags, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        build(words=dictionary(V), **{**FACTORIZED, **flags})


@pytest.mark.parametrize("ties", [TIED, SHARED, {}])
def test_the_loss_by_chunks_is_given_the_factors(ties):
    model = build(**FACTORIZED, **ties)
    features = torch.randn(5, D)
    linear = find_projection(model)(features)
    assert linear.features.shape == (5, K)
    assert linear.weight.shape == (V, K)
    torch.testing.assert_close(linear.logits(), model.decoder.output_layer(features))


@pytest.mark.parametrize(("k", "d"), [(8, 512), (64, 256)])
def test_logits_of_an_untied_projection_have_unit_variance_at_the_start(k, d):
    """As those of upstream's output layer, of features of unit variance."""
    torch.manual_seed(1)
    logits = FactorizedProjection(d, k, 2000)(torch.randn(200, d))
    assert logits.var().item() == pytest.approx(1, rel=0.2)
