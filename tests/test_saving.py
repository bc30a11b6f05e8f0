"""Saving that is cut short: by a kill at any moment, by a full disk. What was saved before stays whole."""

import os
import re
import resource
import stat
import subprocess
import sys

import pytest
import torch
from commands import ENVIRONMENT, script
from conftest import SIZES, TRAINING, load
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from test_resume import assert_same_run

from kd_ext.errors import ConfigError
from kd_ext.files.writing import written_whole

OLD, NEW = b"old" * 1000, b"new!" * 1000


def die_at(event):
    """In a forked child: end at once, as a kill does, at the `event`-th system call that writes, renames or syncs."""
    calls = iter(range(1000))

    def counted(function):
        def call(*args, **kwargs):
            if next(calls) == event:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    return counted


@pytest.mark.parametrize("is_new", [False, True])
def test_a_file_is_the_old_or_the_new_one_whenever_the_process_ends(tmp_path, is_new):
    path = tmp_path / "file"
    found = []
    for event in range(8):
        if not is_new:
            path.write_bytes(OLD)
        elif path.exists():
            path.unlink()
        child = os.fork()
        if child == 0:
            counted = die_at(event)
            with written_whole(str(path)) as file:
                write = counted(file._file.raw.write)
                for i in range(0, len(NEW), 1000):
                    write(NEW[i : i + 1000])
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        found.append((os.WEXITSTATUS(status), path.read_bytes() if path.exists() else None))
    before = None if is_new else OLD
    # four writes, the sync, the renaming: no event after that to die at
    assert found == [(9, before)] * 6 + [(0, NEW)] * 2
    assert os.listdir(tmp_path) == ["file"]  # the last attempt took the name of what the kills had left


def limited(size):
    """Let this process write files of up to `size` bytes, as a disk with that much room would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def room():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield limited
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1, 1000, 40000])
def test_no_room_is_said_and_the_earlier_checkpoint_stays(tmp_path, room, size):
    path = tmp_path / "checkpoint_last.pt"
    checkpoint_utils.torch_persistent_save({"model": torch.ones(9)}, str(path))
    room(size)
    with pytest.raises(ConfigError, match=rf"^{path}: cannot be written: File too large; .* whole: make room[^\n]*$"):
        checkpoint_utils.torch_persistent_save({"model": torch.zeros(20000)}, str(path))
    room(resource.RLIM_INFINITY)
    assert os.listdir(tmp_path) == ["checkpoint_last.pt"]
    assert load(path)["model"].tolist() == [1.0] * 9


def test_no_room_for_the_copy(tmp_path, room):
    new, last = tmp_path / "checkpoint1.pt", tmp_path / "checkpoint_last.pt"
    new.write_bytes(NEW)
    last.write_bytes(OLD)
    room(len(NEW) - 1)
    with pytest.raises(ConfigError, match=rf"^{last}: cannot be written: File too large; "):
        PathManager.copy(str(new), str(last), overwrite=True)
    assert last.read_bytes() == OLD
    assert sorted(os.listdir(tmp_path)) == ["checkpoint1.pt", "checkpoint_last.pt"]


def test_a_write_that_fails_once_is_made_again(tmp_path, monkeypatch):
    """Upstream would go on writing into the same file, behind the half that is there."""
    save, calls = torch.save, []

    def failing_once(obj, file):
        calls.append(file)
        if len(calls) == 1:
            file.write(b"half")
            raise OSError(5, "Input/output error")
        save(obj, file)

    monkeypatch.setattr(torch, "save", failing_once)
    checkpoint_utils.torch_persistent_save({"a": torch.ones(3)}, str(tmp_path / "checkpoint.pt"))
    monkeypatch.undo()
    expected = tmp_path / "expected.pt"
    with open(expected, "wb") as file:
        torch.save({"a": torch.ones(3)}, file)
    assert len(calls) == 2
    assert (tmp_path / "checkpoint.pt").read_bytes() == expected.read_bytes()


def test_copying_keeps_links_and_permissions(tmp_path):
    """As copying in place does."""
    source, target, link = tmp_path / "checkpoint1.pt", tmp_path / "elsewhere" / "file.pt", tmp_path / "last.pt"
    target.parent.mkdir()
    source.write_bytes(NEW)
    target.write_bytes(OLD)
    target.chmod(0o640)
    link.symlink_to(target)
    assert PathManager.copy(str(source), str(link), overwrite=True)
    assert link.is_symlink()
    assert target.read_bytes() == NEW
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    nowhere = tmp_path / "nowhere.pt"
    nowhere.symlink_to(os.devnull)
    assert PathManager.copy(str(source), str(nowhere), overwrite=True)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    mode = stat.S_IMODE(source.stat().st_mode)
    assert PathManager.copy(str(source), str(tmp_path / "new.pt"), overwrite=True)
    assert stat.S_IMODE((tmp_path / "new.pt").stat().st_mode) == mode


def test_a_run_that_saves_nothing_removes_nothing(train, tmp_path):
    """It may be a trial beside a run that saves at this moment."""
    part = tmp_path / "checkpoint_last.pt.tmp"
    part.write_bytes(b"half")
    flags = ["--criterion", "label_smoothed_cross_entropy", "--max-update", "1"]
    assert train(tmp_path, *flags, "--no-save").returncode == 0
    assert part.exists()
    assert train(tmp_path, *flags).returncode == 0
    assert not part.exists()


def test_what_a_killed_run_left_is_removed(train, tmp_path):
    left = [tmp_path / name for name in ("checkpoint_last.pt.tmp", "checkpoint_3_45.pt.tmp", "crash.pt.tmp")]
    others = [tmp_path / name for name in ("notes.tmp", "data.pt.tmp")]
    for file in left + others:
        file.write_bytes(b"half of a file")
    result = train(tmp_path, "--criterion", "label_smoothed_cross_entropy", "--max-update", "1")
    assert result.returncode == 0, result.output
    assert not any(file.exists() for file in left)
    assert all(file.exists() for file in others)
    assert f"removed {left[0]}: a run was killed while it saved" in result.output


FLAGS = ["--criterion", "label_smoothed_cross_entropy", "--save-interval-updates", "2", "--disable-validation"]
FLAGS += ["--max-update", "6"]


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The last checkpoint of a run with room enough."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, *FLAGS).returncode == 0
    return folder / "checkpoint_last.pt"


def run_with_room(room, *command):
    """Run a command that can write files of up to `room` bytes; its exit status and what it printed."""
    start = f"import resource, os, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))"
    code = f"{start}; os.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], stdout=-1, stderr=-2, text=True, env=ENVIRONMENT, timeout=300
    )
    return done.returncode, done.stdout


def test_a_disk_that_fills_up_ends_the_run_with_one_line(train, whole, data, tmp_path):
    """The run stops, keeps what was saved, and given room goes on as if nothing had happened."""
    assert train(tmp_path, *FLAGS, "--max-update", "2").returncode == 0
    last = tmp_path / "checkpoint_last.pt"
    before = last.read_bytes()
    command = [
        script("fairseq-train"),
        data,
        *TRAINING,
        "--arch",
        "transformer",
        *SIZES,
        *FLAGS,
        "--save-dir",
        tmp_path,
    ]
    status, output = run_with_room(len(before) // 2, *command)
    assert status != 0
    expected = rf"kd_ext: error: {tmp_path}/checkpoint_1_4.pt: cannot be written: File too large; the .* whole: "
    assert re.match(expected, output.strip().splitlines()[-1])
    assert "Traceback" not in output
    assert last.read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    assert not (tmp_path / "checkpoint_1_4.pt").exists()
    assert train(tmp_path, *FLAGS).returncode == 0
    assert_same_run(whole, last)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own; returns what sets its size in bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], stderr=subprocess.DEVNULL)
        return done.returncode == 0

    if os.getuid() != 0 or not mount("size=64k"):
        pytest.skip("needs to mount a file system")
    yield lambda size: mount(f"remount,size={size}")
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("checkpoints", [0.5, 1.5, 2.5, 3.5])
def test_a_real_disk_that_fills_up(train, whole, tmp_path, small_disk, checkpoints):
    """Room for so many checkpoints: saving one or copying it fails, the first or a later one."""
    size, save_dir = whole.stat().st_size, tmp_path / "disk"
    assert small_disk(int(size * checkpoints))
    result = train(save_dir, *FLAGS)
    assert result.returncode != 0
    assert "cannot be written: No space left on device; the checkpoints saved before it are whole" in result.last_line
    for file in save_dir.glob("*.pt*"):
        assert "model" in checkpoint_utils.load_checkpoint_to_cpu(str(file))  # which checks the sums
    assert small_disk(size * 20)
    result = train(save_dir, *FLAGS)
    assert result.returncode == 0, result.output
    assert ("Loaded checkpoint" in result.output) == (checkpoints >= 2)
    assert_same_run(whole, save_dir / "checkpoint_last.pt")
