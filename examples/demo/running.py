"""Running a command of this environment: its output in a log, its progress on the terminal."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Callable, Deque, Dict, List, Optional

from steps import DemoError
from tqdm import tqdm

LINES_SHOWN = 15
PR_SET_PDEATHSIG = 1
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONUTF8": "1",
    # threads that wait let go of their core: spinning, on a busy machine, made training six times slower
    "OMP_WAIT_POLICY": "PASSIVE",
}

# looked up here, as little as possible being safe between fork and exec; Linux alone has it
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)


class Commands:
    """Runs commands in `out`, one driver at a time.

    Args:
        out: the demo's folder, in which the commands run, so that they name files without its path
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        (out / "logs").mkdir(parents=True, exist_ok=True)
        self._lock = _lock(out / ".lock")

    def log(self, name: str) -> Path:
        """The file that a step's commands write to."""
        return self.out / "logs" / f"{name}.log"

    def run(
        self,
        name: str,
        command: List[str],
        total: int = 0,
        position: Optional[Callable[[str], int]] = None,
        environment: Optional[Dict[str, str]] = None,
    ) -> None:
        """Run `command`, the name of a console script and its arguments.

        Args:
            name: of the log and of the progress bar
            command: without the path of this environment
            total: of the progress bar
            position: of the progress bar, read off a line of output; negative where the line does not tell
            environment: variables to set beside those of this process

        Raises:
            DemoError: the command failed; the message has the last lines of its output
        """
        script = Path(sys.executable).parent / command[0]
        if not script.exists():
            raise DemoError(f"{name}: there is no {command[0]} beside {sys.executable}")
        last: Deque[str] = deque(maxlen=LINES_SHOWN)
        log = self.log(name)
        with log.open("a", encoding="utf-8") as file, _bar(name, total) as bar:
            print("$", shlex.join(command), file=file, flush=True)
            process = subprocess.Popen(
                [str(script), *command[1:]],
                cwd=self.out,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                env={**ENVIRONMENT, **os.environ, **(environment or {})},
                preexec_fn=_die_with_parent,
                pass_fds=[self._lock],  # if it outlives this process all the same, it keeps the next one out
            )
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    last.append(line)
                    if position is not None:
                        bar.update(max(0, position(line) - bar.n))
            finally:
                if process.poll() is None and sys.exc_info()[0] is not None:
                    process.terminate()
                status = process.wait()
        if status != 0:
            raise DemoError(f"{''.join(last)}{name}: {command[0]} failed ({status}), see {log}")


def _bar(name: str, total: int) -> tqdm:
    # disable=None: no bar where the output is not a terminal
    return tqdm(desc=name, total=total, leave=False, disable=None if total else True)


def _die_with_parent() -> None:
    """Let no training go on, unseen, after its driver was killed with a signal that cannot be caught."""
    if _PRCTL:
        _PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)


def _lock(path: Path, patience: float = 10) -> int:
    """Hold `path` until this process and its commands end; a killed run's commands are waited for."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    give_up = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > give_up:
                raise DemoError(f"another run is at work in {path.parent}: wait for it, or stop it") from None
            time.sleep(0.2)
