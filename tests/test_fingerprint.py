"""Two models have one fingerprint if and only if they compute the same."""

import torch

from kd_ext.files.fingerprint import model_fingerprint

WEIGHTS = {"encoder.a": torch.arange(6.0).reshape(2, 3), "decoder.b": torch.tensor(1.5), "decoder.c": torch.empty(0)}


def test_what_a_model_computes_with_counts():
    other = torch.arange(6.0).reshape(2, 3)
    other.view(torch.int32)[1, 2] ^= 1  # the last bit of one weight
    changes = [
        {"encoder.a": other},
        {"encoder.a": WEIGHTS["encoder.a"].half()},
        {"encoder.a": WEIGHTS["encoder.a"].reshape(3, 2)},
        {"encoder.a": WEIGHTS["encoder.a"].flip(0)},
        {"decoder.d": torch.zeros(1)},
    ]
    found = [model_fingerprint({**WEIGHTS, **change}) for change in [{}, *changes]]
    assert len(set(found)) == len(found)
    assert all(len(fingerprint) == 16 for fingerprint in found)


def test_nothing_else_counts():
    transposed = WEIGHTS["encoder.a"].t().contiguous().t()  # the same numbers, otherwise in memory
    reordered = {name: WEIGHTS[name].clone() for name in reversed(list(WEIGHTS))}
    never_read = {"encoder.version": torch.ones(1), "decoder.embed_positions._float_tensor": torch.rand(1)}
    dead = {"encoder.layers.0.in_proj_weight": torch.rand(2)}
    for same in (reordered, {**WEIGHTS, "encoder.a": transposed}, {**WEIGHTS, **never_read}, {**WEIGHTS, **dead}):
        assert model_fingerprint(same) == model_fingerprint(WEIGHTS)
