"""Distillation and label-smoothed cross-entropy from features, without a matrix of all tokens by all words.

Both terms are cross-entropies of the student against known distributions, so the gradient of the logits is a
difference of distributions, which can be written down as soon as the logits are there. It is multiplied back to the
features and to the projection at once, a chunk of tokens at a time, and the logits are forgotten: the gradient is
made in the forward pass (Hsu et al., 2024: Liger Kernel). What is left for the backward pass is a multiplication by
the gradient that comes in.
"""

from math import ceil, log2
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple, Union

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
    row_kernel_for,
    spans,
)
from kd_ext.modules.parted_logits import PartedChunks, PartedLogits
from kd_ext.modules.positions import true_first
from kd_ext.modules.top_probs import ListedChunks, TopProbs

# What is known of the teacher at m tokens: the logits of each model, or of those of each of several teachers, or the
# words that were found most probable
TeacherOutput = Union[Sequence[TeacherLogits], PartedLogits, TopProbs]


def of_tokens(teacher: TeacherOutput, tokens: Tensor) -> TeacherOutput:
    """What is known at some `tokens`, shape ``(m,)``, int64."""
    if isinstance(teacher, (TopProbs, PartedLogits)):
        return teacher.of(tokens)
    return [logits.of(tokens) for logits in teacher]


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
    teacher: TeacherOutput,
    weights: Weights,
    rows: Optional[int] = None,
    count: Optional[int] = None,
) -> ChunkedLoss:
    """Loss, gradient and metrics in one pass over chunks of tokens.

    Computes in float32 whatever the inputs' dtype, float64 inputs in float64. Never holds more than `rows` rows of V
    elements of the student, and of one teacher (of two where there are several).

    Args:
        student: of n tokens; gradients go to its features, weight and bias as far as they require them
        target: shape ``(n,)``, int64
        selected: which tokens are distilled: shape ``(n,)``, bool, m true
        teacher: of the m selected tokens, in their order; probabilities of several models are averaged, and those that
            are listed are at the temperature already
        weights: of the terms
        rows: tokens in a chunk; None: as measured to be fast
        count: m, where it is known; None: it is counted, for which a GPU has to be waited for
    """
    features, weight, bias = student.as_autocast()
    if isinstance(teacher, PartedLogits):
        teacher = teacher.as_autocast()
    elif not isinstance(teacher, TopProbs):
        teacher = [logits.as_autocast() for logits in teacher]
    count = int(selected.sum()) if count is None else count
    order = None
    if 0 < count < target.numel():  # the selected tokens first: the chunks after them need no teacher
        order = true_first(selected)
    if count > 0 and isinstance(teacher, PartedLogits):  # those of one teacher together
        chosen = teacher.order if order is None else order[:count][teacher.order]
        order = chosen if order is None else torch.cat([chosen, order[count:]])
    if order is not None:
        features, target = features.index_select(0, order), target[order]
    out = _ChunkedLoss.apply(features, weight, bias, target, count, teacher, weights, rows or chunk_rows(weight))
    loss, nll, cross_entropy, kl, correct = out
    if order is not None:
        nll, correct = (torch.empty_like(x).index_copy_(0, order, x) for x in (nll, correct))
    if count > 0 and isinstance(teacher, PartedLogits):
        cross_entropy, kl = (torch.empty_like(x).index_copy_(0, teacher.order, x) for x in (cross_entropy, kl))
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
    student = student.as_autocast()
    with torch.autocast(target.device.type, enabled=False):
        source = LogitChunks(student)
        nll = target.new_empty(target.size(0), dtype=source.product.dtype)
        kernel = row_kernel_for(nll)
        top, at_target, total = nll.new_empty(3, target.size(0)) if kernel else (nll, nll, nll)
        for start, stop in spans(0, target.size(0), rows or chunk_rows(student.weight)):
            logits = source.rows(start, stop)
            if kernel:
                of_rows = [x[start:stop] for x in (top, at_target, total)]
                kernel.run(logits, target[start:stop], of_rows + of_rows)
                continue
            for block in blocks(logits):
                at = slice(start + block.start, start + block.stop)
                z = logits[block]
                z.sub_(z.amax(1, keepdim=True))
                of_target = z.gather(1, target[at].unsqueeze(1)).squeeze(1)
                nll[at] = z.exp_().sum(1).log_() - of_target
        if kernel:
            nll = total.log_() - (at_target - top)
    return nll


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        target: Tensor,
        count: int,
        teacher: TeacherOutput,
        weights: Weights,
        rows: int,
    ) -> Tuple[Tensor, ...]:
        student = LinearLogits(features, weight, bias)
        with torch.autocast(target.device.type, enabled=False):
            run = _ForwardPass(student, target, teacher, weights, ctx.needs_input_grad[:3])
            distilled = teacher.spans(rows) if isinstance(teacher, PartedLogits) else spans(0, count, rows)
            for start, stop in distilled:
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
        teacher: TeacherOutput,
        weights: Weights,
        needs_gradient: Sequence[bool],
    ) -> None:
        self._student = LogitChunks(student)
        self._product = self._student.product
        self._teacher: Union[ListedChunks, PartedChunks, TeacherChunks]
        if isinstance(teacher, TopProbs):
            self._teacher = ListedChunks(teacher.to(target.device, self._product.dtype))
        elif isinstance(teacher, PartedLogits):
            self._teacher = PartedChunks(teacher, weights.temperature)
        else:
            self._teacher = TeacherChunks(teacher, weights.temperature)
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
        # a teacher that is several needs all of its probabilities, and a list that is long is no list
        fits = self._teacher.fits_row_kernel
        self._kernel: Any = row_kernel_for(vectors) if fits else None
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
        if is_distilled:
            self._teacher.load(start, stop)
        if self._kernel:
            gradient = self._run_kernel(logits, start, stop, is_distilled)
        else:
            gradient = self._in_blocks(logits, start, stop, is_distilled)
        if gradient is not None:
            self._multiply_back(gradient, start, stop)

    @property
    def _needs_gradient(self) -> bool:
        return any(x is not None for x in self.gradients)

    def _run_kernel(self, logits: Tensor, start: int, stop: int, is_distilled: bool) -> Optional[Tensor]:
        """The gradient of the logits, shape ``(rows, V)``, in the operands' dtype; None if nobody needs it.

        It is made in the memory of the logits.
        """
        weights, gradient = self._weights, None
        if self._needs_gradient:  # in the memory of the logits, of half precision in the first half of each row
            gradient = logits.view(self._product.operand)[:, : logits.size(1)]
        of_rows = (self._top, self._at_target, self._total, self._total_at_t, self._inner, self._entropy)
        known = self._teacher.of_rows(start, stop) if is_distilled else {}
        self._kernel.run(
            logits,
            self._target[start:stop],
            [x[start:stop] for x in of_rows],
            gradient,
            golden=weights.golden,
            factor=weights.distilled * weights.temperature if is_distilled else 0.0,
            peak=self._peak,
            temperature=weights.temperature,
            scale=self._scale,
            **known,
        )
        if is_distilled and isinstance(self._teacher, ListedChunks):
            self._entropy[start:stop] = self._teacher.entropy(start, stop)
        return gradient

    def _in_blocks(self, logits: Tensor, start: int, stop: int, is_distilled: bool) -> Optional[Tensor]:
        """The same by torch's operations, in the memory of the logits."""
        self._at_target[start:stop] = logits.gather(1, self._target[start:stop].unsqueeze(1)).squeeze(1)
        for block in blocks(logits):
            at = slice(start + block.start, start + block.stop)
            if is_distilled:
                self._distilled_block(logits[block], at, block)
            else:
                self._golden_block(logits[block], at)
        if not self._needs_gradient:
            return None
        if self._weights.golden > 0:
            target = self._target[start:stop].unsqueeze(1)
            peak = logits.new_full(target.shape, -self._weights.golden * self._peak)
            logits.scatter_add_(1, target, peak)
        if self._scale != 1:
            logits.mul_(self._scale)
        return logits.to(self._product.operand)

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
        teacher = self._teacher.block(block, self._scratch[: z.size(0)])
        z.sub_(torch.amax(z, 1, out=self._top[at]).unsqueeze(1))
        self._entropy[at], self._inner[at] = teacher.entropy, teacher.expectation(z)
        if temperature == 1:
            total = torch.sum(z.exp_(), 1, out=self._total[at])
            z.mul_(((golden + factor) / total).unsqueeze(1))
        else:
            at_t = torch.div(z, temperature, out=teacher.scratch).exp_()
            total_at_t = torch.sum(at_t, 1, out=self._total_at_t[at])
            total = torch.sum(z.exp_(), 1, out=self._total[at])
            z.mul_((golden / total).unsqueeze(1)).add_(at_t.mul_((factor / total_at_t).unsqueeze(1)))
        teacher.subtract_from(z, factor)

    def _multiply_back(self, gradient: Tensor, start: int, stop: int) -> None:
        """From the gradient of a chunk's logits, shape ``(rows, V)``, to those of features, weight and bias."""
        of_features, of_weight, of_bias = self.gradients
        if of_bias is not None:
            of_bias.add_(gradient.sum(0, dtype=of_bias.dtype), alpha=1 / self._scale)
        if of_features is not None:
            self._product.into(of_features[start:stop], gradient, self._student.weight)
        if of_weight is not None:
            self._product.add(of_weight, gradient.t(), self._student.features[start:stop], 1 / self._scale)

    def finish(self, count: int) -> ChunkedLoss:
        """The loss and its metrics from what the chunks left; the first `count` tokens are distilled.

        What all words of a token have in common in its targets (the floor of the label-smoothed one, the share that
        an unlisted word has of the teacher's) is added to loss and gradients here: it takes sums over all words,
        which the sums of features and weights give.
        """
        golden, distilled, _, temperature = self._weights
        features, weight, dtype = self._student.features, self._student.weight, self._product.dtype
        share = self._teacher.share
        del self._teacher  # with the memory of its chunks, as that of the student's
        self._student.free()
        self._scratch = None
        vocabulary = weight.size(0)
        # a product, since to add up as many rows takes a GPU as much memory as a chunk of logits
        sum_of_weights = self._product.into(
            self._top.new_empty(1, weight.size(1)), weight.new_ones(1, vocabulary), weight
        ).squeeze(0)
        over_words = torch.mv(features.to(dtype), sum_of_weights)  # of each token, its logits' sum
        if self._bias is not None:
            over_words += self._bias.sum(dtype=dtype)
        over_words -= vocabulary * self._top
        common = torch.full_like(over_words, golden * self._floor)  # the target that all words have, times its weight
        if share is not None:
            self._inner[:count] += share * over_words[:count]
            common[:count] += distilled * temperature * share

        log_total = self._total.log()
        nll = log_total - (self._at_target - self._top)
        smoothed = self._peak * nll + self._floor * (vocabulary * log_total - over_words)
        log_total_at_t = log_total if temperature == 1 else self._total_at_t.log()
        cross_entropy = temperature**2 * (log_total_at_t - self._inner / temperature)[:count]
        kl = cross_entropy - temperature**2 * self._entropy[:count]
        loss = distilled * cross_entropy.sum() + golden * smoothed.sum()

        of_features, of_weight, of_bias = self.gradients
        if of_features is not None:
            of_features.div_(self._scale).addr_(common, sum_of_weights, alpha=-1)
        if of_weight is not None:
            of_weight.sub_(torch.mv(features.to(dtype).t(), common))
        if of_bias is not None:
            of_bias.sub_(common.sum())
        return ChunkedLoss(loss, nll, cross_entropy, kl, self._at_target >= self._top)
