"""Updates that are not made, since gradients overflow or are not finite, leave no trace in the queues."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ENVIRONMENT
from conftest import KD, SIZES, TRAINING, load, needs_half, strategy_flags
from test_resume import assert_same_run

FLAGS = ["--kd-queue-size", "100000", "--dropout", "0.1"]
HALF = ["--fp16", "--memory-efficient-fp16"]


@pytest.fixture
def train_half(data, teacher, tmp_path):
    """Runs fairseq-train on the CPU, without the first `left_out` of its batches."""

    def train(save_dir, *flags, left_out=0, strategy="global_language_wise"):
        command = [sys.executable, Path(__file__).parent / "overflowing.py", left_out, data, *TRAINING, *SIZES, *KD]
        command += ["--arch", "transformer", "--teacher-checkpoint-path", teacher, *strategy_flags(strategy), *FLAGS]
        command += ["--save-dir", save_dir, *flags]
        done = subprocess.run(
            list(map(str, command)), stdout=-1, stderr=-2, text=True, env=ENVIRONMENT, timeout=300, check=False
        )
        return done.returncode, done.stdout

    return train


def tokens(output):
    """Of the updates that were made."""
    return sum(float(x) for x in re.findall(r"train_inner .*? wpb=([\d.]+)", output))


def queued(path):
    queues = load(path)["task_state"]["kd"]["queues"]
    return queues["values"] if "values" in queues else torch.cat(list(queues.values()))


@needs_half
@pytest.mark.parametrize(
    ("strategy", "others"),
    [
        ("global_level", []),
        ("global_language_wise", []),
        ("global_language_wise", ["--kd-queue-window", "shared"]),
    ],
    ids=["global_level", "global_language_wise", "shared"],
)
def test_a_batch_whose_gradient_overflows_might_as_well_not_have_been(train_half, tmp_path, strategy, others):
    flags = [*others, *HALF, "--max-update", "6"]
    status, output = train_half(tmp_path / "a", *flags, "--fp16-init-scale", 2**30, strategy=strategy)
    assert status == 0, output
    overflows = re.findall(r"gradient overflow detected.*setting loss scale to: ([\d.]+)", output)
    assert len(overflows) >= 2
    scale = ["--fp16-init-scale", int(float(overflows[-1]))]
    status, other = train_half(tmp_path / "b", *flags, *scale, left_out=len(overflows), strategy=strategy)
    assert status == 0, other
    assert "overflow" not in other
    assert_same_run(tmp_path / "a" / "checkpoint_last.pt", tmp_path / "b" / "checkpoint_last.pt")
    assert queued(tmp_path / "a" / "checkpoint_last.pt").numel() == pytest.approx(tokens(output), abs=1)


@pytest.mark.parametrize(
    ("flags", "error", "name"),
    [
        # the first update ruins the weights; the scale goes down until upstream gives up
        pytest.param([*HALF, "--lr", "1e6"], "Minimum loss scale reached", "crash.pt", marks=needs_half),
        (["--lr", "1e36"], "gradients are Nan/Inf", "checkpoint_last.pt"),
    ],
    ids=["half", "full"],
)
def test_losses_that_stay_nan_end_the_run(train_half, tmp_path, flags, error, name):
    flags = [*flags, "--max-update", "6", "--save-interval-updates", "1", "--disable-validation"]
    status, output = train_half(tmp_path, *flags)
    assert status != 0
    assert f"FloatingPointError: {error}" in output
    values = queued(tmp_path / name)
    assert values.isfinite().all()
    assert values.numel() == pytest.approx(tokens(output), abs=1)
