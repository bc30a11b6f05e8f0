"""The small parts: losses in float64, tags, the teacher."""

import numpy as np
import pytest
import torch
from kd_oracle import softmax
from torch import nn
from torch.nn import functional as F

from kd_ext.modules.chunked_logits import LinearLogits
from kd_ext.modules.distillation_loss import distillation_term, label_smoothed_nll
from kd_ext.modules.positions import Positions
from kd_ext.modules.teacher import Teacher


@pytest.mark.parametrize("temperature", [1.0, 0.7, 4.0])
def test_distillation_term_in_float64(temperature):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 9, 30)) * 3
    logits = torch.tensor(student, requires_grad=True)
    q = np.stack([softmax(row, temperature) for row in teacher])
    term = distillation_term(logits.log_softmax(1), torch.tensor(q), temperature)
    term.cross_entropy.sum().backward()
    for i in range(9):
        p = softmax(student[i], temperature)
        assert term.cross_entropy[i].item() == pytest.approx(-(q[i] * np.log(p)).sum() * temperature**2, rel=1e-12)
        assert term.kl[i].item() == pytest.approx((q[i] * np.log(q[i] / p)).sum() * temperature**2, rel=1e-10)
        np.testing.assert_allclose(logits.grad[i], temperature * (p - q[i]), atol=1e-12)
    assert not term.kl.requires_grad


def test_kl_is_zero_for_equal_distributions_and_for_certain_teachers():
    log_probs = torch.randn(4, 8).log_softmax(1)
    assert distillation_term(log_probs, log_probs.exp()).kl.abs().max() < 1e-6
    certain = torch.eye(8)[:4]  # probabilities of 0: 0 log 0 is 0
    term = distillation_term(log_probs, certain)
    torch.testing.assert_close(term.kl, term.cross_entropy)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.3])
def test_label_smoothed_nll_is_a_cross_entropy(eps):
    log_probs = torch.randn(5, 11, dtype=torch.float64).log_softmax(1)
    target = torch.tensor([0, 3, 10, 3, 5])
    smooth = torch.full((5, 11), eps / 10, dtype=torch.float64)
    smooth[range(5), target] = 1 - eps
    smoothed, nll = label_smoothed_nll(log_probs, target, eps)
    torch.testing.assert_close(smoothed, -(smooth * log_probs).sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(nll, -log_probs[range(5), target], rtol=1e-12, atol=0)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.layer(x)), None

    def get_normalized_probs(self, net_output, log_probs):
        return net_output[0].log_softmax(-1)


def test_teacher_is_frozen_and_chooses_rows():
    models = [Linear(), Linear()]
    teacher = Teacher(models)
    assert not any(p.requires_grad for m in models for p in m.parameters())
    assert not any(m.training for m in models)
    x, rows = torch.randn(2, 4, 3), torch.rand(2, 4) > 0.4
    probs = teacher.probs({"net_input": {"x": x}}, Positions(rows), temperature=2.0)
    expected = sum((m.layer(x) / 2).softmax(-1) for m in models) / 2
    torch.testing.assert_close(probs, expected[rows].detach())
    assert not probs.requires_grad
    assert not probs.is_inference()  # autograd may keep it


def test_teacher_takes_the_students_dtype():
    models = [Linear(), Linear()]
    Teacher(models).place(torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for m in models for p in m.parameters()} == {torch.bfloat16}


class Features(nn.Module):
    def forward(self, features, features_only):
        return features, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teachers_softmax_is_of_float32(dtype):
    """In the plain formulation, with a teacher that gives features: nothing but its logits is rounded."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 8, generator=generator).to(dtype)
    weights = [torch.randn(300, 8, generator=generator).to(dtype) for _ in range(2)]
    projections = [lambda x, weight=weight: LinearLogits(x, weight) for weight in weights]
    mask = torch.ones(2, 5, dtype=torch.bool)
    sample = {"net_input": {"features": features}}
    found = Teacher([Features(), Features()], projections).probs(sample, Positions(mask), 2.0)
    logits = [F.linear(features.flatten(0, 1), weight).double() for weight in weights]
    expected = sum((x / 2.0).softmax(1) for x in logits) / 2
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-8)
