"""Which of it makes better small models: ``python benchmarks/quality/run.py STUDY`` trains, translates and compares.

Stopped, it goes on where it was. Of each run the scores and the raw translations are kept under
``benchmarks/quality/results``, with a table and a plot of what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Dict, List, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))

import corpora
import material
import recipes
import run as demo
import scores
import tables
from running import Commands
from speeds import measure
from steps import DemoError, Step, exit_status, run_step
from studies import CACHES, SIZES, STUDIES, Run, Size, adapters, in_equal_time, longer, runs, teachers
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES["cpu"])
    parser.add_argument("--size", choices=SIZES, default="cpu", help="of the models: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the students")
    parser.add_argument("--only", nargs="+", default=[""], help="the variants whose names begin so")
    parser.add_argument("--out", type=Path, default=Path("quality-run"), help="folder of text and models: %(default)s")
    parser.add_argument("--report", action="store_true", help="train nothing, write table and plot of what there is")
    return exit_status(partial(study_of, parser.parse_args()))


def study_of(options: argparse.Namespace) -> None:
    """Run what the options ask for, and report it."""
    study, size, root = STUDIES[options.size][options.study], SIZES[options.size], options.out.resolve()
    folder, corpus = RESULTS / options.size / study.corpus, root / options.size / study.corpus
    folder.mkdir(parents=True, exist_ok=True)
    labels = [study.label(name) for name in study.variants]
    labels += [in_equal_time(study.label(name)) for name in study.equal_time]
    for only in options.only:
        if not any(label.startswith(only) for label in labels):
            raise DemoError(f"--only {only!r}: no variant begins so; there are: {'; '.join(labels)}")
    if options.report and not (corpus / recipes.DATA).is_dir():
        raise DemoError(f"--report: there is no text in {corpus} to compare with; leave it out, or name --out")
    if not options.report:
        studied = Studied(Commands(corpus), size, folder)
        demo.announce(root, corpora.wheels(root))
        for step in corpora.steps(corpora.CORPORA[study.corpus], studied.commands, root / "wheels"):
            demo.announce(studied.commands.out, step)
        studied.students(options.study, options.size, options.seeds, tuple(options.only))
    tables.write(study, folder, corpus, RESULTS / options.size / options.study)


class Studied:
    """Trains and translates.

    Args:
        commands: of the corpus
        size: of the models
        folder: what is kept of each run
    """

    def __init__(self, commands: Commands, size: Size, folder: Path) -> None:
        self.commands, self.size, self._folder = commands, size, folder
        self._loading = Lock()

    def students(self, name: str, size: str, seeds: List[int], only: Tuple[str, ...]) -> None:
        """Train what there is no result of, and what that learns from."""
        study = STUDIES[size][name]

        def lacks(run: Run) -> bool:
            return run.variant.startswith(only) and not self._kept(run.model.name).exists()

        every = runs(study, self.size, seeds)
        some_speed = dict.fromkeys(study.variants, 1.0)
        timed = [run for run in longer(study, self.size, seeds, some_speed) if lacks(run)]
        left = [run for run in every if lacks(run)]
        self._prepare([*left, *timed], size)
        if timed:
            labels = {run.variant for run in timed}
            names = [name for name in study.equal_time if in_equal_time(study.label(name)) in labels]
            of_each = {run.variant: run for run in runs(study._replace(times=1), self.size, [1])}
            one_each = [of_each[name] for name in (*names, study.against[-1])]
            path = self._folder / "speeds.json"
            found = measure(path, one_each, self._command, self.commands, self.size.environment)
            left += [run for run in longer(study, self.size, seeds, found) if lacks(run)]
        self._all(left)
        if only == ("",):
            on_top = [run for run in adapters(study, size, seeds) if lacks(run)]
            below = {name for run in on_top for name in run.model.reads}
            self._all([run for run in every if run.model.name in below])
            self._all(on_top)
            if study.plot == "size":
                self._decoding(runs(study, self.size, seeds[:1]))

    def _prepare(self, those: List[Run], size: str) -> None:
        """What they learn from."""
        taught_by = teachers(those, size) if those else []
        for tuned in (False, True):  # those are of the others
            of = [model for model in taught_by if bool(model.reads) is tuned]
            self._all([Run(model.name, model, getattr(self.size, model.updates)) for model in of])
        if any(run.model.sequence for run in those):
            demo.announce(self.commands.out, material.sequence(self.commands, self.size))
        for cache in {name: CACHES[name] for run in those for name in run.model.reads if name in CACHES}.values():
            demo.announce(self.commands.out, material.cache(self.commands, self.size, cache))

    def _kept(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _all(self, those: List[Run]) -> None:
        """Some side by side; the bar's time left is that of what is waited for."""
        if not those:
            return
        with ThreadPoolExecutor(self.size.at_once) as pool, tqdm(total=sum(run.updates for run in those)) as bar:
            bar.set_description(f"{len(those)} trainings, updates")
            futures = {pool.submit(self._one, run): run for run in those}
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update(futures[future].updates)
            finally:
                for future in futures:
                    future.cancel()

    def _command(self, run: Run, folder: str) -> List[str]:
        # a run is short: nothing but its last weights is needed
        flags = ("--disable-validation", "--save-interval-updates", "1000000", "--no-save-optimizer-state")
        return [*recipes.train(run.model, run.updates, folder, self.size.device), *flags]

    def _train(self, run: Run) -> float:
        """How many seconds it took, 0 if it had been done."""
        name = run.model.name
        started = time.monotonic()
        work = partial(self._run, run)
        step = Step(name, {"command": self._command(run, name)}, work, run.model.after)
        return time.monotonic() - started if run_step(self.commands.out, step) else 0

    def _run(self, run: Run, folder: Path) -> None:
        self.commands.run(run.model.name, self._command(run, folder.name), environment=self.size.environment)

    def _decoding(self, those: List[Run]) -> None:
        """How fast each translates, by turns."""
        path = self._folder / "decoding.json"
        models = {run.variant: f"{run.model.name}/{recipes.CHECKPOINT}" for run in those}
        if path.exists() and json.loads(path.read_text(encoding="utf-8")).keys() == models.keys():
            return
        self._all(those)
        command = recipes.measure_speeds("decoding-measured.json", models)
        self.commands.run("decoding", command, environment=recipes.TRANSLATION_ENVIRONMENT)
        found = json.loads((self.commands.out / "decoding-measured.json").read_text(encoding="utf-8"))
        speeds = {name: round(by_size[scores.BATCHES[-1]], 1) for name, by_size in found.items()}
        path.write_text(json.dumps(speeds, indent=1) + "\n", encoding="utf-8")

    def _one(self, run: Run) -> None:
        """Train, translate the test set, and keep what came of it; nothing of it if that has been done."""
        seconds = self._train(run)
        if not seconds and self._kept(run.model.name).exists():
            return
        model, out = run.model, self.commands.out
        name = f"{model.name}-translated"
        log = self.commands.log(name)
        log.unlink(missing_ok=True)
        self.commands.run(name, recipes.generate(model, self.size.device), environment=self.size.environment)
        translations = scores.hypotheses(log.read_text(encoding="utf-8"))
        checkpoint = out / model.name / recipes.CHECKPOINT
        result: Dict[str, Any] = {
            "variant": run.variant,
            "seed": model.seed,
            "language": model.language,
            "command": [word for word in self._command(run, model.name) if not word.startswith("/")],
            "updates": run.updates,
            "seconds": round(seconds) or None,
            "at_once": self.size.at_once,
            "machine": machine(),
            "parameters": self._parameters(checkpoint, out / model.data),
            **scores.score(translations, demo.test_pairs(out, model.language)),
        }
        kept = self._kept(model.name)
        kept.with_suffix(".txt").write_text("".join(f"{text}\n" for text in translations), encoding="utf-8")
        kept.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    def _parameters(self, checkpoint: Path, data: Path) -> int:
        with self._loading:  # fairseq's registries are not made for threads
            return scores.parameters(checkpoint, data, recipes.USER_DIR)


def machine() -> str:
    """What ran it."""
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
