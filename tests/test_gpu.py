"""What needs a CUDA device: every precision that upstream has there."""

import re
import subprocess

import pytest
import torch
from commands import ENVIRONMENT, script
from conftest import KD, SIZES, TRAINING, load, strategy_flags
from test_chunked_loss import leaves, make, plain

from kd_ext.modules.chunked_logits import LinearLogits
from kd_ext.modules.chunked_loss import Weights, chunked_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ON_CPU = TRAINING.index("--cpu")
ON_GPU = TRAINING[:ON_CPU] + TRAINING[ON_CPU + 1 :]


def run_on_gpu(data, teacher, save_dir, *flags, strategy="global_language_wise"):
    command = [script("fairseq-train"), data, *ON_GPU, "--arch", "transformer", *SIZES, *KD, "--save-dir", save_dir]
    command += ["--distributed-world-size", "1"]  # the default is one worker for each GPU
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_by_chunks_in_half_precision(dtype):
    """Products of half-precision tensors into float32; float16 gradients use the range of that dtype."""
    weights = Weights(0.5, 0.5, 0.1, 1.0)
    student, target, selected, teachers = make(torch.float32, n=600)
    to_device = lambda logits: type(logits)(*(x.detach().to("cuda", dtype) for x in logits if x is not None))  # noqa: E731
    half = LinearLogits(*(x.requires_grad_() for x in to_device(student)))
    half_teachers = [to_device(teacher) for teacher in teachers]
    full = LinearLogits(*(x.detach().float().requires_grad_() for x in half))
    full_teachers = [type(teacher)(*(x.float() for x in teacher if x is not None)) for teacher in half_teachers]
    target, selected = target.cuda(), selected.cuda()
    expected, *_ = plain(full, target, selected, full_teachers, weights)
    result = chunked_loss(half, target, selected, half_teachers, weights, rows=64)
    torch.testing.assert_close(result.loss, expected, rtol=1e-4, atol=1e-4)
    references = torch.autograd.grad(expected, leaves(full))
    for gradient, reference in zip(torch.autograd.grad(result.loss, leaves(half)), references):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.float(), reference, rtol=4 * torch.finfo(dtype).eps, atol=1e-2)
