"""(c) The selection by queues over their sizes, as shares of a training step, and its gates against a plain search.

``python benchmarks/queue_gate.py``, on a GPU against steps in half precision too.
"""

import itertools
import os
import statistics
import time

import torch
from common import DEVICE, THREADS, save, wait_for_device
from models import build, dictionary

from kd_ext.models.output_projection import find_projection
from kd_ext.modules.chunked_loss import Weights, chunked_loss
from kd_ext.modules.token_selection import WINDOWS

LENGTH, VOCABULARY, RATE = 32, 32_000, 0.5
# tokens in a batch, width and depth of the student
TOKENS, WIDTH, LAYERS = (8192, 512, 6) if DEVICE == "cuda" else (2048, 256, 3)
SIZES = [100_000, 1_000_000] if DEVICE == "cuda" else [10_000, 100_000, 1_000_000, 4_000_000]
PRECISIONS = ["bfloat16"] if DEVICE == "cuda" else ["float32"]
# --kd-queue-window, and how many languages there are
QUEUES = [("each", 1), ("each", 11), ("shared", 11), ("shared", 100)]
BATCHES = 100
if os.environ.get("KD_EXT_REHEARSE"):
    TOKENS, WIDTH, LAYERS, SIZES, BATCHES = 64, 64, 1, [1000], 5


def make_step(precision):
    """A training step of a student, without teacher and optimizer: the least that a step can be."""
    settings = {"share_decoder_input_output_embed": True}
    for side in ("encoder", "decoder"):
        settings.update({f"{side}_embed_dim": WIDTH, f"{side}_ffn_embed_dim": 4 * WIDTH, f"{side}_layers": LAYERS})
        settings[f"{side}_attention_heads"] = WIDTH // 64
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


def timed(function, *arguments):
    """In seconds."""
    wait_for_device()
    start = time.perf_counter()
    function(*arguments)
    wait_for_device()
    return time.perf_counter() - start


def losses(count, batch):
    """Of tokens, smaller as training goes on."""
    return torch.rand(count, device=DEVICE) * (10 - 0.01 * batch)


def select(window, size, languages):
    """Mean times of a batch's selection by full queues, and of a search of all of their values."""
    pools = [f"language {i}" for i in range(languages)] + ["others"]
    selector = WINDOWS[window](RATE, size, pools)
    # a language has 0.7 of the tokens of the one before it, but at least a hundredth of the first one's
    shares = torch.tensor([max(0.5 ** (i / 2), 0.01) for i in range(languages)], device=DEVICE)
    if window == "each":
        queues = {pool: losses(size, 0) for pool in pools[:-1]}
        selector.load_state_dict(queues)
    else:
        language = shares.multinomial(size, replacement=True)
        saved = {"values": losses(size, 0), "languages": language.int()}
        selector.load_state_dict({name: x.cpu() for name, x in saved.items()}, pools)
        queues = {pool: saved["values"][language == i] for i, pool in enumerate(pools[:-1])}
    selection = []
    for batch in range(BATCHES):
        nll, language = losses(TOKENS, batch), shares.multinomial(TOKENS, replacement=True)
        selection.append(timed(selector.select, nll, language))
        selector.commit()
    search = [timed(lambda: [x.kthvalue((len(x) + 1) // 2) for x in queues.values() if len(x)]) for _ in range(5)]
    return {"selection": statistics.mean(selection), "search": statistics.mean(search)}


def main() -> None:
    torch.set_num_threads(THREADS)
    rows = []
    for precision in PRECISIONS:
        function = make_step(precision)
        step = statistics.median(timed(function) for _ in range(5))
        for (window, languages), size in itertools.product(QUEUES, SIZES):
            taken = select(window, size, languages)
            row = {
                "precision": precision,
                "window": window,
                "languages": languages,
                "size": size,
                **taken,
                "step": step,
            }
            rows.append({**row, "share": taken["selection"] / step})
            print(rows[-1], flush=True)
    save("queue_gate", rows, tokens=TOKENS, vocabulary=VOCABULARY, rate=RATE)


if __name__ == "__main__":
    main()
