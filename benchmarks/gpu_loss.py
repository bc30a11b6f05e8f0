"""(a) on a GPU: the loss alone against its matrix products, plain formulations, torch.compile and Liger-Kernel.

``python benchmarks/gpu_loss.py [--rehearse]`` measures by CUDA events, medians of ten, every variant of a size on the
same tensors in turn. Liger's losses are those nearest to this one: its cross-entropy with label smoothing, and its
distillation at beta = 0 (Kullback-Leibler from teacher to student) with the hard loss, both fused with the projection.
``--profile FILE`` writes the kernels of one distillation, and what is in memory at its peak.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path

import torch
from common import DEVICE, save
from loss import (
    ALPHA,
    EPSILON,
    VARIANTS,
    lean_cross_entropy,
    lean_distillation,
    plain_cross_entropy,
    plain_distillation,
    products,
)

from kd_ext.modules import chunked_logits
from kd_ext.modules import chunked_loss as chunked_loss_module
from kd_ext.modules.chunked_logits import LinearLogits
from kd_ext.modules.chunked_loss import Weights, chunked_loss
from kd_ext.modules.top_probs import TopProbs

STUDENT, TEACHER, TOP_K, ROUNDS = 512, 1024, 32, 10
# words, tokens
SIZES = [(32_000, 8192), (8_000, 8192), (128_000, 8192), (256_000, 8192), (32_000, 1024), (32_000, 16_384)]
REHEARSED = [(500, 64)]


def liger_cross_entropy():
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(label_smoothing=EPSILON, reduction="sum")
    return lambda x, weight, target, *_: loss(weight, x, target).backward()


def liger_distillation():
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA, beta=0.0)
    return lambda x, weight, target, teacher_x, teacher_weight: loss(
        x, weight, teacher_x, teacher_weight, target
    ).backward()


def from_a_list():
    listed = {}

    def run(x, weight, target, *_):
        n = len(x)
        if n not in listed:
            words = torch.randint(weight.size(0), (n, TOP_K), device=DEVICE)
            listed[n] = TopProbs(words, torch.rand(n, TOP_K, device=DEVICE).softmax(1) * 0.9, weight.size(0))
        weights = Weights(1 - ALPHA, ALPHA, EPSILON, 1.0)
        every = torch.ones_like(target, dtype=torch.bool)
        chunked_loss(LinearLogits(x, weight), target, every, listed[n], weights, count=n).loss.backward()

    return run


def with_setting(module, name, value):
    """The loss with another value of a constant."""

    def run(*tensors):
        usual = getattr(module, name)
        setattr(module, name, value)
        try:
            lean_distillation(*tensors)
        finally:
            setattr(module, name, usual)

    return run


def with_chunks_of(rows):
    return lambda: with_setting(chunked_logits, "ACCELERATOR_ROWS", rows)


def with_warps(warps):
    def make():
        from kd_ext.modules import row_kernel

        return with_setting(row_kernel, "WARPS", warps)

    return make


def without_the_kernel():
    return with_setting(chunked_loss_module, "row_kernel_for", lambda like: None)


def products_into_float32(x, weight, target, teacher_x, teacher_weight):
    """The same products, with results in float32, as a loss in float32 has to have the logits."""
    student, size = x.detach(), chunked_logits.chunk_rows(weight)
    product = chunked_logits.Product(student)
    z, q = torch.empty(2, size, weight.size(0), device=DEVICE)
    gradient = torch.zeros(size, weight.size(0), **{"device": DEVICE, "dtype": product.operand})
    of_weight, of_x = torch.zeros(weight.shape, device=DEVICE), torch.empty(x.shape, device=DEVICE)
    student, teacher_x, weight, teacher_weight = (
        tensor.detach().to(product.operand) for tensor in (student, teacher_x, weight, teacher_weight)
    )
    for i in range(0, len(x), size):
        rows = slice(i, min(i + size, len(x)))
        n = rows.stop - i
        product.into(q[:n], teacher_x[rows], teacher_weight.t())
        product.into(z[:n], student[rows], weight.t())
        product.into(of_x[rows], gradient[:n], weight)
        product.add(of_weight, gradient[:n].t(), student[rows], 1.0)


# each makes a function of student features and weight, targets, teacher features and weight
MAKE = {
    "products": lambda: products,
    "products into float32": lambda: products_into_float32,
    "products and two softmaxes": lambda: VARIANTS["products and two softmaxes"],
    "lean distillation": lambda: lean_distillation,
    "lean distillation, torch's operations": without_the_kernel,
    "lean distillation, listed words": from_a_list,
    "lean cross-entropy": lambda: lean_cross_entropy,
    "Liger distillation": liger_distillation,
    "Liger cross-entropy": liger_cross_entropy,
    "plain distillation": lambda: plain_distillation,
    "plain distillation, torch.compile": lambda: torch.compile(plain_distillation, dynamic=False),
    "plain cross-entropy": lambda: plain_cross_entropy,
    **{f"lean distillation, chunks of {k} tokens": with_chunks_of(k) for k in (512, 2048, 4096)},
    **{f"lean distillation, {k} warps": with_warps(k) for k in (8, 16)},
}
# of the first size alone
ONCE = ["plain distillation, torch.compile", *(x for x in MAKE if "chunks of" in x or "warps" in x)]


def measure(function, tensors):
    """Median milliseconds, and the peak of memory beyond the tensors in 10^9 bytes."""
    x, weight = tensors[:2]

    def run():
        x.grad = weight.grad = None
        function(*tensors)

    for _ in range(3):
        run()
    x.grad = weight.grad = None
    if DEVICE == "cpu":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start), 0.0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, taken = torch.cuda.memory_allocated(), []
    for _ in range(ROUNDS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        taken.append(first.elapsed_time(last))
    return statistics.median(taken), (torch.cuda.max_memory_allocated() - before) / 1e9


def profile(function, tensors, path: Path) -> None:
    """Write the kernels of a run, and what it has in memory at its peak."""
    for x in tensors[:2]:
        x.grad = None
    if DEVICE == "cuda":
        torch.cuda.memory._record_memory_history(stacks="python")
    function(*tensors)
    lines = []
    if DEVICE == "cuda":
        history = torch.cuda.memory._snapshot()["device_traces"][0]
        torch.cuda.memory._record_memory_history(enabled=None)
        lines = ["in memory at the peak, beside what was there before:", *_at_peak(history)]
    with torch.profiler.profile() as profiled:
        function(*tensors)
    by = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    table = profiled.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=90)
    path.write_text("\n".join([*lines, table]), encoding="utf-8")


def _at_peak(history):
    alive, largest, at_peak = {}, 0, []
    for event in history:
        if event["action"] == "alloc":
            alive[event["addr"]] = event
        elif event["action"] == "free_requested":
            alive.pop(event["addr"], None)
        total = sum(each["size"] for each in alive.values())
        if total > largest:
            largest, at_peak = total, sorted(alive.values(), key=lambda each: -each["size"])
    for event in at_peak[:15]:
        frames = [f"{Path(x['filename']).name}:{x['line']}" for x in event["frames"] if x["filename"].endswith(".py")]
        yield f"{event['size'] / 1e6:10.1f} MB  {' < '.join(frames[:4])}"
    yield f"{largest / 1e6:10.1f} MB  together"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="a small size, on a CPU too")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many: %(default)s")
    parser.add_argument("--only", nargs="*", help="variants whose names contain one of these")
    parser.add_argument("--profile", type=Path, help="file for the profile of one distillation of the first size")
    options = parser.parse_args()
    sizes = REHEARSED if options.rehearse else SIZES[: options.sizes]
    rows = []
    functions = {name: None for name in MAKE}
    for vocabulary, tokens in sizes:
        torch.manual_seed(0)
        like = {"device": DEVICE, "dtype": torch.bfloat16}
        x = torch.randn(tokens, STUDENT, **like).requires_grad_()
        weight = torch.empty(vocabulary, STUDENT, **like).normal_(std=STUDENT**-0.5).requires_grad_()
        teacher_x = torch.randn(tokens, TEACHER, **like)
        teacher_weight = torch.empty(vocabulary, TEACHER, **like).normal_(std=TEACHER**-0.5)
        target = torch.randint(vocabulary, (tokens,), device=DEVICE)
        if options.profile and (vocabulary, tokens) == sizes[0]:
            measured = (x, weight, target, teacher_x, teacher_weight)
            lean_distillation(*measured)
            profile(lean_distillation, measured, options.profile)
        for name, make in MAKE.items():
            if name in ONCE and (vocabulary, tokens) != sizes[0]:
                continue
            if options.only and not any(part in name for part in options.only):
                continue
            row = {"precision": "bfloat16", "vocabulary": vocabulary, "tokens": tokens, "variant": name}
            try:
                functions[name] = functions[name] or make()
                row["ms"], row["peak_gb"] = measure(functions[name], (x, weight, target, teacher_x, teacher_weight))
            except Exception as error:  # what is not installed, or does not fit
                row["skipped"] = f"{type(error).__name__}: {error}"[:300]
            rows.append(row)
            print(row, flush=True)
            save("gpu_loss", rows, student=STUDENT, teacher=TEACHER, rounds=ROUNDS)


if __name__ == "__main__":
    main()
