"""Two workers: the selection against an oracle that is fed both batches, and whole runs against one process."""

import copy
import multiprocessing
import re
import subprocess

import numpy as np
import pytest
import torch
from commands import ENVIRONMENT, launcher, script
from conftest import KD, SIZES, TRAINING, load, strategy_flags
from kd_oracle import Oracle
from stubs import LANGUAGES, Run, random_batch

WORKERS = 2
FLAGS = {
    "global_level": {"kd_rate": 0.4, "kd_queue_size": 30},
    "global_language_wise": {"kd_rate": 0.4, "kd_queue_size": 9},
    "shared": {"kd_rate": 0.4, "kd_queue_size": 25, "kd_queue_window": "shared"},
}


def batches_of(step):
    """The two batches of a step: uneven, one of them empty in step 3, one language on one worker alone."""
    rng = np.random.default_rng(100 + step)
    languages = [["hi", "bn", "hi"] + ["hi"] * 4 * (step % 3), ["ta"] if step < 2 else ["ta", "hi", "ta"]]
    batches = [random_batch(rng, names) for names in languages]
    if step == 3:
        batches[1] = []
    return batches


def worker(rank, strategy, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORKERS)
    run = Run({"shared": "global_language_wise"}.get(strategy, strategy), **FLAGS[strategy])
    outcomes = []
    for step in range(6):
        batch = batches_of(step)[rank]
        # a worker without a batch is given another's, as upstream does
        loss, logged = run.forward(batch or batches_of(0)[1], **({} if batch else {"is_dummy": True}))
        run.task.selector.commit()
        queues = run.task.state_dict()["kd"]["queues"]
        logged = {name: float(value) for name, value in logged.items()}
        outcomes.append((loss.item(), logged, {name: v.tolist() for name, v in queues.items()}))
    results.put((rank, outcomes))
    torch.distributed.barrier()


def check_pools(logged, batches, rank, gate):
    """Each worker logs its own tokens, and the gates of all."""
    there = {language for batch in batches for language, *_ in batch}
    for name in LANGUAGES:
        own = sum(len(targets) for language, targets, _, _ in batches[rank] if language == name)
        assert logged[f"kd_tokens_{name}"] == own
        assert logged[f"kd_gates_{name}"] == (name in there)
        assert logged[f"kd_gate_{name}"] == pytest.approx(gate(name) if name in there else 0.0, rel=1e-5)


@pytest.mark.parametrize("strategy", FLAGS)
def test_every_worker_has_the_same_queue(strategy, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=worker, args=(r, strategy, tmp_path / "store", results)) for r in range(WORKERS)
    ]
    for process in processes:
        process.start()
    outcomes = dict(results.get(timeout=100) for _ in processes)
    for process in processes:
        process.join(60)

    name, window = ("global_language_wise", "shared") if strategy == "shared" else (strategy, "each")
    oracle = Oracle(name, rate=0.4, queue_size=FLAGS[strategy]["kd_queue_size"], window=window)
    for step in range(6):
        batches = batches_of(step)
        gate = copy.deepcopy(oracle).gates(batches)[0]  # which pushes, as a step does
        expected = oracle.step(batches)
        for rank in range(WORKERS):
            loss, logged, queues = outcomes[rank][step]
            assert queues == outcomes[0][step][2]
            # logged outputs are summed over the workers: all must have the same names
            assert logged.keys() == outcomes[0][step][1].keys()
            assert logged["kd_selected"] == len(expected[rank]["selected"])
            if batches[rank]:
                assert loss == pytest.approx(expected[rank]["loss"], rel=1e-5)
            if strategy != "global_level":
                check_pools(logged, batches, rank, gate)
            if strategy == "shared":
                languages, expected_queue = zip(*oracle.queues["shared"])
                assert [LANGUAGES[i] for i in queues["languages"]] == list(languages)
                np.testing.assert_allclose(queues["values"], expected_queue, rtol=1e-5)
                continue
            for name in LANGUAGES if strategy == "global_language_wise" else ["all"]:
                np.testing.assert_allclose(queues.get(name, []), oracle.queues.get(name, []), rtol=1e-5)


def losses(output):
    return [float(x) for x in re.findall(r"train_inner .*? loss=([\d.]+)", output)]


def run_two_workers(data, save_dir, *flags):
    command = [*launcher(WORKERS), script("fairseq-train"), data, *TRAINING, "--arch", "transformer", *SIZES, *flags]
    command += ["--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp", "--save-dir", save_dir]
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("strategy", ["word_seq_level", "batch_level"])
def test_two_workers_train_as_one_with_update_freq_2(data, teacher, train, tmp_path, strategy):
    flags = [*KD, "--teacher-checkpoint-path", teacher, *strategy_flags(strategy), "--dropout", "0"]
    flags += ["--max-update", "10"]  # 8 updates an epoch: the shards of the second begin anew
    two = losses(run_two_workers(data, tmp_path / "two", *flags))
    one = losses(train(tmp_path / "one", *flags, "--update-freq", "2").output)
    assert len(one) == 10
    np.testing.assert_allclose(two, one, atol=2e-3)  # the log has three digits
    weights = [load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("one", "two")]
    for name in weights[0]:
        if "_float_tensor" not in name:
            torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=2e-4)


def test_two_workers_resume_with_the_same_queues(data, teacher, tmp_path):
    """Rank 0 alone reads the checkpoint: the other must be given the queues, or their gates would part."""
    flags = [*KD, "--teacher-checkpoint-path", teacher, *strategy_flags("global_level"), "--dropout", "0.1"]
    run_two_workers(data, tmp_path / "whole", *flags, "--max-update", "10")
    run_two_workers(data, tmp_path / "parts", *flags, "--max-update", "5")
    output = run_two_workers(data, tmp_path / "parts", *flags, "--max-update", "10")
    assert "restored the queues" in output
    whole, parts = (load(tmp_path / name / "checkpoint_last.pt") for name in ("whole", "parts"))
    assert torch.equal(whole["task_state"]["kd"]["queues"]["all"], parts["task_state"]["kd"]["queues"]["all"])
    assert torch.equal(whole["model"]["decoder.embed_tokens.weight"], parts["model"]["decoder.embed_tokens.weight"])


def test_a_worker_whose_shard_has_run_out(data, teacher, train, tmp_path):
    """15 batches an epoch: in the 8th update the second worker has none. Its stand-in is in no queue."""
    flags = [*KD, "--teacher-checkpoint-path", teacher, "--kd-strategy", "global_level", "--dropout", "0"]
    # at a rate of 1 all tokens are selected, whatever is in the queue when a batch comes
    flags += ["--kd-rate", "1", "--kd-queue-size", "100000", "--max-tokens", "220", "--max-update", "10"]
    two = losses(run_two_workers(data, tmp_path / "two", *flags))
    one = losses(train(tmp_path / "one", *flags, "--update-freq", "2").output)
    assert len(one) == 10
    np.testing.assert_allclose(two, one, atol=2e-3)
    states = [load(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two")]
    queues = [state["task_state"]["kd"]["queues"]["all"] for state in states]
    torch.testing.assert_close(queues[0], queues[1], rtol=1e-3, atol=1e-3)
