"""The studies' plots."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any, Dict, List, Tuple

# of a parameter in float32
MEGABYTES = 4e-6
# how names end, and what is drawn of those
_KINDS = {", alone": "tab:gray", ", distilled": "tab:blue", "": "tab:orange"}


def scores(rows: List[Any], path: Path) -> None:
    """chrF of each variant, a point a seed."""
    pyplot = _pyplot()
    widest = max(len(row.name) for row in rows)  # of which a character takes about a fourteenth of an inch
    figure, axes = pyplot.subplots(figsize=(4 + widest / 14, 0.8 + 0.3 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        points = row.values("chrf")
        axes.plot(points, [place] * len(points), "o", color="tab:blue", alpha=0.6)
        axes.plot([mean(points)], [place], "|", color="black", markersize=14)
    axes.set(xlabel="chrF of the test set: a point a seed, a line their mean")
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def sizes(rows: List[Any], speeds: Dict[str, float], path: Path) -> None:
    """Parameters against chrF, the faster the larger the mark; a line through what nothing smaller beats."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    points = [(row.runs[0]["parameters"], mean(row.values("chrf")), row.name) for row in rows]
    fastest = max(speeds.values(), default=1)
    for parameters, score, name in points:
        ending = _ending(name)
        area = 300 * speeds.get(name, fastest / 3) / fastest
        axes.scatter([parameters], [score], s=area, color=_KINDS[ending], alpha=0.6, linewidths=0)
        text = name[: len(name) - len(ending)]
        axes.annotate(text, (parameters, score), xytext=(6, 4), textcoords="offset points", fontsize=7)
    front = pareto(points)
    axes.plot([x for x, _, _ in front], [y for _, y, _ in front], color="tab:red", linewidth=1, zorder=0)
    found = {_ending(name) for _, _, name in points}
    for ending in (ending for ending in _KINDS if ending in found):
        axes.scatter([], [], color=_KINDS[ending], alpha=0.6, label=ending[2:] or "others")
    axes.plot([], [], color="tab:red", linewidth=1, label="nothing smaller is better")
    axes.set(xscale="log", xlabel="parameters", ylabel="chrF; area of a mark: sentences a second, on one core")
    above = axes.secondary_xaxis("top", functions=(lambda x: x * MEGABYTES, lambda x: x / MEGABYTES))
    above.set_xlabel("megabytes of float32")
    for axis, text in ((axes.xaxis, lambda x, _: f"{x / 1e6:g}M"), (above.xaxis, lambda x, _: f"{x:g}")):
        axis.set_major_formatter(text)
        axis.set_minor_formatter(text)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _ending(name: str) -> str:
    return next(ending for ending in _KINDS if name.endswith(ending))


def pareto(points: List[Tuple[int, float, str]]) -> List[Tuple[int, float, str]]:
    """Those that no other of the same size or less is better than, by size."""
    front: List[Tuple[int, float, str]] = []
    for point in sorted(points, key=lambda each: (each[0], -each[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
