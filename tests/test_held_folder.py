"""One run at a time writes into a folder, and nothing that it reads lies under a name that it writes."""

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import ENVIRONMENT, Forked, Result, launcher, run, script
from conftest import KD, SIZES, TRAINING

from kd_ext.errors import ConfigError
from kd_ext.files import folder_lock
from kd_ext.upstream.held_folder import _check_inputs, _check_log

UPSTREAM = ["--criterion", "label_smoothed_cross_entropy"]
ENDLESS = [*UPSTREAM, "--max-epoch", 10**6, "--save-interval-updates", 1, "--keep-interval-updates", 1]
ENDLESS += ["--no-epoch-checkpoints", "--disable-validation"]


def state(folder):
    """What is in a folder but for what a live run writes all the time."""
    return sorted(path.name for path in folder.iterdir() if not re.match("checkpoint|log", path.name))


def wait_for(condition):
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + 200
        time.sleep(0.01)


@pytest.fixture
def live(data, tmp_path):
    """A run that trains, and saves after every update, until the test kills it."""
    folder = tmp_path / "run"
    command = [data, *TRAINING, "--arch", "transformer", *SIZES, "--save-dir", folder, *ENDLESS]
    process = Forked(tmp_path / "live.log", "fairseq-train", *command)
    wait_for(lambda: (folder / "checkpoint_last.pt").exists() or not process._process.is_alive())
    yield folder, process
    if process._process.is_alive():
        process.kill_when(lambda: True)


def updates(process):
    return process.output.count("num_updates=")


def assert_goes_on(process):
    before = updates(process)
    wait_for(lambda: updates(process) > before + 3 or not process._process.is_alive())
    assert process._process.is_alive(), process.output[-2000:]


def test_a_folder_that_cannot_be_made(data, tmp_path):
    own = tmp_path / "own"
    own.write_text("mine")
    flags = [data, *TRAINING, "--arch", "transformer", *SIZES, *UPSTREAM]
    result = run(tmp_path / "log", "fairseq-train", *flags, "--save-dir", own)
    assert result.last_line == f"kd_ext: error: --save-dir {own}: cannot be made: File exists; name another folder"
    assert "Traceback" not in result.output


def refusal(folder):
    return rf"kd_ext: error: --save-dir {folder}: a run is at work there \(process \d+ on .*\); wait for its end, or .*"


def test_a_second_start_touches_nothing(live, train, data, tmp_path):
    """Of any kind: with nothing left to train, with the same flags, through another spelling, of two workers."""
    folder, process = live
    (tmp_path / "link").symlink_to(folder)
    for flags in (["--max-update", 1], ["--save-dir", tmp_path / "link", "--reset-optimizer"]):
        result = train(tmp_path / "log", *UPSTREAM, "--save-dir", folder, *flags)
        assert result.returncode != 0
        assert re.fullmatch(refusal(tmp_path / "link" if "--save-dir" in flags else folder), result.last_line)
        assert "Traceback" not in result.output
        assert "loading" not in result.output.lower()
        assert_goes_on(process)
    command = [data, *TRAINING, "--arch", "transformer", *SIZES, *UPSTREAM, "--save-dir", folder, "--max-update", 1]
    command += ["--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp"]
    result = as_typed(*launcher(2), script("fairseq-train"), *command)
    assert result.returncode != 0
    assert re.search(refusal(folder), result.output), result.output
    assert_goes_on(process)
    assert state(folder) == [folder_lock.NAME]
    assert train(tmp_path / "log", *UPSTREAM, "--save-dir", folder, "--no-save", "--max-update", 1).returncode == 0
    assert train(tmp_path / "log", *UPSTREAM, "--save-dir", tmp_path / "own", "--max-update", 1).returncode == 0
    assert_goes_on(process)


def test_a_killed_run_holds_nothing(live, train, tmp_path):
    """Not even while its loaders of data are still there."""
    folder, process = live
    process.kill_when(lambda: True)
    result = train(tmp_path / "log", *UPSTREAM, "--save-dir", folder, "--max-update", 10**5, "--stop-time-hours", 1e-9)
    assert result.returncode == 0, result.output
    assert "Loaded checkpoint" in result.output


def as_typed(*command) -> Result:
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([str(part) for part in command], env=ENVIRONMENT, timeout=300, **output)
    return Result(done.returncode, done.stdout)


HOLDER = """
import os, sys, time
sys.path.insert(0, {root!r})
from kd_ext.files.folder_lock import hold
hold(sys.argv[1], "--save-dir")
if os.fork() == 0:  # as a loader of data, which outlives its parent for a moment
    time.sleep(60)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def another(tmp_path):
    """A process that holds the folder, and has a child."""
    root = os.path.dirname(os.path.dirname(__file__))
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER.format(root=root), tmp_path], stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()


def test_the_lock_ends_with_its_process(another, tmp_path):
    holder = another.stdout.readline().strip()
    with pytest.raises(ConfigError, match=rf"--save-dir {tmp_path}: a run is at work there \(process {holder} on "):
        folder_lock.hold(str(tmp_path), "--save-dir")
    another.kill()
    another.wait()
    folder_lock.hold(str(tmp_path), "--save-dir")
    folder_lock.hold(str(tmp_path) + "/.", "--save-dir")  # its own
    assert is_held(tmp_path)
    (tmp_path / "next").mkdir()
    folder_lock.hold(str(tmp_path / "next"), "--save-dir")
    assert is_held(tmp_path / "next")
    assert not is_held(tmp_path)


def is_held(folder):
    """As another process sees it."""
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return subprocess.run([sys.executable, "-c", code, folder / folder_lock.NAME], stderr=-3).returncode != 0


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_where_there_are_no_locks_the_log_says_so(tmp_path, monkeypatch, caplog, error):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    folder_lock.hold(str(tmp_path), "--save-dir")
    assert f"--save-dir {tmp_path}: no lock can be had there ({os.strerror(error)})" in caplog.text


def test_what_is_read_does_not_lie_where_the_run_writes(train, teacher, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    for name, is_in_the_way in (("checkpoint_best.pt", True), ("checkpoint3.pt", True), ("teacher.pt", False)):
        shutil.copy(teacher, folder / name)
        path = tmp_path / "link" / name
        flags = [*UPSTREAM, "--save-dir", folder, "--max-update", 1, "--finetune-from-model", path]
        result = train(tmp_path / "log", *flags)
        assert (result.returncode != 0) == is_in_the_way, result.output
        if is_in_the_way:
            assert result.last_line.startswith(f"kd_ext: error: --finetune-from-model {path}: the run would write over")
            assert path.read_bytes() == teacher.read_bytes()
    flags = [*KD, "--teacher-checkpoint-path", folder / "checkpoint_best.pt"]
    result = train(tmp_path / "log", "--save-dir", folder, "--max-update", 2, *flags)
    assert result.last_line.startswith(f"kd_ext: error: --teacher-checkpoint-path {folder}/checkpoint_best.pt: the run")


@pytest.mark.parametrize("form", ["hi={own},...={base}", "ta={base},...={base}:{own}", "hi = {base}\n... = {own}\n"])
def test_a_teacher_of_a_language_does_not_lie_where_the_run_writes(train, teacher, tmp_path, form):
    """On the command line and in a file of such lines; a folder may have a '=' in its name."""
    folder = tmp_path / "b=1"
    folder.mkdir()
    own = shutil.copy(teacher, folder / "checkpoint_best.pt")
    given = form.format(own=own, base=teacher)
    if "\n" in given:
        (tmp_path / "teachers.txt").write_text(given)
        given = tmp_path / "teachers.txt"
    result = train(tmp_path / "log", *KD, "--save-dir", folder, "--max-update", 2, "--teacher-checkpoint-path", given)
    assert result.returncode != 0
    assert result.last_line.startswith(f"kd_ext: error: --teacher-checkpoint-path {own}: the run would write over it")
    assert own.read_bytes() == teacher.read_bytes()


RESET = ["--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler"]


def test_a_link_to_what_is_read_is_not_written_through(train, teacher, tmp_path):
    """Copies of checkpoints go to what a link points to."""
    folder, base = tmp_path / "run", tmp_path / "base.pt"
    folder.mkdir()
    shutil.copy(teacher, base)
    (folder / "checkpoint_best.pt").symlink_to(base)
    for flag, flags in (
        ("--teacher-checkpoint-path", [*KD, "--teacher-checkpoint-path", base]),
        ("--restore-file", [*UPSTREAM, "--restore-file", base, *RESET]),
    ):
        result = train(tmp_path / "log", "--save-dir", folder, "--max-update", 2, *flags)
        assert result.returncode != 0
        assert result.last_line == (
            f"kd_ext: error: {flag} {base}: the run would write over it, as {folder}/checkpoint_best.pt; name another "
            f"--save-dir than {folder}"
        )
        assert base.read_bytes() == teacher.read_bytes()


# the flags of what is read, and whether a run in that folder would write over it
READ = [
    ({"restore_file": "run/checkpoint_best.pt", "reset_optimizer": True}, True),
    ({"restore_file": "link/checkpoint3.pt", "reset_optimizer": True}, True),
    ({"restore_file": "run/base.pt", "reset_optimizer": True}, False),
    ({"restore_file": "other/checkpoint_last.pt", "reset_optimizer": True}, False),
    ({"restore_file": "run/none.pt", "reset_optimizer": True}, False),
    # these go on, or begin anew from where they would go on
    ({"restore_file": "run/checkpoint_best.pt"}, False),
    ({"reset_optimizer": True}, False),
    ({"restore_file": "run/checkpoint_last.pt", "reset_optimizer": True}, False),
    ({"restore_file": "run/./checkpoint_last.pt", "reset_optimizer": True}, False),
    ({"finetune_from_model": "run/checkpoint_best.pt"}, False),
    ({"teacher": "to_best.pt"}, True),
    ({"teacher": "run/crash.pt"}, True),
    ({"teacher": "other/checkpoint_last.pt:run/checkpoint3.pt"}, True),
    ({"teacher": "hi=other/checkpoint_last.pt"}, False),
    ({"teacher": "other/checkpoint_last.pt"}, False),
]


@pytest.mark.parametrize(("flags", "is_written"), READ)
def test_what_a_run_would_write_over(tmp_path, monkeypatch, flags, is_written):
    monkeypatch.chdir(tmp_path)
    for name in ("run/checkpoint_best.pt", "run/checkpoint3.pt", "run/checkpoint_last.pt", "run/base.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "run" / "crash.pt").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoint_last.pt").touch()
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "to_best.pt").symlink_to("run/checkpoint_best.pt")
    flags = {"restore_file": "checkpoint_last.pt", "reset_optimizer": False, "finetune_from_model": None, **flags}
    task = SimpleNamespace(teacher_checkpoint_path=flags.pop("teacher", None))
    cfg = SimpleNamespace(task=task, checkpoint=SimpleNamespace(save_dir="run", **flags))
    if is_written:
        with pytest.raises(ConfigError, match="the run would write over it, as run/c"):
            _check_inputs(cfg)
    else:
        _check_inputs(cfg)


def test_a_run_that_is_started_as_a_module_reads_nothing_where_it_writes(data, teacher, tmp_path):
    """What trains is then called __main__: it ends as early, and an error of fairseq's flags is one line there, too."""
    command = [sys.executable, "-m", "fairseq_cli.train", data, *TRAINING, "--arch", "transformer", *SIZES]
    result = as_typed(*command, *KD, "--teacher-checkpoint-path", teacher, "--save-dir", teacher.parent)
    assert result.returncode != 0
    assert result.last_line.startswith(f"kd_ext: error: --teacher-checkpoint-path {teacher}: the run would write over")
    assert "loaded teacher" not in result.output
    command[command.index("--max-tokens")] = "--max-update"
    result = as_typed(*command, *UPSTREAM, "--save-dir", tmp_path)
    assert result.returncode != 0
    assert result.last_line.startswith("kd_ext: error: Must specify batch size")


@pytest.mark.parametrize("what", ["teacher", "checkpoint", "dictionary", "data", "tags", "link"])
def test_a_log_is_appended_to_no_file_that_is_read(what, data, teacher, tmp_path):
    shutil.copytree(data, tmp_path / "bin")
    shutil.copy(teacher, tmp_path / "named_as_one_likes")
    (tmp_path / "tags").write_text("__src__hi\n")
    (tmp_path / "link.log").symlink_to(tmp_path / "named_as_one_likes")
    log = {
        "teacher": tmp_path / "named_as_one_likes",
        "checkpoint": shutil.copy(teacher, tmp_path / "other.pt"),
        "dictionary": tmp_path / "bin/dict.src.txt",
        "data": tmp_path / "bin/train.src-tgt.tgt.idx",
        "tags": tmp_path / "tags",
        "link": tmp_path / "link.log",
    }[what]
    before = Path(log).read_bytes()
    flags = [*KD, "--teacher-checkpoint-path", tmp_path / "named_as_one_likes", "--kd-language-tags", tmp_path / "tags"]
    flags += ["--log-file", log, "--save-dir", tmp_path / "run", "--arch", "transformer", *SIZES, "--max-update", 1]
    result = run(tmp_path / "log", "fairseq-train", tmp_path / "bin", *TRAINING, *flags)
    assert result.last_line.startswith(f"kd_ext: error: --log-file {log}: the log would be appended to that file")
    assert Path(log).read_bytes() == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["train.log", "distil.src-tgt.log", "run.2024-05-01"])
def test_a_log_is_appended_to_a_log(name, data, tmp_path):
    """Wherever it is."""
    shutil.copytree(data, tmp_path / "bin")
    log = tmp_path / "bin" / name
    for updates in (1, 2):
        flags = [*UPSTREAM, "--save-dir", tmp_path / "run", "--arch", "transformer", *SIZES, "--max-update", updates]
        result = run(tmp_path / "log", "fairseq-train", tmp_path / "bin", *TRAINING, *flags, "--log-file", log)
        assert result.returncode == 0, result.output
        assert log.read_text().count("done training") == updates


@pytest.mark.parametrize(
    "words", [["--multirun", "common.log_file={}"], ["--log_file={}"], ["-m", "+common.log_file={}"]]
)
def test_a_log_is_not_taken_for_another_flags_value(words, tmp_path, monkeypatch):
    log = tmp_path / "log"
    log.write_text("of the job before")
    monkeypatch.setattr(sys, "argv", ["fairseq-hydra-train", *(word.format(log) for word in words)])
    _check_log(SimpleNamespace(common=SimpleNamespace(log_file=str(log)), task=SimpleNamespace(data=str(tmp_path))))
    sys.argv += ["--finetune-from-model", f"other.pt:{log}"]
    with pytest.raises(ConfigError, match=f"^--log-file {log}: "):
        _check_log(SimpleNamespace(common=SimpleNamespace(log_file=str(log)), task=SimpleNamespace(data=None)))
