"""Distil a translation model on real text: fetch, extract, split, train a teacher and students, score them.

    python examples/demo/run.py

takes about ten minutes of training on two cores, without a GPU, and ends with a table. Interrupted, it
carries on where it was when it is run again; with other options it does again what depends on them.
A short form of the same, with models that have hardly begun to learn, takes about two minutes:

    python examples/demo/run.py --out demo-short --teacher-updates 60 --student-updates 40 --adapter-updates 20
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional

import figure
import recipes
import scores
from catalogues import LANGUAGES, extract, read_pairs
from cleaning import MAX_CHARACTERS
from fetch import WHEELS, fetch
from pieces import MAX_PIECES, TAGS, VOCABULARY, cut
from running import Commands
from splitting import PERCENT, split
from steps import DemoError, Step, run_step


def main(arguments: Optional[List[str]] = None) -> int:
    """The exit status: 0, 1 after a message, 130 after Ctrl-C."""
    options = parse(arguments)
    try:
        commands = Commands(options.out.resolve())
        for step in steps(commands, options):
            announce(commands.out, step)
        results = {model.name: read_scores(commands.out, model) for model in recipes.MODELS}
        print("\n" + scores.write_results(commands.out, results), end="")
        figure.draw(results, commands.out / "results.png", recipes.ADAPTED)
    except DemoError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again to carry on", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Optional[List[str]]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-run"), help="folder of all results: %(default)s")
    for name, default in (("teacher", 1200), ("student", 800), ("adapter", 300)):
        parser.add_argument(
            f"--{name}-updates",
            type=int,
            default=default,
            metavar="N",
            help=f"how long to train the {name}s: %(default)s",
        )
    return parser.parse_args(arguments)


def steps(commands: Commands, options: argparse.Namespace) -> List[Step]:
    """All steps, in order."""
    out = commands.out
    done = [
        Step(
            "wheels",
            {"wheels": WHEELS.read_text(encoding="utf-8")},
            partial(fetch, log=commands.log("wheels")),
            resumes=True,
        ),
        Step(
            "pairs",
            {"languages": LANGUAGES, "max_characters": MAX_CHARACTERS},
            partial(extract, out / "wheels"),
            after=("wheels",),
        ),
        Step("text", {"percent": PERCENT}, partial(split, out / "pairs" / "pairs.tsv"), after=("pairs",)),
        Step(
            "pieces",
            {"vocabulary": VOCABULARY, "max_pieces": MAX_PIECES, "tags": TAGS, "language": recipes.ADAPTED},
            partial(cut, out / "text", recipes.ADAPTED),
            after=("text",),
        ),
    ]
    for language in (None, recipes.ADAPTED):
        name = recipes.data_folder(language)
        done.append(
            Step(
                name,
                {"command": recipes.preprocess(language, name)},
                partial(preprocess, commands, language),
                after=("pieces", *([recipes.DATA] if language else [])),
            )
        )
    for model in recipes.MODELS:
        updates = getattr(options, model.updates)
        done.append(
            Step(
                model.name,
                {"command": recipes.train(model, updates, model.name)},
                partial(train, commands, model, updates),
                after=(model.data, *model.reads),
                resumes=True,
            )
        )
    for model in recipes.MODELS:
        done.append(
            Step(
                f"{model.name}-translated",
                {"command": recipes.generate(model), "environment": recipes.TRANSLATION_ENVIRONMENT},
                partial(translate, commands, model),
                after=(model.data, model.name),
            )
        )
    return done


def announce(out: Path, step: Step) -> None:
    """Do a step, and say so in a line."""
    label = f"{step.name:25}"
    print(label, end="", flush=True)
    start = time.monotonic()
    outcome = "not done"
    try:
        worked = run_step(out, step)
        minutes, seconds = divmod(round(time.monotonic() - start), 60)
        outcome = f"{minutes} min {seconds:02} s" if worked else "done before"
    finally:
        # on a terminal, a progress bar has been on this line
        print(f"\r{label}{outcome}" if sys.stdout.isatty() else outcome, flush=True)


def preprocess(commands: Commands, language: Optional[str], folder: Path) -> None:
    """Binarize the text of a language, or of all, into `folder`."""
    commands.run(recipes.data_folder(language), recipes.preprocess(language, folder.name))


def train(commands: Commands, model: recipes.Model, updates: int, folder: Path) -> None:
    """Train `model`, from the newest checkpoint in `folder` if there is one."""
    commands.run(model.name, recipes.train(model, updates, folder.name), updates, recipes.update_of)


def translate(commands: Commands, model: recipes.Model, folder: Path) -> None:
    """Translate the test set and score it, into ``scores.json``."""
    name = f"{model.name}-translated"
    log = commands.log(name)
    log.unlink(missing_ok=True)  # the translations are read from it
    test = f"{model.language}.test.tsv" if model.language else "test.tsv"
    pairs = list(read_pairs(commands.out / "pieces" / test))
    commands.run(name, recipes.generate(model), len(pairs), Translated(), recipes.TRANSLATION_ENVIRONMENT)
    output = log.read_text(encoding="utf-8")
    result: Dict[str, Any] = {
        "parameters": scores.parameters(
            commands.out / model.name / recipes.CHECKPOINT, commands.out / model.data, recipes.USER_DIR
        ),
        "sentences_per_second": scores.sentences_per_second(output),
        **scores.score(scores.hypotheses(output), pairs),
    }
    (folder / "scores.json").write_text(json.dumps(result), encoding="utf-8")


class Translated:
    """Counts the translations that fairseq-generate prints."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, line: str) -> int:
        self.count += line.startswith("D-")
        return self.count


def read_scores(out: Path, model: recipes.Model) -> Dict[str, Any]:
    """What :func:`translate` wrote."""
    return json.loads((out / f"{model.name}-translated" / "scores.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
