"""The gradients of two workers under each wrapper of the model are those of one process with both batches."""

import multiprocessing

import numpy as np
import pytest
import torch
from fairseq.distributed import LegacyDistributedDataParallel, ModuleProxyWrapper
from stubs import Run, random_batch, to_sample
from test_output_projection import transformer
from torch.nn.parallel import DistributedDataParallel

from kd_ext.models.layers import drop_dead_parameters
from kd_ext.models.output_projection import find_projection
from kd_ext.modules.teacher import Teacher

WORKERS, STEPS = 2, 3
# with torch's own wrapper upstream's dead parameters need --find-unused-parameters
BACKENDS = {
    "legacy_ddp": lambda model: LegacyDistributedDataParallel(model, torch.distributed.group.WORLD),
    "pytorch_ddp": DistributedDataParallel,
    "pytorch_ddp, unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
}


def build(tied, has_dead):
    torch.manual_seed(0)
    run = Run("word_seq_level", alpha=0.3)
    teacher, student = (transformer(run.task, share_decoder_input_output_embed=tied) for _ in range(2))
    run.criterion.teacher = Teacher([teacher], [find_projection(teacher)])
    if not has_dead:
        drop_dead_parameters(student)
    return run, student


def sample_of(run, rank, step):
    rng = np.random.default_rng(10 * step + rank)
    sample = to_sample(run.words, random_batch(rng, ["hi", "ta", "bn", "hi"][rank:]))
    sample["net_input"]["src_lengths"] = sample["net_input"]["src_tokens"].ne(run.words.pad()).sum(1)
    return sample


def gradients_of(model):
    return {name: p.grad.tolist() for name, p in model.named_parameters() if p.grad is not None}


def worker(rank, backend, tied, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS)
    run, student = build(tied, has_dead=backend != "pytorch_ddp")
    wrapped = ModuleProxyWrapper(BACKENDS[backend](student))
    for step in range(STEPS):
        student.zero_grad()
        run.criterion(wrapped, sample_of(run, rank, step))[0].backward()
        if backend == "legacy_ddp":
            wrapped.all_reduce_grads()
    results.put((gradients_of(student), run.criterion._find_projection(wrapped) is None))
    torch.distributed.barrier()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_workers_have_the_gradients_of_one(backend, tied, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = [(rank, backend, tied, tmp_path / "store", results) for rank in range(WORKERS)]
    processes = [context.Process(target=worker, args=of_rank, daemon=True) for of_rank in arguments]
    for process in processes:
        process.start()
    found = [results.get(timeout=100) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0

    run, student = build(tied, has_dead=backend != "pytorch_ddp")
    for rank in range(WORKERS):
        run.criterion(student, sample_of(run, rank, STEPS - 1))[0].backward()
    expected = gradients_of(student)
    for gradients, is_plain in found:
        assert is_plain == ("unused" in backend)  # the formulation that needs nothing outside of forward
        for name, values in expected.items():
            np.testing.assert_allclose(gradients[name], np.array(values) / WORKERS, rtol=1e-5, atol=1e-5, err_msg=name)
