"""Models of a few thousand parameters, built in this process from the flags of an architecture."""

from argparse import Namespace
from types import SimpleNamespace

import torch
from fairseq import models
from fairseq.data import Dictionary

import kd_ext  # noqa: F401

SIDES = ("encoder", "decoder")
WIDTH, FFN, HEADS = 16, 24, 2


def dictionary(size=30):
    words = Dictionary()
    while len(words) < size:
        words.add_symbol(f"w{len(words)}")
    return words


def settings(arch="transformer_ext", layers=2, **flags):
    """The Namespace that fairseq-train would give to ``build_model``."""
    sizes = {}
    for side in SIDES:
        sizes.update({f"{side}_embed_dim": WIDTH, f"{side}_ffn_embed_dim": FFN, f"{side}_layers": layers})
        sizes[f"{side}_attention_heads"] = HEADS
    return Namespace(**{"arch": arch, "_name": arch, "dropout": 0.0, **sizes, **flags})


def both(**flags):
    """`flags` for either side."""
    return {f"{side}_{name}": value for side in SIDES for name, value in flags.items()}


def adapters(ids="hi,ta", train=None, factor=2, gated=False):
    """The adapter flags for either side."""
    return both(
        add_adapters=True,
        adapter_ids=ids,
        adapter_reduction_factor=factor,
        train_adapter=train,
        adapter_use_gating=gated,
    )


def build(arch="transformer_ext", seed=1, words=None, **flags):
    return build_from(settings(arch, **flags), seed, words)


def build_from(args, seed=1, words=None):
    words = words or dictionary()
    torch.manual_seed(seed)
    return models.build_model(args, SimpleNamespace(source_dictionary=words, target_dictionary=words))


def randomize(model, seed=7):
    """Values far from the initial ones for every adapter: at the start they do nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def batch(seed=3, sentences=4, source=7, target=6, words=30):
    """Source tokens with padding on the left, previous target tokens without."""
    generator = torch.Generator().manual_seed(seed)
    src = torch.randint(4, words, (sentences, source), generator=generator)
    for i in range(1, sentences):
        src[i, : i % source] = 1
    prev = torch.randint(4, words, (sentences, target), generator=generator)
    prev[:, 0] = 2
    return src, prev


def logits(model, src, prev):
    """The full pass: B x T x V."""
    return model(src, src.ne(1).sum(1), prev)[0]


def parameters(model):
    return sum(p.numel() for p in model.parameters())
