"""Distillation and label-smoothed cross-entropy from features, without a matrix of all tokens by all words.

Both terms are cross-entropies of the student against known distributions, so the gradient of the logits is a
difference of distributions, which can be written down as soon as the logits are there. It is multiplied back to the
features and to the projection at once, a chunk of tokens at a time, and the logits are forgotten: the gradient is
made in the forward pass (Hsu et al., 2024: Liger Kernel). What is left for the backward pass is a multiplication by
the gradient that comes in.
"""

from math import ceil, log2
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_ext.modules.chunked_logits import (
    LinearLogits,
    LogitChunks,
    TeacherChunks,
    TeacherLogits,
    blocks,
    chunk_rows,
    spans,
)


class Weights(NamedTuple):
    """What the loss of a token is: ``golden * smoothed_i + distilled * kd_i``, the latter where it is selected.

    Attributes:
        golden: weight of the label-smoothed term, at least 0
        distilled: weight of the distillation term, at least 0
        epsilon: of the label smoothing, in [0, 1)
        temperature: T of both softmaxes of the distillation term, which is multiplied by T^2
    """

    golden: float
    distilled: float
    epsilon: float
    temperature: float


class ChunkedLoss(NamedTuple):
    """The loss of ``n`` tokens, of which ``m`` are selected. Only `loss` has a gradient.

    Everything is in nats and float32, float64 where the features are.

    Attributes:
        loss: the weighted sum over the tokens, a scalar
        nll: negative log-likelihood of each token, shape ``(n,)``
        cross_entropy: -sum_v q_v log p_v times T^2 of each selected token, shape ``(m,)``
        kl: the same less the teacher's entropy, shape ``(m,)``
        correct: whether no word is more probable than the target, shape ``(n,)``, bool
    """

    loss: Tensor
    nll: Tensor
    cross_entropy: Tensor
    kl: Tensor
    correct: Tensor


def chunked_loss(
    student: LinearLogits,
    target: Tensor,
    selected: Tensor,
    teachers: Sequence[TeacherLogits],
    weights: Weights,
    rows: Optional[int] = None,
) -> ChunkedLoss:
    """Loss, gradient and metrics in one pass over chunks of tokens.

    Computes in float32 whatever the inputs' dtype, float64 inputs in float64. Never holds more than `rows` rows of V
    elements of the student, and of one teacher (of two where there are several).

    Args:
        student: of n tokens; gradients go to its features, weight and bias as far as they require them
        target: shape ``(n,)``, int64
        selected: which tokens are distilled: shape ``(n,)``, bool, m true
        teachers: each of the m selected tokens, in their order; their probabilities are averaged
        weights: of the terms
        rows: tokens in a chunk; None: as measured to be fast
    """
    features, weight, bias = _as_autocast(student)
    count = int(selected.sum())
    is_mixed = 0 < count < target.numel()
    if is_mixed:  # the selected tokens first: the chunks after them need no teacher
        order = torch.cat([selected.nonzero(), (~selected).nonzero()]).squeeze(1)
        features, target = features[order], target[order]
    out = _ChunkedLoss.apply(features, weight, bias, target, count, list(teachers), weights, rows or chunk_rows(weight))
    loss, nll, cross_entropy, kl, correct = out
    if is_mixed:
        nll, correct = (torch.empty_like(x).index_copy_(0, order, x) for x in (nll, correct))
    return ChunkedLoss(loss, nll, cross_entropy, kl, correct)


@torch.no_grad()
def chunked_nll(student: LinearLogits, target: Tensor, rows: Optional[int] = None) -> Tensor:
    """Negative log-likelihood of each token, without gradient: what gates are made of.

    Args:
        student: of n tokens
        target: shape ``(n,)``, int64
        rows: tokens in a chunk; None: as measured to be fast

    Returns:
        shape ``(n,)``, nats, float32 (float64 where the features are)
    """
    student = _as_autocast(student)
    with torch.autocast(target.device.type, enabled=False):
        source = LogitChunks(student)
        nll = target.new_empty(target.size(0), dtype=source.product.dtype)
        for start, stop in spans(0, target.size(0), rows or chunk_rows(student.weight)):
            logits = source.rows(start, stop)
            for block in blocks(logits):
                at = slice(start + block.start, start + block.stop)
                z = logits[block]
                z.sub_(z.amax(1, keepdim=True))
                at_target = z.gather(1, target[at].unsqueeze(1)).squeeze(1)
                nll[at] = z.exp_().sum(1).log_() - at_target
    return nll


def _as_autocast(logits: LinearLogits) -> LinearLogits:
    """The tensors in the dtype in which automatic mixed precision would multiply them."""
    if not (logits.features.is_cuda and torch.is_autocast_enabled()):
        return logits
    dtype = torch.get_autocast_gpu_dtype()
    bias = None if logits.bias is None else logits.bias.to(dtype)
    return LinearLogits(logits.features.to(dtype), logits.weight.to(dtype), bias)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        target: Tensor,
        count: int,
        teachers: List[TeacherLogits],
        weights: Weights,
        rows: int,
    ) -> Tuple[Tensor, ...]:
        student = LinearLogits(features, weight, bias)
        with torch.autocast(target.device.type, enabled=False):
            run = _ForwardPass(student, target, teachers, weights, ctx.needs_input_grad[:3])
            for start, stop in spans(0, count, rows):
                run.chunk(start, stop, is_distilled=True)
            for start, stop in spans(count, target.numel(), rows):
                run.chunk(start, stop, is_distilled=False)
            out = run.finish(count)
        ctx.save_for_backward(*run.gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in student]
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> Tuple[Optional[Tensor], ...]:
        # The scale of the loss first, in float32, and then the dtype: else small gradients underflow in float16.
        # A scale of one, asked for where that waits for no device, spares a second copy of them.
        is_scaled = gradient.device.type != "cpu" or float(gradient) != 1
        scaled = [x * gradient if x is not None and is_scaled else x for x in ctx.saved_tensors]
        gradients = [None if x is None else x.to(dtype) for x, dtype in zip(scaled, ctx.dtypes)]
        return (*gradients, None, None, None, None, None)


class _ForwardPass:
    """What accumulates over the chunks."""

    def __init__(
        self,
        student: LinearLogits,
        target: Tensor,
        teachers: Sequence[TeacherLogits],
        weights: Weights,
        needs_gradient: Sequence[bool],
    ) -> None:
        self._student = LogitChunks(student)
        self._product = self._student.product
        self._teachers = TeacherChunks(teachers, weights.temperature)
        self._target, self._weights, self._bias = target, weights, student.bias
        dtype, n = self._product.dtype, target.numel()
        vectors = target.new_empty(6, n, dtype=dtype)
        # of each token: largest logit, logit of the target word, and the sum of exp(logit - largest)
        self._top, self._at_target, self._total = vectors[:3]
        # of each distilled token: that sum at T, sum_v q_v (logit_v - largest), and the teacher's entropy
        self._total_at_t, self._inner, self._entropy = vectors[3:]
        self.gradients: List[Optional[Tensor]] = [
            torch.zeros_like(x, dtype=dtype) if needed and x is not None else None
            for x, needed in zip(student, needs_gradient)
        ]
        self._scratch: Optional[Tensor] = None
        # The label-smoothed target: every word has probability `floor`, and the right one `peak` more.
        self._floor = weights.epsilon / (student.weight.size(0) - 1)
        self._peak = 1 - weights.epsilon - self._floor
        # The gradient of the logits is at most golden + distilled * T. Where it is multiplied in float16, a power
        # of two makes the most of what that dtype can hold.
        self._scale = 1.0
        largest = weights.golden + weights.distilled * weights.temperature
        if self._product.operand == torch.float16 and largest > 0:
            self._scale = 2.0 ** (15 - ceil(log2(largest)))

    def chunk(self, start: int, stop: int, is_distilled: bool) -> None:
        """Gradients of the tokens from `start` to `stop`, and what their metrics are made of."""
        logits = self._student.rows(start, stop)
        self._at_target[start:stop] = logits.gather(1, self._target[start:stop].unsqueeze(1)).squeeze(1)
        if is_distilled:
            self._teachers.load(start, stop)
        for block in blocks(logits):
            at = slice(start + block.start, start + block.stop)
            if is_distilled:
                self._distilled_block(logits[block], at, block)
            else:
                self._golden_block(logits[block], at)
        if any(x is not None for x in self.gradients):
            self._multiply_back(logits, start, stop)

    def _golden_block(self, z: Tensor, at: slice) -> None:
        """Turn logits ``(rows, V)`` of tokens `at` into the gradient of the label-smoothed term, less its target."""
        z.sub_(torch.amax(z, 1, out=self._top[at]).unsqueeze(1))
        total = torch.sum(z.exp_(), 1, out=self._total[at])
        z.mul_((self._weights.golden / total).unsqueeze(1))

    def _distilled_block(self, z: Tensor, at: slice, block: slice) -> None:
        """The same with the gradient of the distillation term."""
        golden, temperature = self._weights.golden, self._weights.temperature
        factor = self._weights.distilled * temperature  # T^2 of the term, 1 / T of the softmax
        if self._scratch is None or self._scratch.size(0) < z.size(0):
            self._scratch = torch.empty_like(z)
        probs, self._entropy[at], scratch = self._teachers.block(block, self._scratch[: z.size(0)])
        z.sub_(torch.amax(z, 1, out=self._top[at]).unsqueeze(1))
        torch.sum(torch.mul(z, probs, out=scratch), 1, out=self._inner[at])
        if temperature == 1:
            total = torch.sum(z.exp_(), 1, out=self._total[at])
            z.mul_(((golden + factor) / total).unsqueeze(1))
        else:
            at_t = torch.div(z, temperature, out=scratch).exp_()
            total_at_t = torch.sum(at_t, 1, out=self._total_at_t[at])
            total = torch.sum(z.exp_(), 1, out=self._total[at])
            z.mul_((golden / total).unsqueeze(1)).add_(at_t.mul_((factor / total_at_t).unsqueeze(1)))
        z.sub_(probs, alpha=factor)

    def _multiply_back(self, gradient: Tensor, start: int, stop: int) -> None:
        """From the gradient of a chunk's logits, shape ``(rows, V)``, to those of features, weight and bias."""
        of_features, of_weight, of_bias = self.gradients
        if self._weights.golden > 0:
            target = self._target[start:stop].unsqueeze(1)
            peak = gradient.new_full(target.shape, -self._weights.golden * self._peak)
            gradient.scatter_add_(1, target, peak)
        if of_bias is not None:
            of_bias.add_(gradient.sum(0))
        if self._scale != 1:
            gradient.mul_(self._scale)
        operand = gradient.to(self._product.operand)
        if of_features is not None:
            self._product.into(of_features[start:stop], operand, self._student.weight)
        if of_weight is not None:
            self._product.add(of_weight, operand.t(), self._student.features[start:stop], 1 / self._scale)

    def finish(self, count: int) -> ChunkedLoss:
        """The loss and its metrics from what the chunks left; the first `count` tokens are distilled.

        What the floor of the label-smoothed target adds to loss and gradients is added here: it is the same for
        all words, and takes sums of logits that the sums of features and weights give.
        """
        golden, distilled, _, temperature = self._weights
        features, weight, dtype = self._student.features, self._student.weight, self._product.dtype
        log_total = self._total.log()
        nll = log_total - (self._at_target - self._top)
        log_total_at_t = log_total if temperature == 1 else self._total_at_t.log()
        cross_entropy = temperature**2 * (log_total_at_t - self._inner / temperature)[:count]
        kl = cross_entropy - temperature**2 * self._entropy[:count]
        loss = distilled * cross_entropy.sum() + golden * self._peak * nll.sum()
        of_features, of_weight, of_bias = self.gradients
        if of_features is not None and self._scale != 1:
            of_features.div_(self._scale)
        floor = golden * self._floor
        if floor > 0:
            sum_of_weights, sum_of_features = weight.sum(0, dtype=dtype), features.sum(0, dtype=dtype)
            sum_of_logits = torch.dot(sum_of_features, sum_of_weights)
            if self._bias is not None:
                sum_of_logits += features.size(0) * self._bias.sum(dtype=dtype)
            loss = loss + floor * (weight.size(0) * (log_total + self._top).sum() - sum_of_logits)
            if of_features is not None:
                of_features.sub_(sum_of_weights, alpha=floor)
            if of_weight is not None:
                of_weight.sub_(sum_of_features, alpha=floor)
            if of_bias is not None:
                of_bias.sub_(floor * features.size(0))
        return ChunkedLoss(loss, nll, cross_entropy, kl, self._at_target >= self._top)
