"""A study's table and plot, of the runs that there are."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any, Dict, List, NamedTuple, Optional

import plots
import run as demo
import scores
from catalogues import Pair
from studies import ADAPTERS, Study, in_equal_time

# with fewer test sentences a language's scores are of chance
FEWEST = 300
_SAMPLES = 1000


class Row(NamedTuple):
    """What came of a variant, seed by seed."""

    name: str
    runs: List[Dict[str, Any]]

    def values(self, metric: str) -> List[float]:
        """The score of the whole test set, of each seed."""
        return [next(iter(run["scores"].values()))[metric] for run in self.runs]


def write(study: Study, folder: Path, corpus: Path, path: Path) -> None:
    """Write ``<path>.md`` and ``<path>.png``.

    Args:
        study: whose runs to take
        folder: what was kept of the corpus's runs
        corpus: its text
        path: of both, without the suffix
    """
    references = demo.test_pairs(corpus, None)
    rows = read(study, folder, references)
    if not rows:
        return
    texts = [pair.english for pair in references]
    groups = _groups(rows[0].runs[0]["scores"])
    of_size = study.plot == "size"
    head = ["student", "seeds", "updates", *(["parameters", "MB"] if of_size else []), "BLEU", "chrF"]
    speeds = _speeds(folder) if of_size else {}
    head += [f"chrF, {name} ({size})" for name, size in groups.items()]
    head += [f"over {name}" for name in study.against] + ["gain"] * bool(study.without)
    head += ["sentences/s"] if of_size else []
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row.name, str(len(row.runs)), str(row.runs[0]["updates"] or "")]
        if of_size:
            parameters = row.runs[0]["parameters"]
            cells += [f"{parameters:,}", f"{parameters * plots.MEGABYTES:.1f}"]
        cells += [_spread(row.values(metric)) for metric in ("bleu", "chrf")]
        cells += [_spread([_pooled(run, references, name) for run in row.runs]) for name in groups]
        bases = [study.label(name) if row.name not in study.teachers else "" for name in study.against]
        bases += [study.without.get(row.name, "")] * bool(study.without)
        cells += [_compare(row, _find(rows, base), texts) for base in bases]
        if of_size:
            cells.append(f"{speeds[row.name]:.0f}" if row.name in speeds else "")
        lines.append(cells)
    text = [study.question, "", *(f"| {' | '.join(cells)} |" for cells in lines), ""]
    text += [f"{metric}: `{signature}`" for metric, signature in rows[0].runs[0]["signatures"].items()]
    path.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
    if of_size:
        plots.sizes(rows, speeds, path.with_suffix(".png"))
    else:
        plots.scores(rows, path.with_suffix(".png"))


def read(study: Study, folder: Path, references: List[Pair]) -> List[Row]:
    """The teachers, then the variants in the study's order, those of equal time and with adapters behind."""
    labels = [study.label(name) for name in study.variants]
    order = [*study.teachers, *labels, *(in_equal_time(study.label(name)) for name in study.equal_time)]
    adapted = f"{study.adapted}{ADAPTERS}"
    found: Dict[str, List[Dict[str, Any]]] = {name: [] for name in [*order, adapted]}
    for path in [*sorted(folder.glob("*-seed*.json")), *(folder / f"{name}.json" for name in study.teachers)]:
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            result["translations"] = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
            found.get(result["variant"], []).append(result)
    found[adapted] = [
        together
        for base in found.get(study.adapted, [])
        for together in _together([run for run in found[adapted] if run["seed"] == base["seed"]], base, references)
    ]
    return [Row(name, sorted(runs, key=lambda run: int(run["seed"]))) for name, runs in found.items() if runs]


def _together(runs: List[Dict[str, Any]], base: Dict[str, Any], references: List[Pair]) -> List[Dict[str, Any]]:
    """Those of one language each, as one of all; none before there are all."""
    if {run["language"] for run in runs} != {pair.language for pair in references}:
        return []
    lines = {run["language"]: iter(run["translations"]) for run in runs}
    translations = [next(lines[pair.language]) for pair in references]
    parameters = base["parameters"] + sum(run["parameters"] - base["parameters"] for run in runs)
    return [
        {**runs[0], "parameters": parameters, "translations": translations, **scores.score(translations, references)}
    ]


def _find(rows: List[Row], name: str) -> Optional[Row]:
    return next((row for row in rows if row.name == name), None)


def _speeds(folder: Path) -> Dict[str, float]:
    path = folder / "decoding.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _groups(scores: Dict[str, Any]) -> Dict[str, int]:
    """Languages with enough test sentences, and the others together, with how many they have."""
    languages = {name: score["sentences"] for name, score in scores.items() if name != "all"}
    if len(languages) == 1:
        return {}
    found = {name: size for name, size in sorted(languages.items(), key=lambda each: -each[1]) if size >= FEWEST}
    rest = {name: size for name, size in languages.items() if size < FEWEST}
    if rest and found:
        found[" ".join(rest)] = sum(rest.values())
    return found


def _pooled(run: Dict[str, Any], references: List[Pair], group: str) -> float:
    """chrF of the languages' sentences together."""
    from sacrebleu.metrics import CHRF

    chosen = [i for i, pair in enumerate(references) if pair.language in group.split()]
    texts = [run["translations"][i] for i in chosen]
    return float(CHRF().corpus_score(texts, [[references[i].english for i in chosen]]).score)


def _spread(values: List[float]) -> str:
    """The mean, and the least and the most."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _compare(row: Row, base: Optional[Row], references: List[str]) -> str:
    """The difference in chrF, and p by paired bootstrap resampling (Koehn, 2004), over all seeds that both have."""
    from sacrebleu.metrics import CHRF
    from sacrebleu.significance import PairedTest

    if base is None or base.name == row.name:
        return ""
    ours, theirs = ({run["seed"]: run["translations"] for run in each.runs} for each in (row, base))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return ""
    systems = [(name, [text for seed in seeds for text in of[seed]]) for name, of in (("base", theirs), ("x", ours))]
    repeated = [[text for _ in seeds for text in references]]
    test = PairedTest(systems, {"chrF": CHRF(references=repeated)}, repeated, test_type="bs", n_samples=_SAMPLES)
    _, found = test()
    (metric,) = (name for name in found if name != "System")  # sacrebleu's own name of it
    before, after = found[metric]
    return f"{after.score - before.score:+.1f}, p {after.p_value:.3f}"
