"""(a) The loss alone, against plain formulations and against its matrix products, over sizes of the vocabulary.

``python benchmarks/loss.py`` measures every variant in a process of its own, on a GPU in half precision too;
``python benchmarks/loss.py VARIANT VOCABULARY PRECISION`` is such a process.
"""

import itertools
import json
import sys
import time

import torch
from common import DEVICE, PRECISIONS, THREADS, available_gb, measure, peak_gb, save, wait_for_device
from torch.nn import functional as F

from kd_ext.modules.chunked_logits import LinearLogits, chunk_rows
from kd_ext.modules.chunked_loss import Weights, chunked_loss

TOKENS, STUDENT, TEACHER = 2048, 256, 512
EPSILON, ALPHA = 0.1, 0.5
VOCABULARIES = [8_000, 32_000, 64_000, 256_000]
# which need n x V elements this many times over
PLAIN = {"plain cross-entropy": 4, "plain distillation": 7}


def products(x, weight, target, teacher_x, teacher_weight, between=lambda z, q: None):
    """The matrix products that distillation cannot do without: two projections and two gradients."""
    student, of_weight, of_x = x.detach(), torch.zeros_like(weight), torch.empty_like(x)
    size = chunk_rows(weight)
    z, q = weight.new_empty(2, size, weight.size(0))
    with torch.no_grad():
        for i in range(0, len(x), size):
            rows = slice(i, min(i + size, len(x)))
            of_teacher, of_student = q[: rows.stop - i], z[: rows.stop - i]
            torch.mm(teacher_x[rows], teacher_weight.t(), out=of_teacher)
            torch.mm(student[rows], weight.t(), out=of_student)
            between(of_student, of_teacher)
            torch.mm(of_student, weight, out=of_x[rows])
            of_weight.addmm_(of_student.t(), student[rows])


def products_and_softmaxes(*arguments):
    """The least that can stand between them with torch's own operations: no loss, no metrics, no label smoothing."""

    def gradient(z, q):
        torch.softmax(z, 1, out=z).sub_(torch.softmax(q, 1, out=q))

    products(*arguments, between=gradient)


def label_smoothed(log_probs, target):
    """As fairseq computes it."""
    nll = -log_probs.gather(1, target.unsqueeze(1))
    smooth = -log_probs.sum(1, keepdim=True)
    floor = EPSILON / (log_probs.size(1) - 1)
    return ((1 - EPSILON - floor) * nll + floor * smooth).sum()


def plain_cross_entropy(x, weight, target, teacher_x, teacher_weight):
    label_smoothed(F.log_softmax(F.linear(x, weight), dim=-1, dtype=torch.float32), target).backward()


def plain_distillation(x, weight, target, teacher_x, teacher_weight):
    """As the predecessor computes it: logits and log-probabilities of either model, and their product, all at once."""
    with torch.no_grad():
        teacher_logits = F.linear(teacher_x, teacher_weight)
    logits = F.linear(x, weight)
    golden = label_smoothed(F.log_softmax(logits, dim=-1, dtype=torch.float32), target)
    teacher = F.softmax(teacher_logits, dim=-1, dtype=torch.float32)
    student = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    ((1 - ALPHA) * golden + ALPHA * -(teacher * student).sum()).backward()


def lean_distillation(x, weight, target, teacher_x, teacher_weight):
    teachers = [LinearLogits(teacher_x, teacher_weight)]
    weights = Weights(1 - ALPHA, ALPHA, EPSILON, 1.0)
    every = torch.ones_like(target, dtype=torch.bool)
    chunked_loss(LinearLogits(x, weight), target, every, teachers, weights).loss.backward()


def lean_cross_entropy(x, weight, target, teacher_x, teacher_weight):
    nothing = torch.zeros_like(target, dtype=torch.bool)
    chunked_loss(LinearLogits(x, weight), target, nothing, [], Weights(1.0, 0.0, EPSILON, 1.0)).loss.backward()


VARIANTS = {
    "products": products,
    "products and two softmaxes": products_and_softmaxes,
    "plain cross-entropy": plain_cross_entropy,
    "plain distillation": plain_distillation,
    "lean cross-entropy": lean_cross_entropy,
    "lean distillation": lean_distillation,
}


def one(variant: str, vocabulary: int, precision: str) -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    like = {"device": DEVICE, "dtype": getattr(torch, precision)}
    x = torch.randn(TOKENS, STUDENT, **like).requires_grad_()
    weight = torch.empty(vocabulary, STUDENT, **like).normal_(std=STUDENT**-0.5).requires_grad_()
    teacher_x = torch.randn(TOKENS, TEACHER, **like)
    teacher_weight = torch.empty(vocabulary, TEACHER, **like).normal_(std=TEACHER**-0.5)
    target = torch.randint(vocabulary, (TOKENS,), device=DEVICE)
    before, seconds = peak_gb(), []
    for _ in range(max(2, 500_000 // vocabulary)):  # the smallest of more is steadier, where that takes no time
        x.grad = weight.grad = None
        wait_for_device()
        start = time.perf_counter()
        VARIANTS[variant](x, weight, target, teacher_x, teacher_weight)
        wait_for_device()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": min(seconds), "peak_gb": peak_gb() - before}))


def main() -> None:
    rows = []
    for precision, vocabulary, variant in itertools.product(PRECISIONS, VOCABULARIES, VARIANTS):
        needed = PLAIN.get(variant, 0) * TOKENS * vocabulary * 4 / 1e9
        row = {"precision": precision, "variant": variant, "vocabulary": vocabulary}
        if needed > available_gb():
            row["skipped"] = f"needs about {needed:.0f} GB"
        else:
            row.update(measure("loss.py", variant, vocabulary, precision))
        rows.append(row)
        print(row, flush=True)
        save("loss", rows, tokens=TOKENS, student=STUDENT, teacher=TEACHER)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else:
        main()
