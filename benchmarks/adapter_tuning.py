"""Adapter tuning against full fine-tuning: time of a step, and peak memory beyond the loaded model.

    python benchmarks/adapter_tuning.py

One model (512 wide, 6 + 6 layers, vocabulary 8,000) and one batch; each way of tuning in a process of its own. On a
GPU also with automatic mixed precision.
"""

import itertools
import json
import statistics
import sys
import time

import torch
from common import DEVICE, PRECISIONS, THREADS, measure, peak_gb, save, wait_for_device
from models import build, dictionary

WIDTH, LAYERS, VOCABULARY, SENTENCES, LENGTH, STEPS = 512, 6, 8000, 32, 24, 6
FLAGS = {
    "full fine-tuning": [],
    "adapters, both sides": ["encoder", "decoder"],
    "adapters, decoder": ["decoder"],
}


def main() -> None:
    rows = [
        {"precision": precision, "variant": name, **measure("adapter_tuning.py", name, precision)}
        for precision, name in itertools.product(PRECISIONS, FLAGS)
    ]
    save("adapter_tuning", rows, width=WIDTH, layers=LAYERS, vocabulary=VOCABULARY, tokens=SENTENCES * LENGTH)


def tune(sides, precision) -> dict:
    """A training step with Adam: the median time, and the peak of memory beyond the loaded model."""
    torch.set_num_threads(THREADS)
    settings = {"share_all_embeddings": True, "dropout": 0.1}
    for side in ("encoder", "decoder"):
        settings.update({f"{side}_embed_dim": WIDTH, f"{side}_layers": LAYERS, f"{side}_normalize_before": True})
    for side in sides:
        settings.update({f"{side}_add_adapters": True, f"{side}_adapter_ids": "hi,ta"})
        settings.update({f"{side}_adapter_reduction_factor": 8, f"{side}_train_adapter": "hi"})
    torch.manual_seed(1)
    model = build("transformer_adapter", dictionary(VOCABULARY), **settings).to(DEVICE)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    source, target = (torch.randint(4, VOCABULARY, (SENTENCES, LENGTH), device=DEVICE) for _ in range(2))
    lengths = torch.full((SENTENCES,), LENGTH, device=DEVICE)
    before = peak_gb()
    seconds = []
    for _ in range(STEPS + 1):
        wait_for_device()
        start = time.perf_counter()
        with torch.autocast(DEVICE, getattr(torch, precision), enabled=precision != "float32"):
            logits, _ = model(source, lengths, target)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wait_for_device()
        seconds.append(time.perf_counter() - start)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return {
        "trained": sum(p.numel() for p in trained),
        "seconds": statistics.median(seconds[1:]),  # the first warms up
        "gb": peak_gb() - before,
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(tune(FLAGS[sys.argv[1]], sys.argv[2])))
    else:
        main()
