"""(b) on a GPU: whole training runs by fairseq-train: words per second, peak memory, and what waits for the device.

``python benchmarks/gpu_steps.py [--rehearse]`` runs the variants one after the other in one process, on random
sentences of 7 to 63 words. They have eight lengths, since of each shape of a batch that is new a GPU's libraries are
slow to choose their products: so few updates are enough. Each variant's speed is the median over the intervals of its
log but for the first two, in which torch compiles. ``--profile FILE`` writes what one step of some of them does.
"""

import argparse
import contextlib
import functools
import gc
import statistics
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional
from unittest import mock

import torch
from common import DEVICE, HERE, peak_gb, save, wait_for_device
from fairseq.logging import metrics, progress_bar
from fairseq.models.transformer import TransformerModelBase
from fairseq.optim.fp16_optimizer import _FP16OptimizerMixin
from fairseq.trainer import Trainer
from fairseq_cli import preprocess, train

from kd_ext import teacher_cache
from kd_ext.criterions import label_smoothed_cross_entropy_with_kd as criterion
from kd_ext.modules.teacher import Teacher
from kd_ext.teachers import load

DISTIL = ["--task", "translation_with_kd", "--criterion", "label_smoothed_cross_entropy_with_kd"]
UPSTREAM = ["--task", "translation", "--criterion", "label_smoothed_cross_entropy"]
HALF = "--bf16"
CPU = [] if DEVICE == "cuda" else ["--cpu"]
PROFILED = ["upstream, fp16", "word-level, bf16", "full cache, bf16", "word-level, bf16, torch.compile"]


class Size(NamedTuple):
    """Width and depth of the models, words, sentences, tokens in a batch, updates, and those between two logs."""

    student: tuple
    teacher: tuple
    vocabulary: int
    sentences: int
    max_tokens: int
    updates: int
    interval: int


FULL = Size((512, 6), (1024, 6), 32_000, 12_000, 8192, 80, 10)
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
    lengths = (8 * torch.randint(1, 9, (size.sentences,), generator=generator) - 1).tolist()
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


def measured(variant: str, flags, profile: Optional[Path]) -> Dict[str, Any]:
    """Train, and note speed, memory and waits."""
    rates, waits, peaks = [], [], [0.0]
    log, step, output = progress_bar.SimpleProgressBar.log, Trainer.train_step, Teacher.output
    last = int(flags[flags.index("--max-update") + 1])

    def note(self, stats, tag=None, step=None):
        if float(stats["wps"]) > 0:
            rates.append(float(stats["wps"]))
        return log(self, stats, tag, step)

    def look_at(self, *args, **kwargs):
        if profile and variant in PROFILED and self.get_num_updates() == last - 2:
            return _profiled(variant, profile, partial(step, self, *args, **kwargs))
        if self.get_num_updates() != last - 3 or DEVICE == "cpu":
            return step(self, *args, **kwargs)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            out = step(self, *args, **kwargs)
            torch.cuda.set_sync_debug_mode("default")
        waits.extend(f"{Path(w.filename).name}:{w.lineno}" for w in warned if "synchroniz" in str(w.message))
        return out

    def forget_peak(*args):  # fairseq does so after every update
        peaks.append(peak_gb())
        reset(*args)

    metrics.reset()
    gc.collect()
    reset = torch.cuda.reset_peak_memory_stats
    if DEVICE == "cuda":
        reset()
    with contextlib.ExitStack() as changes:
        change = partial(_changed, changes)
        change(progress_bar.SimpleProgressBar, "log", note)
        change(Trainer, "train_step", look_at)
        change(torch.cuda, "reset_peak_memory_stats", forget_peak)
        if variant.startswith("plain"):  # as for a model whose output layer cannot be taken apart
            change(criterion.LabelSmoothedCrossEntropyWithKD, "_find_projection", lambda self, model: None)
            change(load, "_find_projection", lambda model: None)
        if "own stream" in variant:
            change(Teacher, "output", _beside(output))
        if "masks" in variant:  # fairseq asks whether there is any padding, and waits for the answer
            change(torch.Tensor, "any", lambda self, *args: True)
        run_command(train.cli_main, "fairseq-train", flags)
    speed = statistics.median(rates[2:] or rates[-1:] or [0])
    return {"words_per_second": speed, "peak_gb": max(*peaks, peak_gb()), "waits": waits, "rates": rates}


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


# what a step consists of; what is left is fairseq's own
PARTS = [
    (Teacher, "output", "the teacher"),
    (TransformerModelBase, "forward", "a model"),
    (criterion, "chunked_loss", "the loss"),
    (_FP16OptimizerMixin, "backward", "backward"),
    (_FP16OptimizerMixin, "step", "the optimizer"),
    (Trainer, "clip_grad_norm", "clipping"),
    (Trainer, "_reduce_and_log_stats", "logging"),
]


def _profiled(variant: str, path: Path, step) -> Any:
    """Do a step, and append to a file what the CPU and the device did in it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if DEVICE == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    wait_for_device()
    with contextlib.ExitStack() as changes:
        for owner, name, part in PARTS:
            _changed(changes, owner, name, _recorded(getattr(owner, name), part))
        profile = changes.enter_context(torch.profiler.profile(activities=activities))
        start = time.perf_counter()
        out = step()
        given = time.perf_counter() - start
        wait_for_device()
        taken = time.perf_counter() - start
    averages = profile.key_averages()
    on_device = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    parts = [event for event in averages if event.key.startswith("##")]
    busy = sum(x.self_device_time_total for x in averages if x not in parts and "cuda" in str(x.device_type).lower())
    with path.open("a", encoding="utf-8") as file:
        print(f"== {variant}: {1e3 * taken:.1f} ms, profiled; given to the device in {1e3 * given:.1f} ms;", file=file)
        print(f"kernels together {busy / 1e3:.1f} ms", file=file)
        for x in parts:
            took = [f"{name} {getattr(x, f'{name}_time_total') / 1e3:.1f} ms" for name in ("cpu", "device")]
            print(x.key, x.count, str(x.device_type), *took, file=file)
        for key in dict.fromkeys((on_device, "cpu_time_total")):
            print(averages.table(sort_by=key, row_limit=25, max_name_column_width=60), file=file)
    return out


def _recorded(function, part: str):
    @functools.wraps(function)  # the student is asked for its arguments
    def call(*args, **kwargs):
        with torch.profiler.record_function(f"## {part}"):
            return function(*args, **kwargs)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="small models, on a CPU too")
    parser.add_argument("--only", nargs="*", help="variants whose names contain one of these")
    parser.add_argument("--profile", type=Path, help="file for the profiles of a step")
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
            "upstream, bf16, not flat": [*UPSTREAM, HALF, "--fp16-no-flatten-grads"],
            "word-level, fp16": [*word, "--fp16"],
            "global-level, bf16": [*distil, "--kd-strategy", "global_level", *queue, HALF],
            "without distillation, bf16": [*DISTIL, "--alpha", 0, HALF],
            "upstream, bf16, torch.compile": [*UPSTREAM, HALF, *compiled],
            "word-level, bf16, teacher on its own stream": [*word, HALF],
            "word-level, bf16, masks not waited for": [*word, HALF],
            "upstream, fp16, again": [*UPSTREAM, "--fp16"],
            "word-level, bf16, again": [*word, HALF],
            "full cache, bf16, again": [*cache, HALF],
            "plain word-level, bf16": [*word, HALF],
            "upstream, fp32": UPSTREAM,
            "upstream, amp": [*UPSTREAM, "--amp"],
        }
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
                row.update(measured(variant, [*run, "--save-dir", folder / "student"], options.profile))
            except Exception as error:
                row["skipped"] = f"{type(error).__name__}: {error}"[-1500:]
            rows.append(row)
            print(row, flush=True)
            save("gpu_steps", rows, **size._asdict())
        if options.rehearse and any("skipped" in row for row in rows):
            sys.exit(1)


if __name__ == "__main__":
    main()
