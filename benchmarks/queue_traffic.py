"""(g) What the workers of a training send each other for the queues, beside the gradients.

``python benchmarks/queue_traffic.py`` counts it in a run of two processes, and from its size works out on paper what it
is for more of them. ``python benchmarks/queue_traffic.py FILE FLAG...`` is such a process.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import HERE, save
from steps import DISTIL, UPSTREAM, model_flags
from torch import distributed

VOCABULARY, SENTENCES, MAX_TOKENS, UPDATES = 32_000, 2_000, 4096, 3
LANGUAGES = [f"__src__l{i}" for i in range(11)]
STRATEGIES = {
    "global_level": ["--kd-rate", 0.5, "--kd-queue-size", 100_000],
    "global_language_wise": ["--kd-rate", 0.5, "--kd-queue-size", 100_000],
}
WORKERS, GBITS = [2, 8, 64], [1, 10]


def make_data(folder: Path) -> None:
    """Tagged sentences of random words and lengths, binarized by fairseq-preprocess."""
    rng = random.Random(0)
    words = [*LANGUAGES, *(f"w{i}" for i in range(VOCABULARY - 4 - len(LANGUAGES)))]
    (folder / "dict.txt").write_text("".join(f"{word} 1\n" for word in words))
    for split, count in (("train", SENTENCES), ("valid", 1)):
        pairs = [" ".join(rng.choices(words[len(LANGUAGES) :], k=rng.randint(5, 60))) for _ in range(count)]
        (folder / f"{split}.xx").write_text("".join(f"{rng.choice(LANGUAGES)} {text}\n" for text in pairs))
        (folder / f"{split}.yy").write_text("".join(f"{text}\n" for text in pairs))
    command = [str(Path(sys.executable).parent / "fairseq-preprocess"), "-s", "xx", "-t", "yy", "--destdir", folder]
    command += ["--trainpref", folder / "train", "--validpref", folder / "valid", "--srcdict", folder / "dict.txt"]
    command += ["--tgtdict", folder / "dict.txt"]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def one(file: str, *flags: str) -> None:
    """Train, and write what this worker put into each collective operation of each update."""
    torch.set_num_threads(1)
    from fairseq.tasks.translation import TranslationTask
    from fairseq_cli import train

    updates = []

    def counted(name, payload_at):
        function = getattr(distributed, name)

        def call(*arguments, **others):
            if updates:
                payload = arguments[payload_at]
                is_of_queues = sys._getframe(1).f_globals["__name__"].startswith("kd_ext.modules.")
                count = updates[-1]["queues" if is_of_queues else "rest"]
                count["calls"] += 1
                count["bytes"] += payload.numel() * payload.element_size()
            return function(*arguments, **others)

        setattr(distributed, name, call)

    counted("all_gather", 1)
    counted("all_reduce", 0)
    train_step = TranslationTask.train_step

    def step(self, sample, *arguments, **others):
        tokens = int(sample["ntokens"])
        updates.append({"tokens": tokens, **{what: {"calls": 0, "bytes": 0} for what in ("queues", "rest")}})
        return train_step(self, sample, *arguments, **others)

    TranslationTask.train_step = step
    sys.argv = ["fairseq-train", *flags]
    train.cli_main()
    Path(f"{file}.{os.environ['RANK']}").write_text(json.dumps(updates))


def train_two(folder: Path, *flags: object):
    """The updates of both workers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    command += [Path(__file__).resolve(), folder / "counted", folder, "--user-dir", HERE.parent / "kd_ext"]
    command += [*model_flags("student"), "--optimizer", "adam", "--lr", "1e-4", "--max-tokens", MAX_TOKENS]
    command += ["--label-smoothing", 0.1, "--disable-validation", "--num-workers", 0, "--max-update", UPDATES]
    command += ["--cpu", "--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    if done.returncode != 0:
        raise RuntimeError(done.stdout.decode()[-3000:])
    return [json.loads((folder / f"counted.{rank}").read_text()) for rank in range(2)]


def on_paper(strategy: str, of_workers):
    """From the means of an update; a ring, in which every worker passes on what it was sent."""
    updates = [update for of_worker in of_workers for update in of_worker]
    mean = {what: sum(update[what]["bytes"] for update in updates) / len(updates) for what in ("queues", "rest")}
    tokens = sum(update["tokens"] for update in updates) / len(updates)
    for workers in WORKERS:
        gathered, reduced = (workers - 1) * mean["queues"], 2 * (workers - 1) / workers * mean["rest"]
        row = {"strategy": strategy, "workers": workers, "tokens": round(tokens * workers), "queues_bytes": gathered}
        row.update(messages=updates[0]["queues"]["calls"], bytes_per_token=gathered / (tokens * workers))
        row.update(gradient_bytes=reduced, over_gradients=gathered / reduced)
        yield {**row, "milliseconds": {gbit: gathered * 8 / (gbit * 1e6) for gbit in GBITS}}


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        # its size matters to nothing here: the student's own shape
        train_two(folder, *UPSTREAM, "--save-dir", folder / "teacher", "--max-update", 1)
        for strategy, flags in STRATEGIES.items():
            distil = [*DISTIL, "--teacher-checkpoint-path", folder / "teacher" / "checkpoint_last.pt", "--no-save"]
            counted = train_two(folder, *distil, "--kd-strategy", strategy, *flags)
            rows += on_paper(strategy, counted)
            for row in rows[-len(WORKERS) :]:
                print(row, flush=True)
    save("queue_traffic", rows, max_tokens=MAX_TOKENS, vocabulary=VOCABULARY, updates=UPDATES)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one(*sys.argv[1:])
    else:
        main()
