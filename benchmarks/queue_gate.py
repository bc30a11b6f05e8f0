"""(c) The gate and the queue over sizes of the queue, as shares of a training step.

``python benchmarks/queue_gate.py``, on a GPU against steps in half precision too.
"""

import statistics
import time

import torch
from common import DEVICE, PRECISIONS, THREADS, save, wait_for_device
from models import build, dictionary

from kd_ext.models.output_projection import find_projection
from kd_ext.modules.chunked_loss import Weights, chunked_loss
from kd_ext.modules.token_queue import TokenQueue

TOKENS, LENGTH, VOCABULARY, RATE = 2048, 32, 32_000, 0.5
SIZES = [10_000, 100_000, 1_000_000, 4_000_000]


def make_step(precision):
    """A training step of a student 256 wide, without teacher and optimizer: the least that a step can be."""
    settings = {"share_decoder_input_output_embed": True}
    for side in ("encoder", "decoder"):
        settings.update({f"{side}_embed_dim": 256, f"{side}_ffn_embed_dim": 1024, f"{side}_layers": 3})
        settings[f"{side}_attention_heads"] = 4
    model = build("transformer", dictionary(VOCABULARY), **settings).train().to(DEVICE, getattr(torch, precision))
    project = find_projection(model)
    tokens = torch.randint(4, VOCABULARY, (TOKENS // LENGTH, LENGTH), device=DEVICE)
    lengths = torch.full((len(tokens),), LENGTH, device=DEVICE)
    nothing = torch.zeros(TOKENS, dtype=torch.bool, device=DEVICE)

    def step():
        model.zero_grad()
        features, _ = model(tokens, lengths, tokens, features_only=True)
        student = project(features.flatten(0, 1))
        chunked_loss(student, tokens.flatten(), nothing, [], Weights(1.0, 0.0, 0.1, 1.0)).loss.backward()

    return step


def seconds(function, times):
    taken = []
    for _ in range(times):
        wait_for_device()
        start = time.perf_counter()
        function()
        wait_for_device()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    torch.set_num_threads(THREADS)
    rows = []
    for precision in PRECISIONS:
        step = seconds(make_step(precision), 5)
        for size in SIZES:
            queue = TokenQueue.from_values(size, torch.rand(size, device=DEVICE) * 10)

            def push(queue=queue):
                queue.push(torch.rand(TOKENS, device=DEVICE) * 10)
                queue.commit()

            taken = {"push": seconds(push, 20), "gate": seconds(lambda queue=queue: queue.gate(RATE), 20)}
            share = sum(taken.values()) / step
            rows.append({"precision": precision, "queue": size, **taken, "step": step, "share": share})
            print(rows[-1], flush=True)
    save("queue_gate", rows, tokens=TOKENS, vocabulary=VOCABULARY, rate=RATE)


if __name__ == "__main__":
    main()
