"""A row of logits in one kernel: what :mod:`~kd_ext.modules.chunked_loss` makes of it, for GPUs that Triton knows.

Each program reads its row of V logits, and its teacher's, twice, and writes the gradient once. One operation of torch
after the other would read or write the same memory some twenty times.
"""

from typing import Optional, Sequence, Tuple

import triton
import triton.language as tl
from torch import Tensor

# On an H100, 32,000 words: 8, 16 and 32 warps took 5.1, 5.0 and 5.3 ms for the whole loss of 8,192 tokens.
BLOCK, WARPS = 8192, 16
# A largest logit to begin with: finite, since words may be excluded by -inf, and so may all of a block
LOWEST = tl.constexpr(-3.4e38)


@triton.jit
def _kernel(
    logits,  # rows x V, float32
    teacher,  # rows x V, float32
    words,  # rows x K, int64
    excess,  # rows x K, float32
    target,  # rows, int64
    gradient,  # rows x V, any floating dtype; may begin where the logits do
    top,
    at_target,
    total,
    total_at_t,
    inner,
    entropy,
    V,
    K,
    gradient_stride,
    golden,
    factor,
    peak,
    inverse_t,
    scale,
    HAS_TEACHER: tl.constexpr,
    HAS_LIST: tl.constexpr,
    WRITES: tl.constexpr,
    AT_T: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row, t_row, g_row = logits + row * V, teacher + row * V, gradient + row * gradient_stride
    word = tl.load(target + row)
    z_target = tl.load(z_row + word)

    z_top = LOWEST
    z_sum = 0.0
    z_sum_at_t = 0.0
    t_top = LOWEST
    t_sum = 0.0
    t_dot_t = 0.0
    t_dot_z = 0.0
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(z_row + at, mask=at < V, other=-float("inf"))
        new_top = tl.maximum(z_top, tl.max(z, 0))
        if AT_T:
            z_sum_at_t = z_sum_at_t * tl.exp((z_top - new_top) * inverse_t) + tl.sum(
                tl.exp((z - new_top) * inverse_t), 0
            )
        z_sum = z_sum * tl.exp(z_top - new_top) + tl.sum(tl.exp(z - new_top), 0)
        z_top = new_top
        if HAS_TEACHER:
            t = tl.load(t_row + at, mask=at < V, other=-float("inf"))
            new_top = tl.maximum(t_top, tl.max(t, 0))
            shrunk = tl.exp((t_top - new_top) * inverse_t)
            e = tl.exp((t - new_top) * inverse_t)
            t_sum = t_sum * shrunk + tl.sum(e, 0)
            t_dot_t = t_dot_t * shrunk + tl.sum(tl.where(e > 0, e * t, 0.0), 0)  # 0 log 0 = 0
            t_dot_z = t_dot_z * shrunk + tl.sum(tl.where(e > 0, e * z, 0.0), 0)
            t_top = new_top
    tl.store(top + row, z_top)
    tl.store(at_target + row, z_target)
    tl.store(total + row, z_sum)
    if AT_T:
        tl.store(total_at_t + row, z_sum_at_t)
    if HAS_TEACHER:
        tl.store(inner + row, t_dot_z / t_sum - z_top)
        tl.store(entropy + row, tl.log(t_sum) + (t_top - t_dot_t / t_sum) * inverse_t)
    if HAS_LIST:
        k = tl.arange(0, BLOCK_K)
        listed = tl.load(words + row * K + k, mask=k < K, other=0)
        more = tl.load(excess + row * K + k, mask=k < K, other=0.0)
        z_listed = tl.load(z_row + listed, mask=k < K, other=0.0)
        tl.store(inner + row, tl.sum(tl.where(k < K, more * (z_listed - z_top), 0.0), 0))

    if WRITES:
        # without a temperature both terms have the same softmax
        of_golden = golden / z_sum if AT_T else (golden + factor) / z_sum
        of_distilled = factor / z_sum_at_t if AT_T else 0.0
        of_teacher = factor / t_sum if HAS_TEACHER else 0.0
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            z = tl.load(z_row + at, mask=at < V, other=-float("inf"))
            g = tl.exp(z - z_top) * of_golden
            if AT_T:
                g += tl.exp((z - z_top) * inverse_t) * of_distilled
            if HAS_TEACHER:
                t = tl.load(t_row + at, mask=at < V, other=-float("inf"))
                g -= tl.exp((t - t_top) * inverse_t) * of_teacher
            g -= tl.where(at == word, golden * peak, 0.0)
            tl.debug_barrier()  # the gradient may lie where others of this program's threads have to read first
            tl.store(g_row + at, (g * scale).to(gradient.dtype.element_ty), mask=at < V)
        if HAS_LIST:
            g = tl.exp(z_listed - z_top) * of_golden
            if AT_T:
                g += tl.exp((z_listed - z_top) * inverse_t) * of_distilled
            g -= factor * more + tl.where(listed == word, golden * peak, 0.0)
            tl.debug_barrier()  # other threads of this program have written there
            tl.store(g_row + listed, (g * scale).to(gradient.dtype.element_ty), mask=k < K)


def run(
    logits: Tensor,
    target: Tensor,
    statistics: Sequence[Tensor],
    gradient: Optional[Tensor] = None,
    teacher: Optional[Tensor] = None,
    listed: Optional[Tuple[Tensor, Tensor]] = None,
    golden: float = 0.0,
    factor: float = 0.0,
    peak: float = 0.0,
    temperature: float = 1.0,
    scale: float = 1.0,
) -> None:
    """Write statistics and gradient of some rows.

    The gradient is ``golden * p + factor * (p_T - q)``, less ``golden * peak`` at the target, times `scale`, where p
    and p_T are the softmax of the logits at 1 and at T, and q is the teacher's distribution; of a listed teacher, the
    excess of its words.

    Args:
        logits: shape ``(rows, V)``, float32, contiguous
        target: shape ``(rows,)``, int64
        statistics: each of shape ``(rows,)``, float32: the largest logit, the target's, the sum of
            exp(logit - largest), that sum at T (written where T is not 1), sum_v q_v (logit_v - largest), and the
            entropy of q (written for a teacher's logits)
        gradient: shape ``(rows, V)``, its rows contiguous; each may begin where that of `logits` does, and takes its
            place; None: statistics alone
        teacher: its logits, shape ``(rows, V)``, float32, contiguous
        listed: words, int64, and excess, float32, each of shape ``(rows, K)``, contiguous
        temperature: T
    """
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    words, excess = listed if listed is not None else (target, logits)
    count = words.size(1) if listed is not None else 1
    _kernel[(rows,)](
        *(logits, logits if teacher is None else teacher, words, excess, target),
        *(logits if gradient is None else gradient, *statistics, vocabulary, count),
        0 if gradient is None else gradient.stride(0),
        *(golden, factor, peak, 1 / temperature, scale),
        HAS_TEACHER=teacher is not None,
        HAS_LIST=listed is not None,
        WRITES=gradient is not None,
        AT_T=temperature != 1 and (teacher is not None or listed is not None),
        BLOCK=BLOCK,
        BLOCK_K=triton.next_power_of_2(count),
        num_warps=WARPS,
    )
