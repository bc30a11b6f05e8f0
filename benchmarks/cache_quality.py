"""(f) What a student learns from the K most probable words of its teacher, against all of them.

After ``make demo``, ``python benchmarks/cache_quality.py`` trains its distilled student again from caches, for scores.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from common import HERE, save

sys.path.insert(0, str(HERE.parent / "examples" / "demo"))

import recipes
import run
from running import Commands

TOP_K = (32, 4)
UPDATES = 800  # as many as the demo's students are trained for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo-run"), help="its folder: %(default)s")
    commands = Commands(parser.parse_args().demo.resolve())
    (full,) = (model for model in recipes.MODELS if model.name == "student-word")
    models = {"all words": full}
    for k in TOP_K:
        cache = ("--teacher-cache-dir", f"cache-{k}", "--teacher-cache-top-k", str(k))
        models[f"K = {k}"] = dataclasses.replace(full, name=f"student-kd-{k}", arguments=(*full.arguments, *cache))
    rows = []
    for variant, model in models.items():
        translated = commands.out / f"{model.name}-translated"
        if not (translated / "scores.json").exists():
            translated.mkdir(exist_ok=True)
            (commands.out / model.name).mkdir(exist_ok=True)
            run.train(commands, model, UPDATES, commands.out / model.name)
            run.translate(commands, model, translated)
        scores = run.read_scores(commands.out, model)["scores"]
        rows.append({"variant": variant, "bleu": scores["all"]["bleu"], "chrf": scores["all"]["chrf"]})
        print(rows[-1], flush=True)
        save("cache_quality", rows, updates=UPDATES)


if __name__ == "__main__":
    main()
