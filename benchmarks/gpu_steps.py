"""(b) on a GPU: whole training runs by fairseq-train: words per second, peak memory, and what waits for the device.

``python benchmarks/gpu_steps.py [--rehearse]`` runs the variants one after the other in one process, on random
sentences of 8 to 60 words; ``--profile FILE`` writes what a step of word-level distillation does. Each variant's speed
is the median over the intervals of its log but for the first two, in which torch compiles.
"""

import argparse
import contextlib
import gc
import statistics
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Dict, NamedTuple
from unittest import mock

import torch
from common import DEVICE, HERE, peak_gb, save
from fairseq.logging import metrics, progress_bar
from fairseq.trainer import Trainer
from fairseq_cli import preprocess, train

from kd_ext import teacher_cache
from kd_ext.criterions.label_smoothed_cross_entropy_with_kd import LabelSmoothedCrossEntropyWithKD
from kd_ext.modules.teacher import Teacher
from kd_ext.teachers import load

DISTIL = ["--task", "translation_with_kd", "--criterion", "label_smoothed_cross_entropy_with_kd"]
UPSTREAM = ["--task", "translation", "--criterion", "label_smoothed_cross_entropy"]
HALF = "--bf16"
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


FULL = Size((512, 6), (1024, 6), 32_000, 12_000, 8192, 140, 20)
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
    flags = ["-s", "xx", "-t", "yy", "--destdir", folder, "--trainpref", folder / "train", "--validpref"]
    flags += [folder / "valid", "--srcdict", folder / "dict.txt", "--tgtdict", folder / "dict.txt"]
    run_command(preprocess.cli_main, "fairseq-preprocess", flags)


def run_command(function, name, flags) -> None:
    sys.argv = [name, *map(str, flags)]
    function()


def training(folder: Path, model, size: Size, updates: int):
    flags = [folder, "--user-dir", HERE.parent / "kd_ext", *model_flags(*model), "--max-update", updates]
    flags += ["--optimizer", "adam", "--lr", "1e-4", "--max-tokens", size.max_tokens, "--label-smoothing", 0.1]
    flags += ["--disable-validation", "--log-interval", size.interval, "--log-format", "simple", *CPU]
    flags += ["--distributed-world-size", 1, "--no-epoch-checkpoints", "--clip-norm", 1.0, "--dropout", 0.1]
    return flags


def measured(variant: str, flags) -> Dict[str, Any]:
    """Train, and note speed, memory and waits."""
    rates, waits = [], []
    log, step, output = progress_bar.SimpleProgressBar.log, Trainer.train_step, Teacher.output
    last = int(flags[flags.index("--max-update") + 1])

    def note(self, stats, tag=None, step=None):
        if float(stats["wps"]) > 0:
            rates.append(float(stats["wps"]))
        return log(self, stats, tag, step)

    def count_waits(self, *args, **kwargs):
        if self.get_num_updates() != last - 3 or DEVICE == "cpu":
            return step(self, *args, **kwargs)
        with warnings.catch_warnings(record=True) as warned, _profiled(variant):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            out = step(self, *args, **kwargs)
            torch.cuda.set_sync_debug_mode("default")
        waits.extend(f"{Path(w.filename).name}:{w.lineno}" for w in warned if "synchroniz" in str(w.message))
        return out

    metrics.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.ExitStack() as changes:
        change = partial(_changed, changes)
        change(progress_bar.SimpleProgressBar, "log", note)
        change(Trainer, "train_step", count_waits)
        if variant.startswith("plain"):  # as for a model whose output layer cannot be taken apart
            change(LabelSmoothedCrossEntropyWithKD, "_find_projection", lambda self, model: None)
            change(load, "_find_projection", lambda model: None)
        if "own stream" in variant:
            change(Teacher, "output", _beside(output))
        run_command(train.cli_main, "fairseq-train", flags)
    speed = statistics.median(rates[2:] or rates[-1:] or [0])
    return {"words_per_second": speed, "peak_gb": peak_gb(), "waits": waits, "rates": rates}


def _changed(changes: contextlib.ExitStack, owner, name, value) -> None:
    changes.enter_context(mock.patch.object(owner, name, value))


def _beside(output):
    """The teacher's pass on a stream of its own, beside whatever was given to the device before."""
    stream = torch.cuda.Stream() if DEVICE == "cuda" else None

    def on_stream(self, *args):
        if stream is None:
            return output(self, *args)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out = output(self, *args)
        torch.cuda.current_stream().wait_stream(stream)
        return out

    return on_stream


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
        run_command(train.cli_main, "fairseq-train", [*training(folder, size.teacher, size, 1), *save_teacher, HALF])
        distil = [*DISTIL, "--teacher-checkpoint-path", teacher]
        cache = [*DISTIL, "--teacher-cache-dir", folder / "cache"]
        word, compiled = [*distil, "--kd-strategy", "word_seq_level"], ["--torch-compile"]
        queue = ["--kd-rate", 0.5, "--kd-queue-size", 1_000_000]
        variants = {
            "upstream, fp16": [*UPSTREAM, "--fp16"],
            "upstream, bf16": [*UPSTREAM, HALF],
            "word-level, bf16": [*word, HALF],
            "full cache, bf16": [*cache, HALF],
            "word-level, bf16, torch.compile": [*word, HALF, *compiled],
            "full cache, bf16, torch.compile": [*cache, HALF, *compiled],
            "global-level, bf16": [*distil, "--kd-strategy", "global_level", *queue, HALF],
            "upstream, bf16, torch.compile": [*UPSTREAM, HALF, *compiled],
            "plain word-level, bf16": [*word, HALF],
            "without distillation, bf16": [*DISTIL, "--alpha", 0, HALF],
            "word-level, fp16": [*word, "--fp16"],
            "upstream, fp32": UPSTREAM,
            "upstream, amp": [*UPSTREAM, "--amp"],
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
                if "full cache" in variant and not (folder / "cache").exists():
                    fill = [folder, "--max-tokens", size.max_tokens, HALF, *CPU, *cache[4:]]
                    teacher_cache.main(list(map(str, [*fill, "--teacher-checkpoint-path", teacher])))
                run = [*training(folder, size.student, size, size.updates), *flags, "--no-save"]
                row.update(measured(variant, [*run, "--save-dir", folder / "student"]))
            except Exception as error:
                row["skipped"] = f"{type(error).__name__}: {error}"[-1500:]
            rows.append(row)
            print(row, flush=True)
            if not options.profile:
                save("gpu_steps", rows, **size._asdict())
        if options.rehearse and any("skipped" in row for row in rows):
            sys.exit(1)


if __name__ == "__main__":
    main()
