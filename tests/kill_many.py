"""Kills a training at random moments and starts it again, until it ends: ``python tests/kill_many.py --kills 200``.

Every second kill comes at any moment of a run, its start included, every second one while a file is written.
"""

import argparse
import contextlib
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import List, NamedTuple

from commands import Forked, run
from conftest import KD, SIZES, TRAINING, load, strategy_flags
from corpus import preprocess
from fairseq import checkpoint_utils
from test_resume import assert_same_run

UPDATES = 24  # one epoch of 16, and half of the next
# saved after every update, and copied twice, with validation between: saving has a large share of the time
SAVING = ["--save-interval-updates", "1", "--keep-interval-updates", "2", "--keep-last-epochs", "1"]
# large enough for a file to be met half written
WIDE = [f"--{side}-{dim}" for side in ("encoder", "decoder") for dim in ("embed-dim=128", "ffn-embed-dim=512")]
FLAGS = [*strategy_flags("global_language_wise"), *WIDE, *SAVING, "--dropout", "0.1", "--max-update", UPDATES]


class Kill(NamedTuple):
    """What one kill found.

    Attributes:
        done: updates that the run had reported
        saved: updates in ``checkpoint_last.pt``
        is_in_saving: a file was being written
    """

    done: int
    saved: int
    is_in_saving: bool

    @property
    def lost(self) -> int:
        return max(self.done - self.saved, 0)


class Killer:
    """Runs one training over and over.

    Args:
        data: the binarized corpus
        teacher: its checkpoint
        folder: an empty folder for the runs
        seed: of the moments
    """

    def __init__(self, data: Path, teacher: Path, folder: Path, seed: int) -> None:
        self._command = [data, *TRAINING, "--arch", "transformer", *SIZES, *KD, "--teacher-checkpoint-path", teacher]
        self._command += FLAGS
        self._folder = folder
        self._rng = random.Random(seed)
        self.kills: List[Kill] = []
        self.runs = 0
        begin = time.monotonic()
        result = run(folder / "log", "fairseq-train", *self._command, "--save-dir", folder / "whole")
        self._seconds = time.monotonic() - begin
        assert result.returncode == 0, result.output
        saved = [float(x) for x in re.findall(r"writing took ([\d.e-]+) seconds", result.output)]
        self._saving_seconds = sorted(saved)[len(saved) // 2]

    def run_to_the_end(self) -> None:
        """Kill and restart one run until it ends by itself; it must then be the run that was never killed."""
        self.runs += 1
        save_dir = self._folder / f"run{self.runs}"
        save_dir.mkdir()
        while True:
            left = files(save_dir, "*.tmp")  # by the run before: this one removes it before it trains
            process = Forked(save_dir / "log", "fairseq-train", *self._command, "--save-dir", save_dir)
            if not process.is_killed_when(self._a_moment(process, save_dir)):
                break
            is_in_saving = bool(files(save_dir, "*.tmp") - left)
            self.kills.append(self._look(save_dir, process.output, is_in_saving))
        result = process.wait()
        assert result.returncode == 0, result.output
        assert not list(save_dir.glob("*.tmp"))
        assert_same_run(self._folder / "whole" / "checkpoint_last.pt", save_dir / "checkpoint_last.pt")

    def _a_moment(self, process: Forked, save_dir: Path):
        """A condition that comes true at a random moment: while the run starts, or some updates later."""
        updates, is_in_saving = self._rng.choice([0, 1, 2, 3, 4]), len(self.kills) % 2 == 1
        delay = self._rng.uniform(0, self._saving_seconds if is_in_saving else self._seconds / UPDATES)
        if updates == 0 and not is_in_saving:
            delay = self._rng.uniform(0, self._seconds / 4)
        before, begin = None, None

        def has_come():
            nonlocal before, begin
            if begin is None:
                if process.output.count("num_updates=") < updates:
                    return False
                before = before or files(save_dir, "*.pt*")
                if is_in_saving and files(save_dir, "*.pt*") == before:
                    return False
                begin = time.monotonic()
            return time.monotonic() > begin + delay

        return has_come

    def _look(self, save_dir: Path, output: str, is_in_saving: bool) -> Kill:
        """Every checkpoint must be whole, whatever was going on."""
        for path in save_dir.glob("*.pt"):
            checkpoint_utils.load_checkpoint_to_cpu(str(path))  # checks the sums
        last = save_dir / "checkpoint_last.pt"
        saved = load(last)["optimizer_history"][-1]["num_updates"] if last.exists() else 0
        done = max(map(int, re.findall(r"num_updates=(\d+),", output)), default=0)
        return Kill(done, saved, is_in_saving)


def files(save_dir: Path, pattern: str):
    """Names, times and sizes."""
    found = set()
    for path in save_dir.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # it has got another name
            found.add((path.name, path.stat().st_mtime_ns, path.stat().st_size))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = preprocess(folder / "corpus")
        flags = ["--arch", "transformer", *SIZES, "--criterion", "label_smoothed_cross_entropy", "--max-update", "40"]
        result = run(folder / "log", "fairseq-train", data, *TRAINING, *flags, "--save-dir", folder / "teacher")
        assert result.returncode == 0, result.output
        killer = Killer(data, folder / "teacher" / "checkpoint_last.pt", folder, options.seed)
        while len(killer.kills) < options.kills:
            killer.run_to_the_end()
            report(killer)


def report(killer: Killer) -> None:
    kills = killer.kills
    lost = [kill.lost for kill in kills]
    print(
        f"{len(kills)} kills, {sum(kill.is_in_saving for kill in kills)} of them while a file was written, "
        f"in {killer.runs} runs of {UPDATES} updates: all restarted and ended with the weights and queues of the run "
        f"that was not killed; updates lost by a kill: {sum(lost) / max(len(lost), 1):.2f} on average, "
        f"{max(lost, default=0)} at most",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
