"""Adapter tuning against full fine-tuning: time of a step, and peak memory beyond the loaded model.

    python benchmarks/adapter_tuning.py

One model (512 wide, 6 + 6 layers, vocabulary 8,000) and one batch; each way of tuning in a process of its own.
"""

import json
import resource
import statistics
import sys
import time

from common import measure, save

WIDTH, LAYERS, VOCABULARY, SENTENCES, LENGTH, STEPS = 512, 6, 8000, 32, 24, 6
FLAGS = {
    "full fine-tuning": [],
    "adapters, both sides": ["encoder", "decoder"],
    "adapters, decoder": ["decoder"],
}


def main() -> None:
    rows = [{"variant": name, **measure("adapter_tuning.py", name)} for name in FLAGS]
    save("adapter_tuning", rows, width=WIDTH, layers=LAYERS, vocabulary=VOCABULARY, tokens=SENTENCES * LENGTH)


def tune(sides) -> dict:
    """A training step with Adam: the median time, and the peak of memory beyond the loaded model."""
    import torch
    from models import build, dictionary

    settings = {"share_all_embeddings": True, "dropout": 0.1}
    for side in ("encoder", "decoder"):
        settings.update({f"{side}_embed_dim": WIDTH, f"{side}_layers": LAYERS, f"{side}_normalize_before": True})
    for side in sides:
        settings.update({f"{side}_add_adapters": True, f"{side}_adapter_ids": "hi,ta"})
        settings.update({f"{side}_adapter_reduction_factor": 8, f"{side}_train_adapter": "hi"})
    torch.manual_seed(1)
    model = build("transformer_adapter", dictionary(VOCABULARY), **settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    source, target = (torch.randint(4, VOCABULARY, (SENTENCES, LENGTH)) for _ in range(2))
    lengths = torch.full((SENTENCES,), LENGTH)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        logits, _ = model(source, lengths, target)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "trained": sum(p.numel() for p in trained),
        "seconds": statistics.median(seconds[1:]),  # the first warms up
        "gb": peak * 1024 / 1e9,
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(tune(FLAGS[sys.argv[1]])))
    else:
        main()
