"""A teacher or a dictionary that is another when a run is resumed: said in one line, before anything is trained."""

import shutil

import pytest
import torch
from commands import PLUGIN, run
from conftest import KD, SIZES, TRAINING, load, strategy_flags
from fairseq.models.transformer import TransformerModel
from test_resume import assert_same_run

from kd_ext.errors import ConfigError
from kd_ext.teachers.load import _identity

BEGIN_ANEW = ["--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler"]


@pytest.fixture
def attempt(data, tmp_path):
    """Runs fairseq-train with a copy of the data, and with a teacher if there is one at ``tmp_path/teacher``."""
    (tmp_path / "teacher").mkdir()
    shutil.copytree(data, tmp_path / "data")
    teacher = tmp_path / "teacher" / "model.pt"

    def attempt(*flags, save_dir=tmp_path / "student"):
        distilled = ["--teacher-checkpoint-path", teacher, *strategy_flags("global_level")]
        flags = [*flags, *(distilled if teacher.exists() else ["--alpha", "0"])]
        command = [tmp_path / "data", *TRAINING, "--arch", "transformer", *SIZES, *KD, "--save-dir", save_dir]
        return run(tmp_path / "log", "fairseq-train", *command, *flags)

    return attempt


def test_another_teacher(attempt, teacher, student, tmp_path):
    file = tmp_path / "teacher" / "model.pt"
    shutil.copy(teacher, file)
    assert attempt("--max-update", 10, save_dir=tmp_path / "whole").returncode == 0
    assert attempt("--max-update", 5).returncode == 0
    before = (tmp_path / "student" / "checkpoint_last.pt").read_bytes()

    shutil.copy(student, file)
    result = attempt("--max-update", 10)
    assert result.returncode != 0
    expected = f"kd_ext: error: --teacher-checkpoint-path {file}: not the teacher that the checkpoint was trained "
    assert result.last_line.startswith(expected)
    assert "--finetune-from-model CHECKPOINT" in result.last_line
    assert (tmp_path / "student" / "checkpoint_last.pt").read_bytes() == before
    # the two ways that the message names
    first, second = tmp_path / "first", tmp_path / "second"
    weights = ["--finetune-from-model", tmp_path / "student" / "checkpoint_last.pt"]
    assert attempt("--max-update", 2, *weights, save_dir=first).returncode == 0
    shutil.copytree(tmp_path / "student", second)
    assert attempt("--max-update", 2, *BEGIN_ANEW, save_dir=second).returncode == 0
    for save_dir in (first, second):  # they go on from there by themselves
        result = attempt("--max-update", 3, save_dir=save_dir)
        assert result.returncode == 0, result.output
        assert "@ 2 updates" in result.output

    # the teacher that it was, saved anew: other bytes, the same weights

    torch.save(load(teacher), file)
    assert file.read_bytes() != teacher.read_bytes()
    assert attempt("--max-update", 10).returncode == 0
    assert_same_run(tmp_path / "whole" / "checkpoint_last.pt", tmp_path / "student" / "checkpoint_last.pt")


def swap(lines):
    return [lines[1], lines[0], *lines[2:]]


def lengthen(lines):
    return [*lines, "another 1"]


def count_anew(lines):
    return [f"{line.split()[0]} {i}" for i, line in enumerate(lines)]


def change(tmp_path, side, how):
    file = tmp_path / "data" / f"dict.{side}.txt"
    file.write_text("\n".join(how(file.read_text().splitlines())) + "\n")


@pytest.mark.parametrize(("side", "name", "flag"), [("src", "source", "--srcdict"), ("tgt", "target", "--tgtdict")])
def test_other_dictionaries(attempt, tmp_path, side, name, flag):
    assert attempt("--max-update", 3).returncode == 0
    change(tmp_path, side, count_anew)
    assert attempt("--max-update", 4).returncode == 0
    before = (tmp_path / "student" / "checkpoint_last.pt").read_bytes()
    for how in (swap, lengthen):
        change(tmp_path, side, how)
        result = attempt("--max-update", 5)
        assert result.returncode != 0
        expected = f"kd_ext: error: {tmp_path}/data: its {name} dictionary is not the one that the checkpoint was "
        assert result.last_line.startswith(expected)
        assert flag in result.last_line
        assert "Traceback" not in result.output
        assert (tmp_path / "student" / "checkpoint_last.pt").read_bytes() == before


def test_other_dictionaries_of_upstreams_own_task(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    command = [tmp_path / "data", *TRAINING, "--arch", "transformer", *SIZES, "--save-dir", tmp_path / "student"]
    command += ["--criterion", "label_smoothed_cross_entropy"]
    assert run(tmp_path / "log", "fairseq-train", *command, "--max-update", 2).returncode == 0
    assert run(tmp_path / "log", "fairseq-train", *command, "--max-update", 3).returncode == 0
    change(tmp_path, "tgt", swap)
    result = run(tmp_path / "log", "fairseq-train", *command, "--max-update", 4)
    assert result.returncode != 0
    expected = f"kd_ext: error: {tmp_path}/data: its target dictionary is not the one that the checkpoint was trained"
    assert result.last_line.startswith(expected)
    weights = ["--finetune-from-model", tmp_path / "student" / "checkpoint_last.pt", "--save-dir", tmp_path / "other"]
    result = run(tmp_path / "log", "fairseq-train", *command, *weights, "--max-update", 1)
    assert result.returncode == 0
    assert "the target dictionary is not that of the checkpoint" in result.output
    # a distilled student that begins from there
    distilled = [*command[:-2], *weights[:3], tmp_path / "third", *KD, "--alpha", 0]
    result = run(tmp_path / "log", "fairseq-train", *distilled, "--max-update", 1)
    assert result.returncode == 0
    assert "the target dictionary is not that of the checkpoint" in result.output


@pytest.mark.parametrize("trained", ["student", "teacher"])
def test_a_teacher_beside_other_dictionaries(request, attempt, trained, tmp_path):
    """One that was trained with the plugin knows which are its own; without that, both sides would be wrong alike."""
    shutil.copy(request.getfixturevalue(trained), tmp_path / "teacher" / "model.pt")
    overrides = ["--teacher-model-overrides", f"{{'data': '{tmp_path}/data'}}"]
    assert attempt("--max-update", 1, *overrides).returncode == 0
    change(tmp_path, "tgt", swap)
    result = attempt("--max-update", 1, *overrides, save_dir=tmp_path / "other")
    assert result.returncode != 0
    expected = (
        f"{tmp_path}/teacher/model.pt: the target dictionary in {tmp_path}/data is not the one that it was trained"
    )
    assert result.last_line.startswith(f"kd_ext: error: --teacher-checkpoint-path {expected}")


def test_other_words_to_begin_anew_with_are_said(attempt, tmp_path):
    assert attempt("--max-update", 3).returncode == 0
    change(tmp_path, "src", swap)
    weights = ["--finetune-from-model", tmp_path / "student" / "checkpoint_last.pt"]
    result = attempt("--max-update", 1, *weights, save_dir=tmp_path / "other")
    assert result.returncode == 0
    assert "the source dictionary is not that of the checkpoint: its embeddings" in result.output
    assert "the target dictionary" not in result.output


@pytest.mark.parametrize("command", ["fairseq-generate", "fairseq-validate", "fairseq-interactive"])
@pytest.mark.parametrize("architecture", ["student", "upstream"])
def test_using_a_model_with_other_dictionaries(request, attempt, data, tmp_path, command, architecture):
    """Of a distilled student, and of a model of fairseq's own task and criterion."""
    if architecture == "student":
        assert attempt("--max-update", 1).returncode == 0
    else:
        flags = [*TRAINING, "--arch", "transformer", *SIZES, "--criterion", "label_smoothed_cross_entropy"]
        flags += ["--save-dir", tmp_path / "student", "--max-update", 1]
        assert run(tmp_path / "log", "fairseq-train", data, *flags).returncode == 0
    path = tmp_path / "student" / "checkpoint_last.pt"
    flags = [tmp_path / "data", *PLUGIN, "--cpu", "--max-tokens", 400, "--path", path]
    change(tmp_path, "src", count_anew)
    assert run(tmp_path / "log", command, *flags).returncode == 0
    for how in (swap, lengthen):
        change(tmp_path, "src", how)
        result = run(tmp_path / "log", command, *flags)
        assert result.returncode != 0
        expected = f"{tmp_path}/data: its source dictionary is not the one that {path} was trained with; preprocess"
        assert result.last_line.startswith(f"kd_ext: error: {expected}")
        assert "Traceback" not in result.output


def test_from_python_with_other_dictionaries(attempt, tmp_path):
    assert attempt("--max-update", 1).returncode == 0
    folder = tmp_path / "student"
    given = {"checkpoint_file": "checkpoint_last.pt", "data_name_or_path": str(tmp_path / "data")}
    TransformerModel.from_pretrained(str(folder), **given)
    change(tmp_path, "tgt", swap)
    with pytest.raises(ConfigError, match=r"its target dictionary is not the one that .* was trained"):
        TransformerModel.from_pretrained(str(folder), **given)


def test_adapters_on_frozen_embeddings_of_other_words(attempt, tmp_path):
    """Those that are frozen can never come to belong to the other words."""
    assert attempt("--max-update", 1).returncode == 0
    change(tmp_path, "src", swap)
    adapters = ["--arch", "transformer_adapter", "--load-checkpoint-liberally", "--encoder-add-adapters"]
    adapters += ["--encoder-adapter-ids", "hi", "--encoder-train-adapter", "hi", "--max-update", 1]
    path = tmp_path / "student" / "checkpoint_last.pt"
    result = attempt(*adapters, "--finetune-from-model", path, save_dir=tmp_path / "other")
    assert result.returncode != 0
    expected = f"{tmp_path}/data: its source dictionary is not the one that the checkpoint, whose embeddings "
    assert result.last_line.startswith(f"kd_ext: error: {expected}--encoder-train-adapter hi freezes, was trained with")
    assert "Traceback" not in result.output


def test_validating_with_other_dictionaries(attempt, tmp_path):
    assert attempt("--max-update", 3).returncode == 0
    flags = [tmp_path / "data", *PLUGIN, "--task", "translation_with_kd", "--cpu", "--max-tokens", "400"]
    flags += ["--path", tmp_path / "student" / "checkpoint_last.pt"]
    assert run(tmp_path / "log", "fairseq-validate", *flags).returncode == 0
    change(tmp_path, "tgt", swap)
    result = run(tmp_path / "log", "fairseq-validate", *flags)
    assert result.returncode != 0
    assert result.last_line.startswith(f"kd_ext: error: {tmp_path}/data: its target dictionary is not the one that ")


def test_what_tells_a_teacher_from_others():
    """Its overrides do, but for where dictionaries are, and the order of an ensemble does not."""
    assert _identity(["b", "a"], {}) == _identity(["a", "b"], {"data": "x"})
    assert len({_identity(["a"], x) for x in ({}, {"activation_fn": "gelu"}, {"activation_fn": "relu"})}) == 3
    assert _identity(["a"], {"x": 1, "y": 2}) == _identity(["a"], {"y": 2, "x": 1})
