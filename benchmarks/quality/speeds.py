"""How fast students train, measured by turns: what equal time is, on a machine that has other work as well."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Callable, Dict, List

from running import Commands
from studies import Run
from tqdm import tqdm

UPDATES, FIRST, ROUNDS = 80, 20, 3


def measure(
    path: Path,
    runs: List[Run],
    command: Callable[[Run, str], List[str]],
    commands: Commands,
    environment: Dict[str, str],
) -> Dict[str, float]:
    """Updates a second of each run's variant; kept in `path`, and read from there.

    What comes later is measured by turns with the last of `runs`, and stands beside it as it stood then.

    Args:
        path: the JSON file
        runs: one of each variant, the last of them that with which the others are compared
        command: that trains a run, with the folder to save to
        commands: runs it
        environment: of the trainings
    """
    kept: Dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    runs = [run for run in runs if run.variant not in kept or run == runs[-1]]
    if len(runs) == 1:
        return kept
    taken: Dict[str, List[float]] = {run.variant: [] for run in runs}
    log = commands.log("speeds")
    for _ in tqdm(range(ROUNDS), desc="speeds, by turns", unit="turn"):
        for run in runs:
            log.unlink(missing_ok=True)
            words = [*command(run._replace(updates=UPDATES), "speeds"), "--no-save"]
            commands.run("speeds", words, environment=environment)
            taken[run.variant].append(statistics.median(_speeds(log.read_text(encoding="utf-8"))))
    found = {variant: statistics.median(speeds) for variant, speeds in taken.items()}
    compared = runs[-1].variant
    scale = kept.get(compared, found[compared]) / found[compared]
    found = {**kept, **{name: round(speed * scale, 3) for name, speed in found.items() if name not in kept}}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def _speeds(output: str) -> List[float]:
    """Of each ten updates, once the first are over."""
    lines = [line.partition("| train_inner | ")[2] for line in output.splitlines()]
    metrics = [json.loads(line) for line in lines if line]
    return [float(each["ups"]) for each in metrics if int(each["num_updates"]) > FIRST]
