"""The branches for a GPU, where there is none: tests/pretend_gpu.py in a process of its own."""

import subprocess
import sys

import pytest
from commands import ENVIRONMENT, ROOT


def test_on_a_device_that_pretends():
    registration = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices that are written in Python")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "tests" / "pretend_gpu.py")]
    done = subprocess.run(command, cwd=ROOT, stdout=-1, stderr=-2, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
