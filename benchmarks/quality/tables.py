"""A study's table and plot, of the runs that there are."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any, Dict, List

from catalogues import Pair
from studies import Study

# of the demo's languages: two have 88 % of the tokens
FREQUENT, RARE = ("de", "es"), ("bn", "hi", "mr", "ta")
_REFERENCES = "references.json"


def keep_references(folder: Path, pairs: List[Pair]) -> None:
    """Of the test set, for the comparison of pairs; not to be committed, they are other people's text."""
    (folder / _REFERENCES).write_text(
        json.dumps([[pair.language, pair.english] for pair in pairs], ensure_ascii=False), encoding="utf-8"
    )


def write(study: Study, folder: Path) -> None:
    """Write ``table.md`` and ``scores.png``."""
    found: Dict[str, List[Dict[str, Any]]] = {variant: [] for variant in study.variants}
    for path in sorted(folder.glob("*-seed*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        result["translations"] = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        if result["variant"] in found:
            found[result["variant"]].append(result)
    found = {variant: results for variant, results in found.items() if results}
    if not found:
        return
    references = json.loads((folder / _REFERENCES).read_text(encoding="utf-8"))
    lines = ["| student | seeds | BLEU | chrF | chrF, frequent | chrF, rare | better than the first, p | seconds |"]
    lines.append("|---" * 8 + "|")
    base = found.get(study.baseline)
    for variant, results in found.items():
        cells = [variant, str(len(results))]
        cells += [_spread([r["scores"]["all"][metric] for r in results]) for metric in ("bleu", "chrf")]
        cells += [_spread([_pooled(r, references, group) for r in results]) for group in (FREQUENT, RARE)]
        cells.append("" if base is None or variant == study.baseline else _compare(results, base, references))
        seconds = [r["seconds"] for r in results if r["seconds"]]
        cells.append(f"{mean(seconds):.0f}" if seconds else "")
        lines.append(f"| {' | '.join(cells)} |")
    first = next(iter(found.values()))[0]
    lines += ["", *(f"{metric}: `{signature}`" for metric, signature in first["signatures"].items())]
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _draw(found, folder / "scores.png")


def _spread(values: List[float]) -> str:
    """The mean, and the least and the most."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _pooled(result: Dict[str, Any], references: List[List[str]], languages: Any) -> float:
    """chrF of the languages' sentences together: each rare one has some forty."""
    from sacrebleu.metrics import CHRF

    chosen = [i for i, (language, _) in enumerate(references) if language in languages]
    texts = [result["translations"][i] for i in chosen]
    return float(CHRF().corpus_score(texts, [[references[i][1] for i in chosen]]).score)


def _compare(results: List[Dict[str, Any]], base: List[Dict[str, Any]], references: List[List[str]]) -> str:
    """Paired bootstrap resampling (Koehn, 2004) of chrF over the sentences of all seeds that both have."""
    from sacrebleu.metrics import CHRF
    from sacrebleu.significance import PairedTest

    texts = [{r["seed"]: r["translations"] for r in rows} for rows in (base, results)]
    seeds = sorted(texts[0].keys() & texts[1].keys())
    if not seeds:
        return ""
    systems = [(name, [text for seed in seeds for text in rows[seed]]) for name, rows in zip(("base", "x"), texts)]
    english = [[text for _ in seeds for _, text in references]]
    test = PairedTest(systems, {"chrF": CHRF(references=english)}, english, test_type="bs", n_samples=1000)
    _, found = test()
    (metric,) = (name for name in found if name != "System")  # sacrebleu's own name of it
    theirs, ours = found[metric]
    return f"{ours.p_value:.3f}{'' if ours.score > theirs.score else ' (worse)'}"


def _draw(found: Dict[str, List[Dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.5 + 0.4 * len(found)), layout="constrained")
    for row, results in enumerate(found.values()):
        points = [r["scores"]["all"]["chrf"] for r in results]
        axes.plot(points, [row] * len(points), "o", color="tab:blue", alpha=0.6)
        axes.plot([mean(points)], [row], "|", color="black", markersize=14)
    axes.set(xlabel="chrF of the test set, a point a seed, a line their mean")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
