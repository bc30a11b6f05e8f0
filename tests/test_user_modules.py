"""A user's own module beside this plugin: one folder that imports both."""

import shutil

import pytest
import torch
from commands import ROOT, run, run_as_typed
from conftest import KD, SIZES, TRAINING, load
from test_teacher import USER_MODULE

OWN = TRAINING[2:]  # without --user-dir


@pytest.fixture
def both(tmp_path):
    """A folder as the documentation has it."""
    module = tmp_path / "my_project"
    module.mkdir()
    (module / "__init__.py").write_text("import kd_ext\nfrom my_project import models\n")
    (module / "models.py").write_text(USER_MODULE)
    return module


def test_a_student_of_ones_own_architecture(data, teacher, both, tmp_path):
    flags = [data, *OWN, "--user-dir", both, *KD, "--arch", "somebodys_model", *SIZES, "--max-update", "2"]
    flags += ["--teacher-checkpoint-path", teacher, "--save-dir", tmp_path / "student"]
    result = run(tmp_path / "log", "fairseq-train", *flags)
    assert result.returncode == 0, result.output
    assert "kd_kl" in result.output
    path = tmp_path / "student" / "checkpoint_last.pt"
    translate = [data, "--path", path, "--cpu", "--beam", "2", "--gen-subset", "test"]
    result = run(tmp_path / "log", "fairseq-generate", *translate, "--user-dir", both)
    assert result.returncode == 0, result.output
    assert "H-0" in result.output
    result = run(tmp_path / "log", "fairseq-generate", *translate, "--user-dir", ROOT / "kd_ext")
    assert result.returncode != 0
    assert result.last_line.startswith(f"kd_ext: error: {path}: its architecture 'somebodys_model' is not registered")
    assert "--user-dir" in result.last_line


def test_an_architecture_in_the_older_layout(data, teacher, tmp_path):
    from test_old_checkpoints import in_layout

    state = in_layout(teacher, "args")
    state["args"].arch = "somebodys_model"
    torch.save(state, tmp_path / "x.pt")
    flags = [data, "--path", tmp_path / "x.pt", "--cpu", "--user-dir", ROOT / "kd_ext"]
    result = run(tmp_path / "log", "fairseq-generate", *flags)
    assert "its architecture 'somebodys_model' is not registered" in result.last_line
    assert load(teacher)["args"] is None


@pytest.mark.parametrize("given", ["two flags", "one after another", "joined", "by a comma"])
def test_two_folders_in_a_command(data, both, given):
    """As typed: fairseq alone would take the last of them, or find no such file."""
    plugin, own = str(ROOT / "kd_ext"), str(both)
    flags = {
        "two flags": ["--user-dir", own, f"--user-dir={plugin}"],
        "one after another": ["--user-dir", plugin, "--user-dir", own],
        "joined": ["--user-dir", f"{plugin}:{own}"],
        "by a comma": [f"--user-dir={own},{plugin}"],
    }[given]
    result = run_as_typed("fairseq-train", data, *flags, *KD, "--arch", "somebodys_model")
    assert result.returncode == 2
    assert result.output.strip().count("\n") == 0
    assert result.output.startswith("kd_ext: error: --user-dir")
    assert plugin in result.output
    assert own in result.output
    assert "imports one folder" in result.output


@pytest.mark.parametrize("is_link", [True, False])
def test_the_plugin_by_another_name(data, tmp_path, is_link):
    plugin, other = ROOT / "kd_ext", tmp_path / "plugin"
    if is_link:
        other.symlink_to(plugin)
    else:
        shutil.copytree(plugin, other, ignore=shutil.ignore_patterns("__pycache__"))
    result = run(tmp_path / "log", "fairseq-train", data, "--user-dir", other, "--arch", "transformer")
    assert result.returncode == 2
    remedy = f"name {plugin}" if is_link else "rename it"
    assert result.last_line == f"kd_ext: error: --user-dir {other}: the folder must be called kd_ext; {remedy}"
    assert "Traceback" not in result.output


def test_the_same_folder_twice(data, teacher):
    plugin = str(ROOT / "kd_ext")
    flags = ["--user-dir", plugin, "--user-dir", plugin + "/", "--path", teacher, "--cpu", "--gen-subset", "test"]
    result = run_as_typed("fairseq-generate", data, *flags)
    assert result.returncode == 0, result.output
