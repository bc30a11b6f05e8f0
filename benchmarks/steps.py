"""(b) Whole training runs by fairseq-train: words per second and peak memory, teacher included.

``python benchmarks/steps.py`` runs each variant as a process of its own on random sentences, all of them by turns,
on a GPU in half precision; ``python benchmarks/steps.py VARIANT FLAG...`` is such a process.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import DEVICE, HERE, THREADS, measure, peak_gb, save
from tqdm import tqdm

VOCABULARY, SENTENCES, LENGTH = 32_000, 1_000, 31
SHAPE = {"student": (256, 3), "teacher": (512, 6)}
UPDATES, ROUNDS = 8, 2
RUNS = {"float16": "--fp16", "bfloat16": "--bf16"} if DEVICE == "cuda" else {"float32": "--cpu"}
DISTIL = ["--task", "translation_with_kd", "--criterion", "label_smoothed_cross_entropy_with_kd"]
UPSTREAM = ["--task", "translation", "--criterion", "label_smoothed_cross_entropy"]


def model_flags(name):
    width, layers = SHAPE[name]
    flags = ["--arch", "transformer", "--share-decoder-input-output-embed"]
    for side in ("encoder", "decoder"):
        flags += [f"--{side}-embed-dim", width, f"--{side}-ffn-embed-dim", 4 * width, f"--{side}-layers", layers]
        flags += [f"--{side}-attention-heads", width // 64]
    return flags


def make_data(folder: Path) -> None:
    """Sentences of random words, binarized by fairseq-preprocess."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(VOCABULARY - 4, (SENTENCES, LENGTH), generator=generator)
    text = "".join(" ".join(f"w{i}" for i in sentence.tolist()) + "\n" for sentence in words)
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(VOCABULARY - 4)))
    for split in ("train", "valid"):
        for side in ("xx", "yy"):
            (folder / f"{split}.{side}").write_text(text if split == "train" else text.splitlines()[0] + "\n")
    command = [str(Path(sys.executable).parent / "fairseq-preprocess"), "-s", "xx", "-t", "yy", "--destdir", folder]
    command += ["--trainpref", folder / "train", "--validpref", folder / "valid", "--srcdict", folder / "dict.txt"]
    command += ["--tgtdict", folder / "dict.txt", "--workers", THREADS]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def fill(folder: Path, *flags) -> None:
    """A complete cache, as a user would have it."""
    command = [sys.executable, "-m", "kd_ext.teacher_cache", folder, "--max-tokens", 2048, *flags]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def training(folder: Path, name: str, updates: int):
    flags = [folder, "--user-dir", HERE.parent / "kd_ext", *model_flags(name), "--max-update", updates]
    flags += ["--optimizer", "adam", "--lr", "1e-4", "--max-tokens", 2048, "--label-smoothing", 0.1]
    flags += ["--disable-validation", "--num-workers", 0, "--log-interval", 1, "--log-format", "simple"]
    flags += ["--distributed-world-size", 1]  # several GPUs would be several processes, out of sight of this one
    return flags + ["--save-dir", folder / name, "--no-epoch-checkpoints"]


def one(variant: str, *flags: str) -> None:
    torch.set_num_threads(THREADS)
    from fairseq.logging import progress_bar
    from fairseq_cli import train

    import kd_ext.criterions.label_smoothed_cross_entropy_with_kd as criterion
    from kd_ext.teachers import load

    if variant == "plain distillation":  # as for a model whose output layer cannot be taken apart
        load._find_projection = lambda model: None
        criterion.LabelSmoothedCrossEntropyWithKD._find_projection = lambda self, model: None
    rates = []
    log = progress_bar.SimpleProgressBar.log

    def note(self, stats, tag=None, step=None):
        rates.append(float(stats["wps"]))
        return log(self, stats, tag, step)

    progress_bar.SimpleProgressBar.log = note
    sys.argv = ["fairseq-train", *flags]
    train.cli_main()
    # the first updates allocate what later ones use again
    print(json.dumps({"words_per_second": statistics.median(rates[2:] or [0]), "peak_gb": peak_gb()}))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        teacher = folder / "teacher" / "checkpoint_last.pt"
        first = next(iter(RUNS.values()))
        measure("steps.py", "teacher", *training(folder, "teacher", 1), *UPSTREAM, first)
        distil = [*DISTIL, "--teacher-checkpoint-path", teacher]
        cache = [*DISTIL, "--teacher-cache-dir", folder / "cache"]
        fill(folder, *cache, "--teacher-checkpoint-path", teacher, first)
        variants = {
            "upstream": UPSTREAM,
            "plain distillation": distil,
            "lean distillation": distil,
            "lean distillation, warm cache": cache,
            "lean without distillation": [*DISTIL, "--alpha", "0"],
            "lean distillation of half of the tokens": [
                *distil,
                *["--kd-strategy", "global_level", "--kd-rate", 0.5, "--kd-queue-size", 100_000],
            ],
        }
        runs = list(itertools.product(RUNS, variants))
        found = {run: [] for run in runs}
        for precision, variant in tqdm(runs * ROUNDS):
            flags = [*training(folder, "student", UPDATES), *variants[variant], RUNS[precision], "--no-save"]
            found[precision, variant].append(measure("steps.py", variant, *flags))
        rows = [{"precision": run[0], "variant": run[1], **medians(rounds)} for run, rounds in found.items()]
        settings = {"vocabulary": VOCABULARY, "shape": SHAPE, "max_tokens": 2048, "updates": UPDATES, "rounds": ROUNDS}
        save("steps", rows, **settings)


def medians(rounds):
    return {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one(*sys.argv[1:])
    else:
        main()
