"""(b) on a GPU: whole training runs by fairseq-train: words per second, peak memory, and what waits for the device.

``python benchmarks/gpu_steps.py [--rehearse]`` runs each variant as a process of its own, on random sentences of 8 to
60 words; ``--profile`` writes what a step of word-level distillation does. Each variant's speed is the median over
the intervals of its log but for the first two, in which torch compiles.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from common import DEVICE, HERE, measure, peak_gb, save

DISTIL = ["--task", "translation_with_kd", "--criterion", "label_smoothed_cross_entropy_with_kd"]
UPSTREAM = ["--task", "translation", "--criterion", "label_smoothed_cross_entropy"]
HALF = {"cuda": "--bf16", "cpu": "--bf16"}[DEVICE]
CPU = [] if DEVICE == "cuda" else ["--cpu"]


class Size(NamedTuple):
    """Width and depth of the models, words, sentences, tokens in a batch, updates, and those between two logs."""

    student: tuple
    teacher: tuple
    vocabulary: int
    sentences: int
    max_tokens: int
    updates: int
    interval: int


FULL = Size((512, 6), (1024, 6), 32_000, 16_000, 8192, 160, 20)
REHEARSED = Size((64, 1), (64, 2), 200, 300, 1000, 8, 2)


def model_flags(width, layers):
    flags = ["--arch", "transformer", "--share-decoder-input-output-embed"]
    for side in ("encoder", "decoder"):
        flags += [f"--{side}-embed-dim", width, f"--{side}-ffn-embed-dim", 4 * width, f"--{side}-layers", layers]
        flags += [f"--{side}-attention-heads", width // 64]
    return flags


def make_data(folder: Path, size: Size) -> None:
    """Sentences of random words, binarized by fairseq-preprocess."""
    generator = torch.Generator().manual_seed(0)
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(size.vocabulary - 4)))
    lengths = torch.randint(8, 61, (size.sentences,), generator=generator).tolist()
    for split, count in (("train", size.sentences), ("valid", 1)):
        for side in ("xx", "yy"):
            lines = []
            for length in lengths[:count]:
                words = torch.randint(size.vocabulary - 4, (length,), generator=generator).tolist()
                lines.append(" ".join(f"w{i}" for i in words) + "\n")
            (folder / f"{split}.{side}").write_text("".join(lines))
    command = [str(Path(sys.executable).parent / "fairseq-preprocess"), "-s", "xx", "-t", "yy", "--destdir", folder]
    command += ["--trainpref", folder / "train", "--validpref", folder / "valid", "--srcdict", folder / "dict.txt"]
    command += ["--tgtdict", folder / "dict.txt", "--workers", 4]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def training(folder: Path, model, size: Size, updates: int):
    flags = [folder, "--user-dir", HERE.parent / "kd_ext", *model_flags(*model), "--max-update", updates]
    flags += ["--optimizer", "adam", "--lr", "1e-4", "--max-tokens", size.max_tokens, "--label-smoothing", 0.1]
    flags += ["--disable-validation", "--log-interval", size.interval, "--log-format", "simple", *CPU]
    flags += ["--distributed-world-size", 1, "--no-epoch-checkpoints", "--clip-norm", 1.0, "--dropout", 0.1]
    return flags


def one(variant: str, *flags: str) -> None:
    from fairseq.logging import progress_bar
    from fairseq.trainer import Trainer
    from fairseq_cli import train

    from kd_ext.criterions import label_smoothed_cross_entropy_with_kd as criterion
    from kd_ext.modules.teacher import Teacher
    from kd_ext.tasks import load_teacher

    if variant.startswith("plain"):  # as for a model whose output layer cannot be taken apart
        criterion._find_projection = load_teacher._find_projection = lambda model: None
    if "own stream" in variant:
        _move_teacher_to_a_stream(Teacher)
    rates, waits = [], []
    log, step = progress_bar.SimpleProgressBar.log, Trainer.train_step
    last = int(flags[flags.index("--max-update") + 1])

    def note(self, stats, tag=None, step=None):
        if float(stats["wps"]) > 0:
            rates.append(float(stats["wps"]))
        return log(self, stats, tag, step)

    def count_waits(self, *args, **kwargs):
        if self.get_num_updates() != last - 3 or DEVICE == "cpu":
            return step(self, *args, **kwargs)
        with warnings.catch_warnings(record=True) as found, _profiled(variant):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            out = step(self, *args, **kwargs)
            torch.cuda.set_sync_debug_mode("default")
        waits.extend(f"{Path(w.filename).name}:{w.lineno}" for w in found if "synchroniz" in str(w.message))
        return out

    progress_bar.SimpleProgressBar.log, Trainer.train_step = note, count_waits
    sys.argv = ["fairseq-train", *flags]
    train.cli_main()
    speed = statistics.median(rates[2:] or rates[-1:] or [0])
    print(json.dumps({"words_per_second": speed, "peak_gb": peak_gb(), "waits": waits}))


def _move_teacher_to_a_stream(teacher) -> None:
    """Its pass beside whatever was given to the device before."""
    output = teacher.output
    stream = torch.cuda.Stream() if DEVICE == "cuda" else None

    def beside(self, *args):
        if stream is None:
            return output(self, *args)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out = output(self, *args)
        torch.cuda.current_stream().wait_stream(stream)
        return out

    teacher.output = beside


@contextlib.contextmanager
def _profiled(variant: str):
    if "profile" not in variant:
        yield
        return
    with torch.profiler.profile() as profile:
        yield
    Path(variant.split("=")[1]).write_text(profile.key_averages().table(sort_by="cuda_time_total", row_limit=45))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="small models, on a CPU too")
    parser.add_argument("--only", nargs="*", help="variants whose names contain one of these")
    parser.add_argument("--profile", help="file for the profile of a step")
    options = parser.parse_args()
    size = REHEARSED if options.rehearse else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder, size)
        teacher = folder / "teacher" / "checkpoint_last.pt"
        save_teacher = ["--save-dir", folder / "teacher", "--no-save-optimizer-state", *UPSTREAM]
        measure("gpu_steps.py", "teacher", *training(folder, size.teacher, size, 1), *save_teacher, "--lr", "1e-9")
        distil = [*DISTIL, "--teacher-checkpoint-path", teacher]
        cache = [*DISTIL, "--teacher-cache-dir", folder / "cache"]
        fill = [sys.executable, "-m", "kd_ext.teacher_cache", folder, "--max-tokens", size.max_tokens, HALF, *CPU]
        fill += [*cache[4:], "--teacher-checkpoint-path", teacher]
        subprocess.run(list(map(str, fill)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        word, compiled = [*distil, "--kd-strategy", "word_seq_level"], ["--torch-compile"]
        queue = ["--kd-rate", 0.5, "--kd-queue-size", 1_000_000]
        variants = {
            "upstream, bf16": [*UPSTREAM, HALF],
            "upstream, fp16": [*UPSTREAM, "--fp16"],
            "upstream, fp32": UPSTREAM,
            "upstream, amp": [*UPSTREAM, "--amp"],
            "word-level, bf16": [*word, HALF],
            "word-level, bf16, torch.compile": [*word, HALF, *compiled],
            "full cache, bf16": [*cache, HALF],
            "full cache, bf16, torch.compile": [*cache, HALF, *compiled],
            "global-level, bf16": [*distil, "--kd-strategy", "global_level", *queue, HALF],
            "upstream, bf16, torch.compile": [*UPSTREAM, HALF, *compiled],
            "plain word-level, bf16": [*word, HALF],
            "without distillation, bf16": [*DISTIL, "--alpha", 0, HALF],
            "word-level, fp16": [*word, "--fp16"],
            "word-level, bf16, teacher on its own stream": [*word, HALF],
            "upstream, bf16, again": [*UPSTREAM, HALF],
        }
        if options.profile:
            variants = {f"word-level, profile={options.profile}": variants["word-level, bf16"]}
        rows = []
        for variant, flags in variants.items():
            if options.only and not any(part in variant for part in options.only):
                continue
            if DEVICE == "cpu" and any(flag in ("--fp16", "--amp") for flag in flags):
                continue  # upstream has them on GPUs alone
            row = {"precision": "", "variant": variant}
            try:
                run = [*training(folder, size.student, size, size.updates), *flags, "--no-save"]
                row.update(measure("gpu_steps.py", variant, *run, "--save-dir", folder / "student"))
            except RuntimeError as error:
                row["skipped"] = str(error)[-1500:]
            rows.append(row)
            print(row, flush=True)
            if not options.profile:
                save("gpu_steps", rows, **size._asdict())


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("--"):
        one(*sys.argv[1:])
    else:
        main()
