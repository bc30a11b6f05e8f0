"""--run-sanity-validation-steps: one pass before the first update, that leaves no other trace."""

import random
import re
import shutil
from types import SimpleNamespace

import fairseq_cli.train
import numpy as np
import pytest
import torch
from commands import run
from conftest import KD, SIZES, TRAINING, load, strategy_flags
from fairseq.logging import progress_bar

from kd_ext.upstream import sanity_validation

SANITY = "--run-sanity-validation-steps"
# dropout, and a dataset that is shuffled: whatever draws random numbers out of turn shows
RANDOM = ["--criterion", "label_smoothed_cross_entropy", "--dropout", "0.3", "--seed", "3"]


def state(folder, name="checkpoint_last.pt"):
    return load(folder / name)


def same_weights(one, other):
    ours, theirs = state(one)["model"], state(other)["model"]
    return all(torch.equal(ours[name], theirs[name]) for name in ours if "_float_tensor" not in name)


def lines(output, pattern):
    return [line for line in output.splitlines() if re.search(pattern, line)]


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    """The same run without and with the flag, stopped after an epoch and resumed; two validation subsets."""
    made = {}
    for flags in ([], [SANITY]):
        folder = tmp_path_factory.mktemp("sanity")
        both = [*RANDOM, *flags, "--valid-subset", "valid,test", "--validate-interval-updates", "10", "--patience", "2"]
        first = train(folder, *both, "--max-update", "25")
        resumed = train(folder, *both, "--max-update", "40")
        assert (first.returncode, resumed.returncode) == (0, 0), first.output + resumed.output
        made[bool(flags)] = folder, first.output, resumed.output
    return made


@pytest.mark.parametrize("run", [1, 2], ids=["fresh", "resumed"])
def test_one_full_pass_before_the_first_update(runs, run):
    output = runs[True][run]
    reports = lines(output, r"\| sanity_\w+ \|")
    assert [re.search(r"\| (sanity_\w+) \|", line).group(1) for line in reports] == ["sanity_valid", "sanity_test"]
    assert all(f"num_updates {(0, 25)[run - 1]}" in line and " loss " in line for line in reports)
    assert output.index("sanity_test") < output.index("train_inner")
    assert not lines(runs[False][run], r"\| sanity_")


def test_the_weights_are_those_of_a_run_without_it(runs):
    assert same_weights(runs[True][0], runs[False][0])


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(monkeypatch, fails):
    """fairseq seeds torch before each update, so that runs can agree by luck; a loader's workers are not so lucky."""
    dataset = SimpleNamespace(valid_subset="valid,test", max_valid_steps=3)
    trainer = SimpleNamespace(cfg=SimpleNamespace(dataset=dataset), task=None, _dummy_batch="train")
    seen = []

    def validate(cfg, trainer, task, epoch_itr, subsets):
        seen.append((subsets, cfg.dataset.max_valid_steps))
        trainer._dummy_batch = "valid"
        random.random(), np.random.rand(), torch.rand(1)
        if fails:
            raise RuntimeError("no such metric")

    monkeypatch.setattr(fairseq_cli.train, "validate", validate)
    bar = progress_bar.progress_bar
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    try:
        sanity_validation._validate(trainer, None)
    except RuntimeError:
        assert fails
    assert seen == [(["valid", "test"], None)]
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state
    assert (trainer._dummy_batch, dataset.max_valid_steps) == ("train", 3)
    assert progress_bar.progress_bar is bar


def test_scores_patience_and_files_are_those_of_a_run_without_it(runs):
    names = [sorted(p.name for p in runs[flag][0].glob("*.pt")) for flag in (True, False)]
    assert names[0] == names[1]
    with_it, without = (state(runs[flag][0])["extra_state"] for flag in (True, False))
    for key in ("best", "val_loss", "train_iterator"):
        assert with_it[key] == without[key]
    for attempt in (1, 2):
        reports = [
            [line.split("|", 1)[1].split("| wps")[0] for line in lines(runs[flag][attempt], r"INFO \| valid \|")]
            for flag in (True, False)
        ]
        assert reports[0] == reports[1]
        assert reports[0]


def test_an_error_in_validation_comes_before_the_first_update(data, tmp_path):
    damaged = tmp_path / "data"
    shutil.copytree(data, damaged)
    binary = damaged / "valid.src-tgt.tgt.bin"
    binary.write_bytes(b"\xff\xff" + binary.read_bytes()[2:])  # a word that is in no dictionary
    command = [damaged, *TRAINING, "--arch", "transformer", *SIZES, *RANDOM, "--max-update", "5"]
    for flags, trained in (([], True), ([SANITY], False)):
        result = run(tmp_path / "log", "fairseq-train", *command, *flags, "--save-dir", tmp_path / "run")
        assert result.returncode != 0
        assert "index out of range" in result.output
        assert ("train_inner" in result.output) is trained
        assert not list((tmp_path / "run").glob("*.pt"))


def test_the_pass_is_full_and_fills_no_queue(train, teacher, tmp_path):
    """With distillation: only training steps push tokens into the queues, and --max-valid-steps is for later."""
    flags = [*KD, "--teacher-checkpoint-path", teacher, *strategy_flags("global_level"), "--max-valid-steps", "0"]
    made = []
    for extra in ([], [SANITY]):
        folder = tmp_path / str(len(extra))
        result = train(folder, *flags, *extra, "--max-update", "3")
        assert result.returncode == 0, result.output
        made.append((folder, result.output))
    queues = [state(folder)["task_state"]["kd"]["queues"] for folder, _ in made]
    assert all(torch.equal(queues[0][name], queues[1][name]) for name in queues[0])
    assert same_weights(made[0][0], made[1][0])
    sentences = [
        float(re.search(r"\| bsz ([\d.]+)", line).group(1)) for line in lines(made[1][1], r"\| (sanity_)?valid \|")
    ]
    assert sentences[0] != sentences[-1]  # the mean over all batches, and that of the first alone
