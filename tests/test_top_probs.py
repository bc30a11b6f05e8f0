"""Distributions by their most probable words, against their definition word by word; their loss against autograd's."""

import pytest
import torch
from torch.nn import functional as F

from kd_ext.modules import chunked_logits
from kd_ext.modules.chunked_logits import GivenLogits, LinearLogits
from kd_ext.modules.chunked_loss import Weights, chunked_loss
from kd_ext.modules.top_probs import TopProbs, top_probs

N, V, D = 23, 37, 8
DOUBLE = {"rtol": 1e-10, "atol": 1e-10}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_definition(probs, k):
    """Dense distributions that keep the `k` most probable words of `probs` and share the rest among the others."""
    out = torch.empty_like(probs)
    for i, row in enumerate(probs.tolist()):
        order = sorted(range(len(row)), key=row.__getitem__, reverse=True)
        rest = 1 - sum(row[word] for word in order[:k])
        for rank, word in enumerate(order):
            out[i, word] = row[word] if rank < k else rest / (len(row) - k)
    return out


@pytest.mark.parametrize("k", [1, 5, V - 1, V])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("rows", [1, 4, N, None])
def test_keeps_the_most_probable_words(k, temperature, rows):
    teachers = [LinearLogits(randn(N, D, seed=1), randn(V, D, seed=2), randn(V, seed=3))]
    teachers += [GivenLogits(F.log_softmax(randn(N, V, seed=4), dim=1))]
    for some in (teachers[:1], teachers[1:], teachers):
        probs = sum(F.softmax(teacher.logits() / temperature, dim=1) for teacher in some) / len(some)
        found = top_probs(some, k, temperature, rows)
        assert found.words.shape == found.probs.shape == (N, k)
        assert found.words.dtype == torch.int64
        expected = by_definition(probs, k)
        torch.testing.assert_close(found.dense(), expected, **DOUBLE)
        torch.testing.assert_close(found.entropy(), -(expected * expected.log()).sum(1), **DOUBLE)
        if k == V:
            torch.testing.assert_close(found.dense(), probs, **DOUBLE)


def test_rounding_leaves_no_negative_share():
    listed = TopProbs(torch.tensor([[0, 1]]), torch.tensor([[0.75, 0.25000003]]), 5)
    assert listed.dense().tolist() == [[0.75, pytest.approx(0.25), 0, 0, 0]]
    assert listed.entropy().isfinite().all()


SELECTIONS = {"all": lambda i: i >= 0, "some": lambda i: i % 3 == 1, "none": lambda i: i < 0}
WEIGHTS = {"word_seq_level": (0.7, 0.3), "word_level": (0.0, 1.0), "selective": (1.0, 1.0)}


def problem(k, selection, dtype=torch.float64, bias=True, n=N):
    parts = [randn(n, D, seed=5), randn(V, D, seed=6), randn(V, seed=7) if bias else None]
    student = LinearLogits(*(None if x is None else x.to(dtype).requires_grad_() for x in parts))
    target = torch.randint(V, (n,), generator=torch.Generator().manual_seed(8))
    selected = SELECTIONS[selection](torch.arange(n))
    teacher = top_probs([GivenLogits(2 * randn(n, V, seed=9)[selected])], k) if selected.any() else None
    if teacher is None:
        teacher = TopProbs(torch.empty(0, k, dtype=torch.int64), torch.empty(0, k, dtype=torch.float64), V)
    return student, target, selected, teacher


def plain(student, target, selected, teacher, weights):
    """The loss, the cross-entropy and the divergence of the selected tokens, from every word's log-probability."""
    T = weights.temperature
    log_probs = F.log_softmax(student.logits(), dim=1)
    smooth = torch.full_like(log_probs, weights.epsilon / (V - 1))
    smooth.scatter_(1, target.unsqueeze(1), 1 - weights.epsilon)
    q = by_definition(teacher.dense(), teacher.words.size(1)).to(log_probs.dtype)
    at_t = F.log_softmax(student.logits()[selected] / T, dim=1)
    cross_entropy = -(T**2) * (q * at_t).sum(1)
    loss = -weights.golden * (smooth * log_probs).sum() + weights.distilled * cross_entropy.sum()
    return loss, cross_entropy, T**2 * (q * (q.log() - at_t)).sum(1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("k", [1, 6, V])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_equals_the_plain_formulation(dtype, tolerance, k, weights, selection, temperature):
    close = {"rtol": tolerance, "atol": tolerance}
    for rows, epsilon, bias in ((1, 0.1, True), (5, 0.0, True), (N, 0.1, False), (None, 0.1, True)):
        w = Weights(*WEIGHTS[weights], epsilon, temperature)
        student, target, selected, teacher = problem(k, selection, dtype, bias)
        loss, cross_entropy, kl = plain(student, target, selected, teacher, w)
        result = chunked_loss(student, target, selected, teacher, w, rows)
        torch.testing.assert_close(result.loss, loss, **close)
        torch.testing.assert_close(result.cross_entropy, cross_entropy, **close)
        torch.testing.assert_close(result.kl, kl, **close)
        leaves = [x for x in student if x is not None]
        expected = torch.autograd.grad(3 * loss, leaves)
        for gradient, reference in zip(torch.autograd.grad(3 * result.loss, leaves), expected):
            torch.testing.assert_close(gradient, reference, **close)


def test_blocks_smaller_than_a_chunk(monkeypatch):
    monkeypatch.setattr(chunked_logits, "BLOCK_ELEMENTS", 3 * V)
    weights = Weights(1.0, 1.0, 0.1, 1.0)
    student, target, selected, teacher = problem(6, "some")
    expected = plain(student, target, selected, teacher, weights)[0]
    torch.testing.assert_close(
        chunked_loss(student, target, selected, teacher, weights, rows=8).loss, expected, **DOUBLE
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradcheck(temperature):
    student, target, selected, teacher = problem(4, "some", n=7)
    weights = Weights(0.7, 0.3, 0.1, temperature)

    def loss(features, weight, bias):
        return chunked_loss(LinearLogits(features, weight, bias), target, selected, teacher, weights, rows=3).loss

    assert torch.autograd.gradcheck(loss, tuple(student))
