"""Damaged and hostile files: an error of one line, or what was written, never anything else."""

import copy
import os
import random
import shutil
import zipfile
from argparse import Namespace

import pytest
import torch
from commands import PLUGIN, run
from conftest import load
from fairseq import checkpoint_utils
from test_adapter_files import base, trained  # noqa: F401  fixtures

from kd_ext import adapters
from kd_ext.errors import ConfigError
from kd_ext.files import adapter_file, safe_loading
from kd_ext.files.reading import explained
from kd_ext.files.safe_loading import HAS_SAFE_GLOBALS
from kd_ext.upstream.mapped_checkpoints import mapped_checkpoints

TRIALS = 20  # of each damage to each kind of file


def flip(content, rng):
    for _ in range(rng.randint(1, 9)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def truncate(content, rng):
    return content[: rng.randrange(len(content))]


def swap(content, rng):
    size = rng.randint(1, len(content) // 10)
    first, second = sorted(rng.sample(range(0, len(content) - size, size), 2))
    parts = content[first : first + size], content[second : second + size]
    content[second : second + size], content[first : first + size] = parts
    return content


def same(first, second):
    """Whether two things that were loaded are equal to the last bit."""
    if isinstance(first, torch.Tensor):
        # by bytes: fairseq has a buffer of whatever was in memory, also of what is no number
        return (
            first.dtype == second.dtype
            and first.shape == second.shape
            and first.numpy().tobytes() == second.numpy().tobytes()
        )
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    return str(first) == str(second)


def count_errors(path, read, damage):
    """How many of the damaged copies are refused, in one line that names the file; the others must be the same."""
    content, whole, refused = path.read_bytes(), read(path), []
    for seed in range(TRIALS):
        path.write_bytes(damage(bytearray(content), random.Random(seed)))
        try:
            found = read(path)
        except ConfigError as error:
            refused.append(str(error))
        else:
            assert same(found, whole)
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in refused)
    return len(refused)


@pytest.mark.parametrize("damage", [flip, truncate, swap])
def test_damaged_checkpoints(student, tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(student.read_bytes())
    read = lambda path: checkpoint_utils.load_checkpoint_to_cpu(str(path))  # noqa: E731
    assert count_errors(path, read, damage) > TRIALS / 2


@pytest.mark.parametrize("damage", [flip, truncate, swap])
def test_damaged_checkpoints_that_are_mapped(student, tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(student.read_bytes())

    def read(path):
        with mapped_checkpoints():
            return copy.deepcopy(checkpoint_utils.load_checkpoint_to_cpu(str(path)))

    assert count_errors(path, read, damage) > TRIALS / 2


@pytest.mark.parametrize("damage", [flip, truncate, swap])
def test_damaged_files_of_adapters(trained, tmp_path, damage):  # noqa: F811
    path = tmp_path / "hi.adapter"
    adapters.export(trained["hi"][0], "hi", str(path))
    read = lambda path: adapter_file.read(str(path))  # noqa: E731
    assert count_errors(path, read, damage) > TRIALS / 2


def test_every_bit_of_what_no_checksum_covers(tmp_path):
    """Headers, and the directory of the archive: each bit of them, read in both ways."""
    path = tmp_path / "checkpoint.pt"
    weights = {"empty": torch.zeros(0), "some": torch.arange(5.0)}
    torch.save({"args": None, "cfg": {"model": Namespace(arch="transformer")}, "model": weights}, path)
    content, covered = path.read_bytes(), set()
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            name, extra = (int.from_bytes(content[part.header_offset + at :][:2], "little") for at in (26, 28))
            start = part.header_offset + 30 + name + extra
            covered.update(range(start, start + part.file_size))

    def read(path, is_mapped):
        with explained(str(path), "checkpoint"):
            return copy.deepcopy(torch.load(path, weights_only=True, mmap=is_mapped))

    safe_loading.allow({"argparse.Namespace": Namespace})
    wholes = {is_mapped: read(path, is_mapped) for is_mapped in ((False, True) if HAS_SAFE_GLOBALS else ())}
    refused = 0
    # what fills up the space before a part, all of it the same
    places = [i for i in range(len(content)) if i not in covered and content[i : i + 8] != b"Z" * 8]
    for place, bit in ((place, bit) for place in places for bit in range(8)):
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        path.write_bytes(changed)
        for is_mapped, whole in wholes.items():
            try:
                found = read(path, is_mapped)
            except ConfigError:
                refused += 1
            else:
                assert same(found, whole), (place, bit, is_mapped)
    assert refused > len(places) or not wholes


def test_two_parts_of_one_name(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": {"w": torch.zeros(9)}}, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("checkpoint/data/0", torch.ones(9).numpy().tobytes())
    with pytest.raises(ConfigError, match="data/0 is not as it was written"), explained(str(path), "checkpoint"):
        pass


def test_one_changed_bit_of_a_weight_is_seen(student, tmp_path):
    content = bytearray(student.read_bytes())
    weight = load(student)["model"]["decoder.layers.0.fc1.weight"].numpy().tobytes()
    content[content.index(weight)] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(content)
    load(tmp_path / "checkpoint.pt")  # torch by itself sees nothing
    with pytest.raises(ConfigError, match=r"damaged, .* is not as it was written"):
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint.pt"))


class Harmful:
    def __reduce__(self):
        return (print, ("run!",))


def test_generate_refuses_code_in_one_line(student, data, tmp_path):
    torch.save({**load(student), "extra_state": Harmful()}, tmp_path / "harmful.pt")
    flags = [data, *PLUGIN, "--path", tmp_path / "harmful.pt", "--cpu"]
    result = run(tmp_path / "log", "fairseq-generate", *flags)
    assert result.returncode != 0
    assert result.last_line.startswith(f"kd_ext: error: {tmp_path}/harmful.pt: refused, it refers to ")
    assert "print, which no checkpoint of fairseq does" in result.last_line
    assert "Traceback" not in result.output
    assert "run!" not in result.output


def test_resuming_from_a_checkpoint_cut_short(train, teacher, tmp_path):
    """The message names the one that takes its place."""
    content = teacher.read_bytes()
    for age, (name, size) in enumerate([("_last", 0.9), ("_3_48", 0.5), ("3", 1), ("_2_32", 1)]):
        path = tmp_path / f"checkpoint{name}.pt"
        path.write_bytes(content[: int(len(content) * size)])
        os.utime(path, (10**9 - age, 10**9 - age))
    last, newest = tmp_path / "checkpoint_last.pt", tmp_path / "checkpoint3.pt"
    flags = ["--criterion", "label_smoothed_cross_entropy", "--max-update", "41"]
    result = train(tmp_path, *flags)
    assert result.returncode != 0
    assert result.last_line.startswith(f"kd_ext: error: {last}: damaged, cut short, or not a checkpoint of fairseq (")
    assert result.last_line.endswith(f"; the newest whole one beside it is {newest}")
    assert last.stat().st_size < len(content)
    shutil.copy(newest, last)
    result = train(tmp_path, *flags)
    assert result.returncode == 0, result.output
    assert "@ 40 updates" in result.output


def test_resuming_from_the_only_checkpoint_cut_short(train, tmp_path):
    (tmp_path / "checkpoint_last.pt").write_bytes(b"half of a checkpoint")
    result = train(tmp_path, "--criterion", "label_smoothed_cross_entropy", "--max-update", "2")
    assert result.returncode != 0
    assert result.last_line.startswith(f"kd_ext: error: {tmp_path}/checkpoint_last.pt: damaged, cut short, or not a")
    assert result.last_line.endswith("; beside it is no whole checkpoint*.pt")


@pytest.mark.parametrize("kind", ["wrapped", "weights alone", "protocol"])
def test_checkpoints_as_scripts_leave_them(student, data, tmp_path, kind):
    """Whole, and not what a command can take: one line says why."""
    state, path = load(student), tmp_path / "one.pt"
    if kind == "wrapped":
        state["model"] = {f"module.{name}": x for name, x in state["model"].items()}
        said = "its weights are those of a wrapper, with names that begin with 'module.'; save those of the model in it"
    elif kind == "weights alone":
        state = {"model": state["model"]}
        said = "no settings of a model (args or cfg) beside the weights; name a checkpoint that fairseq-train wrote"
    else:
        said = "saved with pickle protocol 5, which torch reads only where it may run code; where you trust it, save it"
    torch.save(state, path, pickle_protocol=5 if kind == "protocol" else 2)
    result = run(tmp_path / "log", "fairseq-generate", data, *PLUGIN, "--path", path, "--cpu")
    if kind == "protocol" and not HAS_SAFE_GLOBALS:
        assert result.returncode == 0
        return
    assert result.last_line.startswith(f"kd_ext: error: {path}: {said}")
    assert "Traceback" not in result.output
    if kind == "wrapped":
        with pytest.raises(ConfigError, match="those of a wrapper"):
            adapters.describe(str(path))
