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
from kd_ext.modules.token_selection import GlobalLanguageWise

LENGTH, VOCABULARY, RATE = 32, 32_000, 0.5
# tokens in a batch, width and depth of the student
TOKENS, WIDTH, LAYERS = (8192, 512, 6) if DEVICE == "cuda" else (2048, 256, 3)
SIZES = [100_000, 1_000_000] if DEVICE == "cuda" else [10_000, 100_000, 1_000_000, 4_000_000]
PRECISIONS = ["bfloat16"] if DEVICE == "cuda" else ["float32"]
LANGUAGES = [1, 11]
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


def select(size, languages):
    """Mean times of a batch's selection by full queues, and of a search of all of their values."""
    pools = [f"language {i}" for i in range(languages)] + ["others"]
    selector = GlobalLanguageWise(RATE, size, pools)
    queues = {pool: losses(size, 0) for pool in pools[:-1]}
    selector.load_state_dict(queues)
    language = torch.arange(TOKENS, device=DEVICE) % languages
    selection = []
    for batch in range(BATCHES):
        nll = losses(TOKENS, batch)
        selection.append(timed(selector.select, nll, language))
        selector.commit()
    search = [timed(lambda: [x.kthvalue(size // 2) for x in queues.values()]) for _ in range(5)]
    return {"selection": statistics.mean(selection), "search": statistics.mean(search)}


def main() -> None:
    torch.set_num_threads(THREADS)
    rows = []
    for precision in PRECISIONS:
        function = make_step(precision)
        step = statistics.median(timed(function) for _ in range(5))
        for languages, size in itertools.product(LANGUAGES, SIZES):
            taken = select(size, languages)
            row = {"precision": precision, "queues": languages, "size": size, **taken, "step": step}
            rows.append({**row, "share": taken["selection"] / step})
            print(rows[-1], flush=True)
    save("queue_gate", rows, tokens=TOKENS, vocabulary=VOCABULARY, rate=RATE)


if __name__ == "__main__":
    main()
