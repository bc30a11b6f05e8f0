"""Size against quality, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict


def draw(results: Dict[str, Dict[str, Any]], path: Path, language: str) -> None:
    """Draw the parameters of each model against its chrF.

    Args:
        results: of each model, by its name
        path: of the PNG file to write
        language: the second panel's; the first shows all languages together
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, key, title in zip(panels, ("all", language), ("all languages", f"{language} to en")):
        for name, result in results.items():
            if key not in result["scores"]:
                continue
            point = result["parameters"] / 1e6, result["scores"][key]["chrf"]
            panel.plot(*point, "o")
            panel.annotate(name, point, xytext=(6, 4), textcoords="offset points")
        panel.set(title=title, xlabel="parameters (millions)", ylabel="chrF", xscale="log")
        panel.margins(x=0.3, y=0.15)  # room for the names
        panel.grid(alpha=0.3)
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=100)
    temporary.replace(path)
    pyplot.close(figure)
