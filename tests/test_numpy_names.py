"""The names of numpy that fairseq uses: each is there, or is given back."""

import ast
import importlib
from pathlib import Path

import fairseq
import numpy as np
import pytest
from conftest import KD

from kd_ext.upstream import numpy_names

PACKAGE = Path(fairseq.__file__).parent
LEFT_OUT = ("examples", "model_parallel")  # neither is part of what the commands do


def names_of(path):
    """What is taken from numpy in a file: ``np.random.seed`` is ("random", "seed")."""
    for node in ast.walk(ast.parse(path.read_text())):
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in ("np", "numpy"):
            yield parts


def is_there(thing, parts):
    for part in parts:
        if isinstance(thing, type) or not hasattr(thing, part):
            return hasattr(thing, part)
        thing = getattr(thing, part)
    return True


def test_every_name_that_fairseq_uses_is_there():
    """A module that uses a lost one has to be in the list of the touch, and be given it."""
    files = [p for p in PACKAGE.rglob("*.py") if not set(LEFT_OUT) & set(p.relative_to(PACKAGE).parts)]
    assert len(files) > 200
    found = {}
    for path in files:
        lost = {".".join(parts) for parts in names_of(path) if not is_there(np, parts)}
        if lost:
            found[".".join(("fairseq", *path.relative_to(PACKAGE).with_suffix("").parts))] = lost
    assert set(found) <= set(numpy_names.MODULES)
    for name, lost in found.items():
        module = importlib.import_module(name)
        for path in lost:
            assert is_there(module.np, path.split(".")), (name, path)


def test_buckets():
    sizes = np.array([3, 9, 4, 4, 7, 12, 5])
    buckets = importlib.import_module("fairseq.data.data_utils").get_buckets(sizes, 3)
    assert buckets.tolist() == [4, 7, 12]  # of 3 4 4 5 7 9 12 those at a third, two thirds and the end
    assert not hasattr(np, "float") or np.float is float  # numpy itself stays as it is


@pytest.mark.parametrize("task", [["--criterion", "label_smoothed_cross_entropy"], [*KD, "--alpha", "0"]])
def test_num_batch_buckets(train, tmp_path, task):
    result = train(tmp_path, *task, "--num-batch-buckets", "3", "--max-update", "3")
    assert result.returncode == 0, result.output
    assert "bucketing source lengths" in result.output
