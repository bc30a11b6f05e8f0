"""A teacher's cross-attention by torch's fused kernel, against fairseq's own products."""

import inspect

import pytest
import torch
from tiny_models import adapters, batch, both, build, randomize
from torch.nn import functional as F

from kd_ext.teachers.fused_attention import fuse_cross_attention

MODELS = {
    "upstream": ("transformer", {}),
    "pre-norm": ("transformer", both(normalize_before=True)),
    "sides of two widths": ("transformer", {"encoder_embed_dim": 32}),
    "everything": ("transformer_ext", {**adapters(train="hi"), **both(recurrent_stacking=3, factorized_embed_dim=4)}),
}


@pytest.mark.parametrize("name", MODELS)
def test_features_stay_what_they_are(monkeypatch, name):
    arch, flags = MODELS[name]
    model = randomize(build(arch, **flags)).double().eval().requires_grad_(False)
    src, prev = batch()
    assert src.eq(1).any()  # padding
    lengths = src.ne(1).sum(1)
    expected, extra = model(src, lengths, prev, features_only=True)
    assert extra["attn"][0] is not None
    calls = []
    original, signature = F.multi_head_attention_forward, inspect.signature(F.multi_head_attention_forward)

    def counted(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments["need_weights"])
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "multi_head_attention_forward", counted)
    model(src, lengths, prev, features_only=True)
    self_attention = len(calls)
    calls.clear()
    fuse_cross_attention(model)
    found, extra = model(src, lengths, prev, features_only=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # fairseq's own softmax is in float32
    assert calls == [False] * (self_attention + model.decoder.num_layers)
    assert extra["attn"] == [None]
