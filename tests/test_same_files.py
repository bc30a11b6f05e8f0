"""Workers that find different files under one name are told so, all of them, before the first update."""

import re
import shutil

import pytest
from commands import Result, run_two_workers
from conftest import KD, SIZES, TRAINING, strategy_flags
from test_bad_usage import assert_refused

ALONE = [*KD, "--alpha", 0]


@pytest.fixture
def train_on_two(data, teacher, tmp_path):
    """Trains two workers; `own` is what each is given beside the flags."""

    def train_on_two(*flags, own=((), ()), data_of=(data, data)):
        command = [*TRAINING, "--arch", "transformer", *SIZES, "--save-dir", tmp_path, "--ddp-backend", "legacy_ddp"]
        own = [[path, *others] for path, others in zip(data_of, own)]
        results = run_two_workers(tmp_path, "fairseq-train", *command, *flags, own=own)
        # torch puts a worker's rank before each line of an error
        return [Result(code, re.sub(r"^\[rank\d+\]: ", "", output, flags=re.MULTILINE)) for code, output in results]

    return train_on_two


@pytest.fixture
def with_teacher(teacher):
    return [*KD, *strategy_flags("word_level"), "--teacher-checkpoint-path", teacher]


def test_a_checkpoint_that_one_of_them_has(train_on_two, with_teacher, tmp_path):
    """Each has a folder of its own. With fairseq alone a run that is started again waits for ever."""
    own = [["--save-dir", tmp_path / name] for name in "ab"]
    results = train_on_two(*with_teacher, "--max-update", 3, own=own)
    assert [result.returncode for result in results] == [0, 0], results
    assert not (tmp_path / "b").exists()
    before = (tmp_path / "a/checkpoint_last.pt").read_bytes()
    parts = ["worker 0: checkpoint_last.pt is there", "worker 1: checkpoint_last.pt is not there", "machines share"]
    for name, result in zip("ab", train_on_two(*with_teacher, "--max-update", 6, own=own)):
        assert_refused(result, tmp_path, f"--save-dir {tmp_path / name}: ", *parts)
    assert (tmp_path / "a/checkpoint_last.pt").read_bytes() == before
    # the same by a copy on each
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    results = train_on_two(*with_teacher, "--max-update", 6, own=own)
    assert [result.returncode for result in results] == [0, 0], results


@pytest.mark.parametrize("flag", ["--restore-file", "--finetune-from-model"])
def test_a_checkpoint_to_begin_from(train_on_two, with_teacher, teacher, flag, tmp_path):
    own = [[flag, tmp_path / "missing.pt"], [flag, teacher]]
    parts = [flag, "worker 0: missing.pt is not there", f"worker 1: {teacher.name} is there"]
    for result in train_on_two(*with_teacher, "--max-update", 3, own=own):
        assert_refused(result, tmp_path, *parts)


def test_another_teacher(train_on_two, with_teacher, teacher, student, tmp_path):
    *others, flag, _ = with_teacher
    own = [[flag, teacher], [flag, student]]
    for path, result in zip((teacher, student), train_on_two(*others, "--max-update", 3, own=own)):
        assert_refused(
            result, tmp_path, f"--teacher-checkpoint-path {path}: ", "worker 1: teacher ", "the same teacher"
        )


def test_other_words(train_on_two, data, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    words = (other / "dict.tgt.txt").read_text().splitlines()
    (other / "dict.tgt.txt").write_text("\n".join([words[1], words[0], *words[2:], ""]))
    for path, result in zip((data, other), train_on_two(*ALONE, "--max-update", 3, data_of=(data, other))):
        assert_refused(result, tmp_path, f"{path}: ", "worker 1: target dictionary ", "the same data")


def test_other_sentences(train_on_two, data, tmp_path):
    """Under the same dictionaries."""
    other = shutil.copytree(data, tmp_path / "other")
    for path in other.glob("train.*"):
        path.write_bytes(path.with_name(path.name.replace("train", "valid")).read_bytes())
    for path, result in zip((data, other), train_on_two(*ALONE, "--max-update", 3, data_of=(data, other))):
        assert_refused(result, tmp_path, f"{path}: ", "worker 0: 300 training", "worker 1: 40 training", "same data")
