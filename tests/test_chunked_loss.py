"""The loss by chunks against the plain formulation, which holds all logits and lets autograd differentiate it."""

import pytest
import torch
from conftest import needs_half
from torch.nn import functional as F

from kd_ext.modules import chunked_logits
from kd_ext.modules.chunked_logits import GivenLogits, LinearLogits
from kd_ext.modules.chunked_loss import Weights, chunked_loss, chunked_nll
from kd_ext.modules.distillation_loss import distillation_term, label_smoothed_nll

N, V, D = 23, 37, 8
SELECTIONS = {
    "all": lambda i: i >= 0,
    "some": lambda i: i % 3 == 1,
    "none": lambda i: i < 0,
}
# golden, distilled, as the strategies weigh them
WEIGHTS = {"word_seq_level": (0.7, 0.3), "word_level": (0.0, 1.0), "selective": (1.0, 1.0), "alpha=0": (1.0, 0.0)}

MASKED = [("masked",), ("masked by its bias",), ("masked", "linear"), ("masked", "masked")]  # words that cannot be


def make(dtype=torch.float64, bias=True, teachers=("linear",), selection="some", seed=0, n=N):
    """A student of leaf tensors, targets, selection, teachers."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    student = [randn(n, D), randn(V, D), randn(V) if bias else None]
    student = LinearLogits(*(None if x is None else x.requires_grad_() for x in student))
    target = torch.randint(V, (n,), generator=generator)
    selected = SELECTIONS[selection](torch.arange(n))
    m = int(selected.sum())
    kinds = {
        "linear": lambda: LinearLogits(randn(m, 5), randn(V, 5)),
        "bias": lambda: LinearLogits(randn(m, 5), randn(V, 5), randn(V)),
        "given": lambda: GivenLogits(F.log_softmax(2 * randn(m, V), dim=1)),
        "masked": lambda: GivenLogits(randn(m, V).index_fill(1, torch.tensor([0, 5, V - 1]), -torch.inf)),
        "masked by its bias": lambda: LinearLogits(
            randn(m, 5), randn(V, 5), randn(V).index_fill(0, torch.tensor(3), -torch.inf)
        ),
    }
    return student, target, selected, [kinds[kind]() for kind in teachers]


def plain(student, target, selected, teachers, weights):
    dtype = torch.promote_types(student.features.dtype, torch.float32)
    student = LinearLogits(*(None if x is None else x.to(dtype) for x in student))
    log_probs = F.log_softmax(student.logits(), dim=1)
    smoothed, nll = label_smoothed_nll(log_probs, target, weights.epsilon)
    loss = weights.golden * smoothed.sum()
    term = None
    if teachers:
        as_dtype = [type(teacher)(*(None if x is None else x.to(dtype) for x in teacher)) for teacher in teachers]
        probs = sum(F.softmax(teacher.logits() / weights.temperature, dim=1) for teacher in as_dtype) / len(teachers)
        term = distillation_term(log_probs[selected], probs, weights.temperature)
        loss = loss + weights.distilled * term.cross_entropy.sum()
    return loss, nll, term, log_probs.argmax(1) == target


def leaves(student):
    return [x for x in student if x is not None]


def check(rows, tolerance, weights, **settings):
    student, target, selected, teachers = make(**settings)
    loss, nll, term, correct = plain(student, target, selected, teachers, weights)
    result = chunked_loss(student, target, selected, teachers, weights, rows)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(result.loss, loss, **close)
    torch.testing.assert_close(result.nll, nll, **close)
    torch.testing.assert_close(chunked_nll(student, target, rows), nll.detach(), **close)
    assert torch.equal(result.correct, correct)
    if term is not None:
        torch.testing.assert_close(result.cross_entropy, term.cross_entropy, **close)
        torch.testing.assert_close(result.kl, term.kl, **close)
    expected = torch.autograd.grad(3 * loss, leaves(student))
    gradients = torch.autograd.grad(3 * result.loss, leaves(student))
    for gradient, leaf, reference in zip(gradients, leaves(student), expected):
        assert gradient.dtype == leaf.dtype
        torch.testing.assert_close(gradient, reference, **close)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rows", [1, 5, N, None])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("teachers", [("linear",), ("bias",), ("given",), ("linear", "given", "bias"), *MASKED])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_the_plain_formulation(dtype, tolerance, rows, weights, selection, teachers, temperature):
    for bias, epsilon in ((True, 0.1), (False, 0.0)):
        check(
            rows,
            tolerance,
            Weights(*WEIGHTS[weights], epsilon, temperature),
            dtype=dtype,
            bias=bias,
            teachers=teachers,
            selection=selection,
        )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_blocks_smaller_than_a_chunk(monkeypatch, temperature):
    """As they are with a real vocabulary; the last block of a chunk is smaller."""
    monkeypatch.setattr(chunked_logits, "BLOCK_ELEMENTS", 3 * V)
    for teachers in (("linear",), ("linear", "bias")):
        check(8, 1e-10, Weights(1.0, 1.0, 0.1, temperature), teachers=teachers)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_gradcheck(selection, temperature):
    student, target, selected, teachers = make(n=7, selection=selection)
    weights = Weights(0.7, 0.3, 0.1, temperature)

    def loss(features, weight, bias):
        return chunked_loss(LinearLogits(features, weight, bias), target, selected, teachers, weights, rows=3).loss

    assert torch.autograd.gradcheck(loss, tuple(student))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=needs_half), torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype):
    """Nothing is rounded but the gradients, once: as the float32 formulation, given the same numbers."""
    weights = Weights(0.5, 0.5, 0.1, 1.0)
    settings = {"dtype": dtype, "n": 600, "teachers": ("linear", "given")}
    student, target, selected, teachers = make(**settings)
    loss, nll, term, _ = plain(student, target, selected, teachers, weights)
    result = chunked_loss(student, target, selected, teachers, weights, rows=64)
    assert result.loss.dtype == result.nll.dtype == torch.float32
    torch.testing.assert_close(result.loss, loss)
    torch.testing.assert_close(result.nll, nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.cross_entropy, term.cross_entropy, rtol=1e-5, atol=1e-5)
    in_float32 = LinearLogits(*(x.detach().float().requires_grad_() for x in student))
    expected = torch.autograd.grad(plain(in_float32, target, selected, teachers, weights)[0], leaves(in_float32))
    for gradient, reference in zip(torch.autograd.grad(result.loss, leaves(student)), expected):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.float(), reference, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_small_gradients_do_not_underflow_before_they_are_scaled():
    """float16 has nothing below 6e-8: the scale of the loss must come before the dtype."""
    scale = 2.0**12
    features = torch.full((4, 2), 1e-5, dtype=torch.float16)
    weight = (torch.arange(8.0).reshape(4, 2) / 64).half().requires_grad_()
    student, target = LinearLogits(features, weight), torch.tensor([0, 1, 2, 3])
    weights, nothing = Weights(1e-3, 0.0, 0.0, 1.0), torch.zeros(4, dtype=torch.bool)
    result = chunked_loss(student, target, nothing, [], weights)
    (gradient,) = torch.autograd.grad(scale * result.loss, weight)
    in_float32 = LinearLogits(features.float(), weight.detach().float().requires_grad_())
    (expected,) = torch.autograd.grad(plain(in_float32, target, nothing, [], weights)[0], in_float32.weight)
    assert (expected.abs().half() == 0).all()  # what casting first would give
    torch.testing.assert_close(gradient.float(), scale * expected, rtol=2e-3, atol=6e-8)


def test_gradients_accumulate_over_batches_and_both_ends_of_a_tied_embedding():
    weights = Weights(0.5, 0.5, 0.1, 1.0)
    torch.manual_seed(0)
    embedding = torch.randn(V, D, dtype=torch.float64, requires_grad=True)

    def step(function):
        embedding.grad = None
        for seed in (1, 2):
            _, target, selected, teachers = make(seed=seed)
            features = torch.tanh(F.embedding(target.roll(1), embedding))
            function(LinearLogits(features, embedding), target, selected, teachers).backward()
        return embedding.grad

    lean = step(lambda *batch: chunked_loss(*batch, weights, rows=5).loss)
    reference = step(lambda *batch: plain(*batch, weights)[0])
    torch.testing.assert_close(lean, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_backward_twice(scale):
    """The second finds what the first found, whatever became of its gradients."""
    student, target, selected, teachers = make()
    loss = scale * chunked_loss(student, target, selected, teachers, Weights(0.5, 0.5, 0.1, 1.0)).loss
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in student]
    for x in student:
        x.grad.zero_()
    loss.backward()
    for x, gradient in zip(student, first):
        assert gradient.any()
        assert torch.equal(x.grad, gradient)


def test_the_gradients_of_an_unscaled_loss_are_not_copied():
    student, target, selected, teachers = make(selection="all")
    loss = chunked_loss(student, target, selected, teachers, Weights(0.5, 0.5, 0.1, 1.0)).loss
    made = [x.data_ptr() for x in loss.grad_fn.saved_tensors]
    loss.backward()
    assert [x.grad.data_ptr() for x in student] == made


def test_frozen_tensors_get_no_gradient():
    student, target, selected, teachers = make()
    frozen = LinearLogits(student.features, student.weight.detach(), student.bias.detach())
    weights = Weights(0.5, 0.5, 0.1, 1.0)
    (gradient,) = torch.autograd.grad(chunked_loss(frozen, target, selected, teachers, weights).loss, frozen.features)
    (expected,) = torch.autograd.grad(plain(student, target, selected, teachers, weights)[0], student.features)
    torch.testing.assert_close(gradient, expected)


def test_no_tokens():
    student, target, selected, teachers = make(n=0)
    result = chunked_loss(student, target, selected, teachers, Weights(1.0, 1.0, 0.1, 1.0))
    result.loss.backward()
    assert result.loss.item() == 0
    assert not student.weight.grad.any()


class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, torch.Tensor) and x._base is None:
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("teachers", [("linear",), ("linear", "bias")])
def test_holds_no_more_than_a_chunk_of_logits(teachers):
    student, target, selected, teachers = make(n=500, teachers=teachers)
    with Shapes() as shapes:
        chunked_nll(student, target, rows=16)
        chunked_loss(student, target, selected, teachers, Weights(1.0, 1.0, 0.1, 1.0), rows=16).loss.backward()
    assert shapes.largest <= max(16 * V, 500 * D)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_row_that_is_longer_than_a_block(monkeypatch, temperature):
    """A vocabulary of more words than BLOCK_ELEMENTS: blocks of one row."""
    monkeypatch.setattr(chunked_logits, "BLOCK_ELEMENTS", V - 1)
    for teachers in (("linear",), ("linear", "bias")):
        check(8, 1e-10, Weights(1.0, 1.0, 0.1, temperature), teachers=teachers)
