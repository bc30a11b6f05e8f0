"""Which of it makes better small models: ``python benchmarks/quality/run.py STUDY`` trains, translates and compares.

The demo's text, teacher and student, and its parts: what ``make demo`` has made is used, what it has not is made.
Stopped, it goes on where it was. Of each run the scores and the raw translations are kept under
``benchmarks/quality/results``, and a table and a plot are made of what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Dict

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))

import recipes
import run as demo
import scores
import tables
from running import Commands
from steps import Step, run_step
from studies import STUDIES, runs
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--updates", type=int, default=800, help="of each student: %(default)s")
    parser.add_argument("--demo", type=Path, default=Path("demo-run"), help="the demo's folder: %(default)s")
    options = parser.parse_args()
    study, folder = STUDIES[options.study], RESULTS / options.study
    folder.mkdir(parents=True, exist_ok=True)
    commands = Commands(options.demo.resolve())
    for step in demo.steps(commands, demo.parse([])):
        demo.announce(commands.out, step)
        if step.name == recipes.SEQUENCE:
            break
    # a bar's time left is that of whole runs
    for variant, model in tqdm(runs(study, options.seeds), unit="run"):
        kept = folder / f"{model.name}.json"
        if not kept.exists():
            one(commands, model, variant, options.updates, kept)
        tables.write(study, folder)


def one(commands: Commands, model: recipes.Model, variant: str, updates: int, kept: Path) -> None:
    """Train a student, translate the test set, and keep what came of it."""
    name = f"quality-{model.name}"
    started = time.monotonic()
    command = recipes.train(model, updates, name)
    train = Step(name, {"command": command}, partial(_train, commands, model, updates), model.after, resumes=True)
    did_train = run_step(commands.out, train)
    seconds = time.monotonic() - started
    log = commands.log(f"{name}-translated")
    log.unlink(missing_ok=True)
    generate = [word.replace(f"{model.name}/", f"{name}/") for word in recipes.generate(model)]
    commands.run(f"{name}-translated", generate, environment=recipes.TRANSLATION_ENVIRONMENT)
    translations = scores.hypotheses(log.read_text(encoding="utf-8"))
    pairs = demo.test_pairs(commands.out, model.language)
    result: Dict[str, Any] = {
        "variant": variant,
        "seed": model.seed,
        "command": [word for word in command if not word.startswith("/")],
        "updates": updates,
        "seconds": round(seconds) if did_train else None,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "parameters": scores.parameters(
            commands.out / name / recipes.CHECKPOINT, commands.out / model.data, recipes.USER_DIR
        ),
        **scores.score(translations, pairs),
    }
    kept.with_suffix(".txt").write_text("".join(f"{text}\n" for text in translations), encoding="utf-8")
    tables.keep_references(kept.parent, pairs)
    kept.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _train(commands: Commands, model: recipes.Model, updates: int, folder: Path) -> None:
    commands.run(f"quality-{model.name}", recipes.train(model, updates, folder.name), updates, recipes.update_of)


if __name__ == "__main__":
    main()
