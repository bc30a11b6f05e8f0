"""A run that was stopped ends as one that was not: the same weights, bit for bit, and the same queues."""

from types import SimpleNamespace

import pytest
import torch
from commands import Forked
from conftest import KD, SIZES, STRATEGIES, TRAINING, load, strategy_flags
from fairseq.trainer import Trainer

from kd_ext.upstream import patience

SHARED = ["--kd-queue-window", "shared"]


def is_trained(name):
    """Not upstream's eight dead parameters of an encoder layer, nor the uninitialized buffer of its positions."""
    dead = ("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias")
    dead += ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "_float_tensor")
    return not name.endswith(dead)


def assert_same_run(a, b):
    a, b = load(a), load(b)
    names = [name for name in a["model"] if is_trained(name)]
    assert len(names) > 40
    for name in names:
        assert torch.equal(a["model"][name], b["model"][name]), name
    queues_a, queues_b = (state["task_state"].get("kd", {}).get("queues", {}) for state in (a, b))
    assert queues_a.keys() == queues_b.keys()
    for name in queues_a:
        assert torch.equal(queues_a[name], queues_b[name]), name
    return queues_a


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stopped_and_resumed(distil, tmp_path, strategy):
    flags = ["--dropout", "0.1", "--no-epoch-checkpoints"]
    # 16 updates an epoch: the stop at 10 is in the middle of the first
    assert distil(tmp_path / "whole", *flags, "--max-update", 20, strategy=strategy).returncode == 0
    assert distil(tmp_path / "parts", *flags, "--max-update", 10, strategy=strategy).returncode == 0
    resumed = distil(tmp_path / "parts", *flags, "--max-update", 20, strategy=strategy)
    assert resumed.returncode == 0
    assert "Loaded checkpoint" in resumed.output
    queues = assert_same_run(tmp_path / "whole/checkpoint_last.pt", tmp_path / "parts/checkpoint_last.pt")
    expected = {"global_level": {"all"}, "global_language_wise": {"hi", "ta", "bn"}}
    assert queues.keys() == expected.get(strategy, set())
    if queues:
        assert sum(values.numel() for values in queues.values()) >= 700


def test_stopped_and_resumed_with_one_window_for_all_languages(distil, tmp_path):
    """The same run, and gates of a window that is full by then: 16 updates an epoch, of about 100 tokens."""
    flags = ["--dropout", "0.1", "--no-epoch-checkpoints", *SHARED]
    for folder, stops in (("whole", [20]), ("parts", [10, 20])):
        for stop in stops:
            done = distil(tmp_path / folder, *flags, "--max-update", stop, strategy="global_language_wise")
            assert done.returncode == 0, done.output
    assert "restored the queues of --kd-strategy global_language_wise --kd-queue-window shared" in done.output
    queues = assert_same_run(tmp_path / "whole/checkpoint_last.pt", tmp_path / "parts/checkpoint_last.pt")
    assert {name: values.numel() for name, values in queues.items()} == {"values": 300, "languages": 300}


@pytest.mark.parametrize(
    ("strategy", "others"),
    [("global_level", []), ("global_language_wise", []), ("global_language_wise", SHARED)],
    ids=["global_level", "global_language_wise", "shared"],
)
def test_killed_in_mid_epoch(distil, data, teacher, tmp_path, strategy, others):
    # 16 updates an epoch; saved after the 20th and at the end, so that the kill never comes while a file is written
    flags = [
        *others,
        "--dropout",
        "0.1",
        "--save-interval-updates",
        "20",
        "--save-interval",
        "99",
        "--max-update",
        "39",
    ]
    assert distil(tmp_path / "whole", *flags, strategy=strategy).returncode == 0
    save_dir = tmp_path / "killed"
    save_dir.mkdir()
    command = [data, *TRAINING, "--arch", "transformer", *SIZES, *KD, "--teacher-checkpoint-path", teacher]
    command += [*strategy_flags(strategy), "--save-dir", save_dir, *flags]
    process = Forked(tmp_path / "log", "fairseq-train", *command)
    process.kill_when(lambda: "num_updates=23," in process.output)
    saved = load(save_dir / "checkpoint_last.pt")
    assert saved["optimizer_history"][-1]["num_updates"] == 20
    resumed = distil(save_dir, *flags, strategy=strategy)
    assert resumed.returncode == 0, resumed.output
    assert_same_run(tmp_path / "whole/checkpoint_last.pt", save_dir / "checkpoint_last.pt")


# scores that never get better, one every second update: the fifth after the first ends the run
PATIENT = ["--optimizer", "sgd", "--lr", "0", "--save-interval-updates", "2", "--patience", "5"]


def test_patience_counts_on(distil, tmp_path):
    for save_dir, stops in ((tmp_path / "whole", [20]), (tmp_path / "parts", [4, 6, 10, 20])):
        for stop in stops:
            assert distil(save_dir, *PATIENT, "--max-update", stop).returncode == 0
        assert load(save_dir / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 12
        again = distil(save_dir, *PATIENT, "--max-update", 20)
        assert "--patience 5: the checkpoint has had 5 validations" in again.output
        assert load(save_dir / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 12


def test_patience_starts_anew_with_the_optimizer(distil, tmp_path):
    assert distil(tmp_path, *PATIENT, "--max-update", 8).returncode == 0
    assert distil(tmp_path, *PATIENT, "--max-update", 20, "--reset-optimizer").returncode == 0
    assert load(tmp_path / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 12


def test_patience_is_of_a_run(distil, tmp_path):
    """Another one that begins from its checkpoint counts from the start."""
    assert distil(tmp_path / "first", *PATIENT, "--max-update", 20).returncode == 0
    start = ["--restore-file", tmp_path / "first" / "checkpoint_last.pt", "--reset-dataloader"]
    assert distil(tmp_path / "second", *PATIENT, *start, "--max-update", 30).returncode == 0
    assert load(tmp_path / "second" / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 24


def test_what_another_run_of_the_process_has_counted(monkeypatch):
    counting = SimpleNamespace(best=1.0, num_runs=7)
    monkeypatch.setattr(patience, "counter", lambda: counting)
    nothing = SimpleNamespace(
        **{"task": None, "data_parallel_world_size": 1, "data_parallel_rank": 0},
        cfg=SimpleNamespace(checkpoint=SimpleNamespace(save_dir="nowhere")),
        get_model=lambda: None,
    )
    assert Trainer.load_checkpoint(nothing, "nowhere/checkpoint_last.pt") is None
    assert vars(counting) == {}


def test_without_an_optimizers_state_nothing_goes_on(distil, tmp_path):
    """fairseq would begin at update 0, in the middle of the data."""
    assert distil(tmp_path, "--max-update", 4, "--no-save-optimizer-state").returncode == 0
    before = (tmp_path / "checkpoint_last.pt").read_bytes()
    result = distil(tmp_path, "--max-update", 6)
    assert result.returncode != 0
    assert result.last_line.startswith(
        f"kd_ext: error: {tmp_path}/checkpoint_last.pt: it has no optimizer state, from "
    )
    assert (tmp_path / "checkpoint_last.pt").read_bytes() == before
    for nothing in (None, {}):  # as scripts leave it
        torch.save({**load(tmp_path / "checkpoint_last.pt"), "last_optimizer_state": nothing}, tmp_path / "emptied.pt")
        result = distil(tmp_path / "other", "--max-update", 6, "--restore-file", tmp_path / "emptied.pt")
        assert result.last_line.startswith(f"kd_ext: error: {tmp_path}/emptied.pt: it has no optimizer state, from ")
    reset = ["--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler"]
    assert distil(tmp_path, "--max-update", 2, *reset).returncode == 0


def test_given_again_after_its_time(distil, tmp_path):
    flags = ["--stop-time-hours", "1e-9"]
    assert distil(tmp_path, *flags).returncode == 0
    again = distil(tmp_path, *flags)
    assert again.returncode == 0
    assert "--stop-time-hours 1e-09: the checkpoint was trained for longer: nothing is left" in again.output
    last = tmp_path / "checkpoint_last.pt"
    assert load(last)["optimizer_history"][-1]["num_updates"] == 1
    # fairseq hands the time of the first run on to one that begins from its weights
    assert distil(tmp_path / "other", *flags, "--finetune-from-model", last).returncode == 0
    assert load(tmp_path / "other" / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"] == 1


def test_given_again_after_its_end(distil, tmp_path):
    flags = ["--dropout", "0.1", "--max-update", 5]
    first = distil(tmp_path, *flags)
    checkpoint = tmp_path / "checkpoint_last.pt"
    saved = checkpoint.read_bytes()
    again = distil(tmp_path, *flags)  # fairseq alone makes a sixth update
    assert (first.returncode, again.returncode) == (0, 0)
    assert "--max-update 5: the checkpoint has had 5 updates: nothing is left to train" in again.output
    assert checkpoint.read_bytes() == saved
    assert distil(tmp_path, *flags[:2], "--max-update", 6).returncode == 0
    assert load(checkpoint)["optimizer_history"][-1]["num_updates"] == 6


def test_reset_optimizer_starts_with_empty_queues(distil, tmp_path):
    strategy = "global_level"
    assert distil(tmp_path, "--max-update", 5, strategy=strategy).returncode == 0
    result = distil(tmp_path, "--reset-optimizer", "--reset-dataloader", "--max-update", 1, strategy=strategy)
    assert result.returncode == 0
    assert "restored the queues" not in result.output


def test_another_strategy_on_resume_is_said(distil, tmp_path):
    assert distil(tmp_path, "--max-update", 5, strategy="global_level").returncode == 0
    result = distil(tmp_path, "--max-update", 6, strategy="global_language_wise")
    assert result.returncode == 0
    assert "no queues of --kd-strategy global_language_wise (its own: global_level)" in result.output


@pytest.mark.parametrize(("before", "after"), [([], SHARED), (SHARED, [])], ids=["to shared", "to each"])
def test_another_window_on_resume_is_said(distil, tmp_path, before, after):
    """The queues start empty: what one kind holds, the other does not."""
    strategy = "global_language_wise"
    assert distil(tmp_path, *before, "--max-update", 5, strategy=strategy).returncode == 0
    result = distil(tmp_path, *after, "--max-update", 6, strategy=strategy)
    assert result.returncode == 0, result.output
    names = [" ".join([strategy, *flags]) for flags in (after, before)]
    assert "no queues of --kd-strategy {} (its own: {}); they start empty".format(*names) in result.output
    queues = load(tmp_path / "checkpoint_last.pt")["task_state"]["kd"]["queues"]
    assert 0 < sum(values.numel() for values in queues.values()) <= 2 * 200  # of one update alone
