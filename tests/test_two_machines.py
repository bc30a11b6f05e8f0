"""Runs on two machines, by the command of docs/many-gpus.md, against one machine with two processes."""

import re
import shutil
import sys

import pytest
from commands import ROOT, run_two_workers, script
from conftest import SIZES, STRATEGIES, TRAINING, strategy_flags
from pages import command
from test_resume import assert_same_run
from two_hosts import Job, two_hosts

WITH_TORCHS_WRAPPER = "pytorch_ddp_on_cpu"  # a module here
COMMANDS = {"legacy_ddp": "fairseq-train", "pytorch_ddp": WITH_TORCHS_WRAPPER}
PAGE = ROOT / "docs/many-gpus.md"
QUEUES = {"global_level": {"all"}, "global_language_wise": {"hi", "ta", "bn"}}


def of_page(**meanings):
    """The documented command for two machines without GPUs: what comes before fairseq-train, and after it."""
    before, after = command(PAGE, "--nnodes 2", "--cpu").split("$(which fairseq-train)")
    return [[meanings.get(word, word) for word in words.split() if word != "..."] for words in (before, after)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture
def arguments(data, teacher, tmp_path):
    """What fairseq-train is given: what the page has, and what makes it small."""

    def arguments(*others, strategy, wrapper="legacy_ddp", arch="transformer"):
        meanings = {"DATA": data, "kd_ext": ROOT / "kd_ext", "teacher/checkpoint_best.pt": teacher}
        _, known = of_page(**meanings, SHARED=tmp_path / "shared")
        known += [*TRAINING, *SIZES, *strategy_flags(strategy), "--dropout", 0.1]
        return [*known, "--ddp-backend", wrapper, "--arch", arch, *others]

    return arguments


def on_two_machines(hosts, folder, *arguments, wrapper="legacy_ddp", meets_at=0, **others) -> Job:
    typed = {"fairseq-train": script("fairseq-train"), WITH_TORCHS_WRAPPER: ROOT / f"tests/{WITH_TORCHS_WRAPPER}.py"}
    launcher, _ = of_page(**{"python": sys.executable, "HOST:29500": f"{hosts[meets_at].name}:29500"})
    return Job(hosts, folder, "env", *launcher, typed[COMMANDS[wrapper]], *arguments, **others)


def on_one_machine(folder, *arguments, wrapper="legacy_ddp") -> str:
    """By two processes, saved in `folder`; what the first printed."""
    folder.mkdir()
    results = run_two_workers(folder, COMMANDS[wrapper], *arguments, "--save-dir", folder)
    assert_trained(results)
    return results[0].output


def assert_trained(results):
    assert [result.returncode for result in results] == [0, 0], results


def training_log(output):
    """All that is logged of each update, but times."""
    lines = re.findall(r"train_inner \| (.*)", output)
    return [re.sub(r"(wps|ups|train_wall|wall)=[\d.]+", "", line) for line in lines]


@pytest.mark.parametrize(
    ("strategy", "wrapper", "arch", "others"),
    [
        *[(strategy, "legacy_ddp", "transformer", []) for strategy in STRATEGIES],
        ("global_language_wise", "legacy_ddp", "transformer", ["--kd-queue-window", "shared"]),
        ("global_language_wise", "pytorch_ddp", "transformer_ext", []),
        ("global_level", "pytorch_ddp", "transformer", ["--find-unused-parameters"]),
    ],
)
def test_two_machines_are_one_with_two_processes(hosts, arguments, tmp_path, strategy, wrapper, arch, others):
    """Every number of the log, the weights and the queues, bit for bit: gloo adds two numbers, in whatever order."""
    given = arguments(*others, "--max-update", 10, strategy=strategy, wrapper=wrapper, arch=arch)
    meets_at = int(wrapper == "pytorch_ddp")  # rank 0 is the first by name, wherever they meet
    job = on_two_machines(hosts, tmp_path, *given, wrapper=wrapper, meets_at=meets_at)
    logged = training_log(on_one_machine(tmp_path / "one", *given, wrapper=wrapper))
    results = job.wait()
    assert_trained(results)
    assert "initialized host host-a as rank 0" in results[0].output
    assert "initialized host host-b as rank 1" in results[1].output
    assert len(logged) == 10
    assert training_log(results[0].output) == logged
    queues = assert_same_run(tmp_path / "one/checkpoint_last.pt", tmp_path / "shared/checkpoint_last.pt")
    assert queues.keys() == ({"values", "languages"} if "shared" in others else QUEUES.get(strategy, set()))


def test_a_machine_that_is_killed(hosts, arguments, tmp_path):
    """Either of them, the one where they meet too, in mid-epoch: the other ends, and both go on when started again."""
    saving = ["--save-interval-updates", 10, "--save-interval", 99]  # 8 updates an epoch
    given = arguments(*saving, "--max-update", 40, strategy="global_language_wise")
    on_one_machine(tmp_path / "whole", *given)
    for host, updates in zip(reversed(hosts), (13, 25)):
        job = on_two_machines(hosts, tmp_path, *given)
        job.kill_when(host, f"num_updates={updates},")
        assert all(result.returncode != 0 for result in job.wait())
    results = on_two_machines(hosts, tmp_path, *given).wait()
    assert_trained(results)
    assert "@ 20 updates" in results[0].output  # where it goes on
    queues = assert_same_run(tmp_path / "whole/checkpoint_last.pt", tmp_path / "shared/checkpoint_last.pt")
    assert queues.keys() == QUEUES["global_language_wise"]


def test_a_folder_of_each_machine(hosts, arguments, teacher, tmp_path):
    """A checkpoint that the other does not have ends the run with a line; fairseq alone waits for ever."""
    own = [["--save-dir", tmp_path / host.name] for host in hosts]
    (tmp_path / "host-a").mkdir()
    shutil.copy(teacher, tmp_path / "host-a/checkpoint_last.pt")
    results = on_two_machines(hosts, tmp_path, *arguments(strategy="word_level"), own=own).wait()
    for host, result in zip(hosts, results):
        assert result.returncode != 0
        (line,) = [line for line in result.output.splitlines() if "kd_ext: error: " in line]
        assert f"--save-dir {tmp_path / host.name}: " in line
        assert (
            "host-a, worker 0: checkpoint_last.pt is there; host-b, worker 1: checkpoint_last.pt is not there" in line
        )


def test_a_cache_of_one_machine_is_read_on_both(hosts, arguments, tmp_path):
    given = arguments("--teacher-cache-dir", tmp_path / "cache", "--max-update", 10, strategy="global_level")
    filling = [sys.executable, "-m", "kd_ext.teacher_cache", *given, "--teacher-cache-top-k", 8]
    assert hosts[1].start(tmp_path / "log", *filling).wait(150) == 0, (tmp_path / "log").read_text()
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    at = given.index("--teacher-checkpoint-path")
    del given[at : at + 2]
    job = on_two_machines(hosts, tmp_path, *given)
    on_one_machine(tmp_path / "one", *given)
    results = job.wait()
    assert_trained(results)
    assert "300 sentences, of which 300 are there" in results[0].output
    assert "loaded teacher" not in results[0].output + results[1].output
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert_same_run(tmp_path / "one/checkpoint_last.pt", tmp_path / "shared/checkpoint_last.pt")
