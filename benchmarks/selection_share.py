"""(g) The share of each language's tokens that is selected, over the updates, by the kind and size of the queues.

``python benchmarks/selection_share.py`` trains the demo's student on the demo's data with each setting, and reads the
training's own logs. What ``make demo`` has not made yet, data and teacher, it makes. Stopped, it goes on where it was
when it is run again. All students learn from one cache of the teacher's 32 most probable words: what is selected is up
to their own losses, and they are trained in half of the time.
"""

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Dict, List

import report
from common import HERE, save

sys.path.insert(0, str(HERE.parent / "examples" / "demo"))

import recipes
import run
from catalogues import LANGUAGES
from running import Commands
from steps import Step, run_step

CACHE = ("--teacher-cache-dir", "cache-shares", "--teacher-cache-top-k", "32", "--save-interval-updates", "200")
# --kd-queue-window and --kd-queue-size
VARIANTS = [
    ("each", 1_000_000),
    ("each", 100_000),
    ("each", 10_000),
    ("shared", 100_000),
    ("shared", 30_000),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo-run"), help="its folder: %(default)s")
    parser.add_argument("--teacher-updates", type=int, default=1200, metavar="N", help="%(default)s, as the demo's")
    parser.add_argument("--updates", type=int, default=800, metavar="N", help="of each student: %(default)s")
    options = parser.parse_args()
    commands = Commands(options.demo.resolve())
    demo = run.parse(["--teacher-updates", str(options.teacher_updates)])
    for step in run.steps(commands, demo):
        run.announce(commands.out, step)
        if step.name == recipes.TEACHER:
            break
    (student,) = (model for model in recipes.MODELS if model.name == "student-word")
    rows = []
    for window, size in VARIANTS:
        flags = ("--kd-queue-window", window, "--kd-queue-size", str(size))
        model = dataclasses.replace(
            student, name=f"student-{window}-{size}", arguments=(*student.arguments, *CACHE, *flags)
        )
        step = Step(
            model.name,
            {"command": recipes.train(model, options.updates, model.name)},
            partial(run.train, commands, model, options.updates),
            after=(model.data, *model.reads),
            resumes=True,
        )
        run_step(commands.out, step)
        log = logged(commands.log(model.name), options.updates)
        shares = {language: [float(line[f"kd_selected_{language}"]) for line in log] for language in LANGUAGES}
        updates = [int(line["num_updates"]) for line in log]
        rows.append({"window": window, "size": size, "updates": updates, "shares": shares})
        save("selection_share", rows, teacher_updates=options.teacher_updates)
        print(report.selection_share(rows), flush=True)


def logged(path: Path, updates: int) -> List[Dict[str, str]]:
    """The lines of fairseq-train's log, one an interval; of updates that were done twice, the last."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        update = recipes.update_of(line)
        if 0 < update <= updates:
            found[update] = json.loads(line.partition("| train_inner | ")[2])
    return [found[update] for update in sorted(found)]


if __name__ == "__main__":
    main()
