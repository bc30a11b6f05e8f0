"""Distil a translation model on real text: fetch, extract, split, train a teacher and students, score them.

    python examples/demo/run.py

takes about fifteen minutes of training on two cores, without a GPU, and ends with a table. Interrupted, it
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
from catalogues import LANGUAGES, Pair, extract, read_pairs
from cleaning import MAX_CHARACTERS
from fetch import WHEELS, fetch
from pieces import MAX_PIECES, VOCABULARY, cut, tags
from running import Commands
from served import Served
from splitting import PERCENT, split
from steps import Step, exit_status, run_step

SPEEDS = "speeds"


def main(arguments: Optional[List[str]] = None) -> int:
    """The exit status: 0, 1 after a message, 130 after Ctrl-C."""
    return exit_status(partial(demonstrate, parse(arguments)))


def demonstrate(options: argparse.Namespace) -> None:
    """Do every step, then print and draw the results."""
    commands = Commands(options.out.resolve())
    for step in steps(commands, options):
        announce(commands.out, step)
    results = read_results(commands.out)
    print("\n" + scores.write_results(commands.out, results), end="")
    figure.draw(results, commands.out / "results.png", recipes.ADAPTED)


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
    parser.add_argument(
        "--sequence-beam",
        type=int,
        default=5,
        metavar="N",
        help="of the teacher's translations of the training set: %(default)s",
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
            {"vocabulary": VOCABULARY, "max_pieces": MAX_PIECES, "tags": tags(LANGUAGES), "language": recipes.ADAPTED},
            partial(cut, out / "text", [recipes.ADAPTED]),
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
                after=model.after,
                resumes=True,
            )
        )
        if model.name == recipes.TEACHER:
            done.append(
                Step(
                    recipes.SEQUENCE,
                    {"command": recipes.translate_training_set(recipes.SEQUENCE, options.sequence_beam)},
                    partial(translate_training_set, commands, options.sequence_beam),
                    after=(recipes.DATA, recipes.TEACHER),
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
    for quantization in recipes.QUANTIZATIONS:
        name = recipes.exported(quantization)
        done.append(
            Step(
                name,
                {"command": recipes.export(quantization, name)},
                partial(export, commands, quantization),
                after=(recipes.SERVED, recipes.DATA),
            )
        )
    done.append(
        Step(
            SPEEDS,
            {"command": recipes.measure_speeds(_speeds(SPEEDS)), "environment": recipes.TRANSLATION_ENVIRONMENT},
            partial(measure_speeds, commands),
            after=tuple(
                [model.name for model in recipes.MODELS if model.language is None]
                + [recipes.exported(quantization) for quantization in recipes.QUANTIZATIONS]
            ),
        )
    )
    return done


def announce(out: Path, step: Step) -> None:
    """Do a step, and say so in a line."""
    label = f"{step.name:28}"
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


def translate_training_set(commands: Commands, beam: int, folder: Path) -> None:
    """Have the teacher translate the training set, from where an earlier start was."""
    total = sum(1 for _ in (commands.out / "pieces" / "train.src").open(encoding="utf-8"))
    command = recipes.translate_training_set(folder.name, beam)
    # a process a core, as the command has them
    environment = recipes.TRANSLATION_ENVIRONMENT
    commands.run(recipes.SEQUENCE, command, total, recipes.sentence_of, environment)


def translate(commands: Commands, model: recipes.Model, folder: Path) -> None:
    """Translate the test set and score it, into ``scores.json``."""
    name = f"{model.name}-translated"
    log = commands.log(name)
    log.unlink(missing_ok=True)  # the translations are read from it
    pairs = test_pairs(commands.out, model.language)
    commands.run(name, recipes.generate(model), len(pairs), Translated(), recipes.TRANSLATION_ENVIRONMENT)
    checkpoint = commands.out / model.name / recipes.CHECKPOINT
    result: Dict[str, Any] = {
        "parameters": scores.parameters(checkpoint, commands.out / model.data, recipes.USER_DIR),
        "bytes": checkpoint.stat().st_size,
        **scores.score(scores.hypotheses(log.read_text(encoding="utf-8")), pairs),
    }
    (folder / "scores.json").write_text(json.dumps(result), encoding="utf-8")


def export(commands: Commands, quantization: str, folder: Path) -> None:
    """Export the served student, translate the test set with it and score it, into ``scores.json``."""
    commands.run(f"export-{quantization}", recipes.export(quantization, folder.name))
    lines = (commands.out / "pieces" / "test.src").read_text(encoding="utf-8").splitlines()
    model = folder / "model"
    result = {
        "bytes": sum(path.stat().st_size for path in model.iterdir()),
        **scores.score(Served(model)(lines), test_pairs(commands.out, None)),
    }
    (folder / "scores.json").write_text(json.dumps(result), encoding="utf-8")


def measure_speeds(commands: Commands, folder: Path) -> None:
    """Measure them, into ``speeds.json``."""
    commands.run(SPEEDS, recipes.measure_speeds(_speeds(folder.name)), environment=recipes.TRANSLATION_ENVIRONMENT)


def _speeds(folder: str) -> str:
    return f"{folder}/speeds.json"


def test_pairs(out: Path, language: Optional[str]) -> List[Pair]:
    """The test set of a language, or of all."""
    return list(read_pairs(out / "pieces" / (f"{language}.test.tsv" if language else "test.tsv")))


class Translated:
    """Counts the translations that fairseq-generate prints."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, line: str) -> int:
        self.count += line.startswith("D-")
        return self.count


def read_results(out: Path) -> Dict[str, Dict[str, Any]]:
    """What the steps wrote, by the rows of the table."""
    speeds = json.loads((out / SPEEDS / "speeds.json").read_text(encoding="utf-8"))
    folders = {model.name: f"{model.name}-translated" for model in recipes.MODELS}
    folders.update({recipes.served(kind): recipes.exported(kind) for kind in recipes.QUANTIZATIONS})
    results = {
        name: json.loads((out / folder / "scores.json").read_text(encoding="utf-8")) for name, folder in folders.items()
    }
    for name, result in results.items():
        result["speeds"] = speeds.get(name, {})
        result.setdefault("parameters", results[recipes.SERVED]["parameters"])
    return results


if __name__ == "__main__":
    sys.exit(main())
