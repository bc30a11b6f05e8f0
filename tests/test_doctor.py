"""python -m kd_ext.doctor, where training works and where it does not."""

import os
import subprocess
import sys
import venv

import numpy as np
import pytest
from commands import ENVIRONMENT, ROOT

from kd_ext import doctor

BY_FILE = [str(ROOT / "kd_ext" / "doctor.py")]
AS_MODULE = ["-m", "kd_ext.doctor"]


def run_doctor(command, python=sys.executable, **environment):
    done = subprocess.run(
        [str(python), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT), **environment},
        timeout=120,
    )
    return done.returncode, done.stdout.splitlines()


@pytest.fixture(scope="module")
def empty_python(tmp_path_factory):
    """An interpreter without any package."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


def test_where_training_works():
    status, lines = run_doctor(AS_MODULE)
    assert (status, lines[-1]) == (0, "training will work"), lines
    assert any(line.split() == ["fairseq", "0.12.2"] for line in lines)
    assert "GPUs        none seen: train with --cpu" in lines
    numpy_version = tuple(map(int, np.__version__.split(".")[:2]))
    words = {line[7]: line.split(": ")[0].split(maxsplit=2)[2] for line in lines if line.startswith("remedy ")}
    assert words["A"] == ("active" if sys.version_info >= (3, 11) else "not needed")
    assert words["C"] == ("active" if sys.version_info >= (3, 13) else "not needed")
    assert words["E"] == "active"
    assert words["G"] == ("active" if numpy_version >= (1, 24) else "not needed")
    assert words["F"] == ("active" if sys.version_info >= (3, 14) else "not needed")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="fairseq imports unaided")
def test_without_the_start_up_hook():
    status, lines = run_doctor(BY_FILE, KD_EXT_STARTUP="0")
    assert (status, lines[-1]) == (1, "training will not work")
    assert "mutable default" in lines[-3]
    assert lines[-2].startswith("remedy: its start-up hook is not at work: unset KD_EXT_STARTUP")


def test_without_fairseq(empty_python):
    status, lines = run_doctor(BY_FILE, empty_python)
    assert (status, lines[-1]) == (1, "training will not work")
    assert any(line.split() == ["torch", "not", "installed"] for line in lines)
    assert lines[-2] == f"remedy: {doctor.INSTALL}"
    status, lines = run_doctor(AS_MODULE, empty_python)
    assert status == 1
    assert lines[-1].startswith(f"ImportError: kd_ext is a plugin of fairseq, which is not installed: {doctor.INSTALL}")
    assert lines[-1].endswith(f"python {BY_FILE[0]}")


def test_with_a_broken_fairseq(empty_python, tmp_path):
    for name in ("fairseq", "fairseq_cli"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('half of it is missing')")
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    status, lines = run_doctor(BY_FILE, empty_python, PYTHONPATH=path)
    assert (status, lines[-1]) == (1, "training will not work")
    assert lines[-3] == "problem: fairseq-train would end with: ImportError: half of it is missing"
    status, lines = run_doctor(AS_MODULE, empty_python, PYTHONPATH=path)
    assert status == 1
    assert "which does not import (half of it is missing)" in lines[-1]


def test_where_fairseqs_extensions_are_not_built(monkeypatch, capsys):
    error = "ModuleNotFoundError: No module named 'fairseq.data.data_utils_fast'"
    monkeypatch.setattr(doctor, "PROBE", doctor.PROBE.replace("data_utils_fast", "no_such_fast"))
    assert doctor.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == f"problem: fairseq-train would end with: {error}".replace("data_utils_fast", "no_such_fast")
    assert lines[-2].startswith("remedy: build fairseq's extensions: ")


def test_a_remedy_that_is_not_at_work_is_told(monkeypatch, capsys):
    active = dict.fromkeys(doctor.REMEDIES, True)
    monkeypatch.setattr(doctor, "probe", lambda: (({**active, "E": False}, ["H"]), None))
    assert doctor.main() == 1
    assert "problem: remedies not at work: E" in capsys.readouterr().out


def test_notes():
    found = doctor.notes({"fairseq": "1.0.0a0+abc", "pip": "24.1b1", "sacrebleu": "2.6.0"})
    assert ["1.0.0a0" in found[0], "pip 24.1b1" in found[1], "sacrebleu" in found[2]] == [True] * 3
    assert doctor.notes({"fairseq": "0.12.2", "pip": "24.0", "sacrebleu": "2.5.1"}) == []
    assert doctor.notes({"fairseq": None, "pip": None, "sacrebleu": None}) == []
