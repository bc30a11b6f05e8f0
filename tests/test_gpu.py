"""What needs a CUDA device: every precision that upstream has there."""

import re
import subprocess

import pytest
import torch
from commands import ENVIRONMENT, script
from conftest import KD, SIZES, TRAINING, load, strategy_flags

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ON_CPU = TRAINING.index("--cpu")
ON_GPU = TRAINING[:ON_CPU] + TRAINING[ON_CPU + 1 :]


def run_on_gpu(data, teacher, save_dir, *flags, strategy="global_language_wise"):
    command = [script("fairseq-train"), data, *ON_GPU, "--arch", "transformer", *SIZES, *KD, "--save-dir", save_dir]
    command += ["--teacher-checkpoint-path", teacher, *strategy_flags(strategy), *flags]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(list(map(str, command)), stdout=-1, stderr=-2, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout
    return done.stdout


def nll(output):
    return [float(x) for x in re.findall(r"train_inner .*? nll_loss=([\d.]+)", output)]


@pytest.mark.parametrize("precision", [[], ["--fp16"], ["--bf16"], ["--memory-efficient-fp16"], ["--amp"]])
@pytest.mark.parametrize("strategy", ["word_seq_level", "global_language_wise"])
def test_precisions(data, teacher, tmp_path, precision, strategy):
    if precision == ["--bf16"] and not torch.cuda.is_bf16_supported():
        pytest.skip("the device has no bfloat16")
    flags = [*precision, "--max-update", "25", "--dropout", "0"]
    output = run_on_gpu(data, teacher, tmp_path, *flags, strategy=strategy)
    losses = nll(output)
    assert losses[-1] < losses[0] - 0.5
    dtype = {"--fp16": "float16", "--memory-efficient-fp16": "float16", "--bf16": "bfloat16"}
    expected = dtype.get(precision[0] if precision else "", "float32")
    assert f"teacher placed on cuda:0 as torch.{expected}" in output


def test_equals_the_cpu(data, teacher, distil, tmp_path):
    flags = ["--max-update", "5", "--dropout", "0"]
    on_cpu = distil(tmp_path / "cpu", *flags, strategy="global_level")
    on_gpu = run_on_gpu(data, teacher, tmp_path / "gpu", *flags, strategy="global_level")
    assert nll(on_gpu) == pytest.approx(nll(on_cpu.output), abs=3e-3)


@pytest.mark.parametrize("precision", ["--fp16", "--amp"])
def test_skipped_updates_push_nothing(data, teacher, tmp_path, precision):
    """A first scale that overflows: the queue holds the tokens of the updates that were made, and no other."""
    flags = [precision, "--fp16-init-scale", str(2**40), "--max-update", "6", "--kd-queue-size", "100000"]
    output = run_on_gpu(data, teacher, tmp_path, *flags, strategy="global_level")
    tokens = sum(float(x) for x in re.findall(r"train_inner .*? wpb=([\d.]+)", output))
    queue = load(tmp_path / "checkpoint_last.pt")["task_state"]["kd"]["queues"]["all"]
    assert queue.numel() == pytest.approx(tokens, abs=1)
