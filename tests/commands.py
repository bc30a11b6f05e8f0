"""Runs fairseq's commands for the tests: as typed, or, faster, forked from a process that has imported them."""

import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = ["--user-dir", str(ROOT / "kd_ext")]
# one thread: the commands are tiny, and a forked process must not inherit a pool of threads
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

_modules = {
    "fairseq-train": "fairseq_cli.train",
    "fairseq-generate": "fairseq_cli.generate",
    "fairseq-interactive": "fairseq_cli.interactive",
    "fairseq-validate": "fairseq_cli.validate",
    "fairseq-hydra-train": "fairseq_cli.hydra_train",
}
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["torch._dynamo", "sacrebleu", *_modules.values()])


class Result(NamedTuple):
    returncode: int
    output: str

    @property
    def last_line(self) -> str:
        return self.output.strip().splitlines()[-1]


def script(name: str) -> str:
    """The path of a console script of this environment."""
    return str(Path(sys.executable).parent / name)


def run_as_typed(
    name: str, *arguments: object, stdin: Optional[str] = None, limit: int = 300, **environment: str
) -> Result:
    """Run a console script in a process of its own, for at most so many seconds."""
    done = subprocess.run(
        [script(name), *map(str, arguments)],
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**ENVIRONMENT, **environment},
        timeout=limit,
    )
    return Result(done.returncode, done.stdout)


def launcher(workers: int) -> List[str]:
    """torch's launcher on a free port; with torch < 2 ``--standalone`` is one port, which two tests cannot share."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", address, "--rdzv_id", address]
    return [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc_per_node", str(workers)]


class Forked:
    """A command under way in a process forked from one in which fairseq, without the plugin, is imported."""

    def __init__(self, log: Path, name: str, *arguments: object) -> None:
        self._log = log
        self._process = _server.Process(target=_main, args=(str(log), name, [str(a) for a in arguments]))
        # the server starts with these, and this process, whose own tests may need a GPU, goes on without
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""):
            self._process.start()

    def wait(self) -> Result:
        self._process.join(300)
        assert not self._process.is_alive(), f"still running: {self.output}"
        return Result(self._process.exitcode, self.output)

    def kill_when(self, condition) -> None:
        """Kill -9 as soon as `condition()` holds; it must hold before the command ends."""
        assert self.is_killed_when(condition), f"ended before it could be killed: {self.output}"

    def is_killed_when(self, condition) -> bool:
        """Kill -9 as soon as `condition()` holds; whether it did before the command ended."""
        while not condition():
            if not self._process.is_alive():
                return False
            time.sleep(0.0005)
        self._process.kill()
        self._process.join()
        return self._process.exitcode == -signal.SIGKILL

    @property
    def output(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


def run(log: Path, name: str, *arguments: object) -> Result:
    """Run a command to its end in a forked process."""
    return Forked(log, name, *arguments).wait()


def run_two_workers(folder: Path, name: str, *arguments: object, own: Sequence[Sequence] = ((), ())) -> List[Result]:
    """Run a command in two forked processes that meet at a port of this machine.

    Args:
        folder: for their logs
        own: what each is given beside the `arguments`
    """
    with socket.socket() as found:
        found.bind(("localhost", 0))
        meeting = f"tcp://localhost:{found.getsockname()[1]}"
    together = ["--distributed-world-size", 2, "--distributed-no-spawn", "--distributed-init-method", meeting]
    together += ["--distributed-backend", "gloo", "--distributed-rank"]
    workers = [Forked(folder / f"log{rank}", name, *arguments, *own[rank], *together, rank) for rank in range(len(own))]
    return [worker.wait() for worker in workers]


def _main(log: str, name: str, arguments: List[str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [name, *arguments]
    try:
        if name in _modules:
            importlib.import_module(_modules[name]).cli_main()
        else:  # the plugin's own, which must not be imported before
            importlib.import_module(name).main()
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)
