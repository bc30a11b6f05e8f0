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
            # every model is in the legend, with the same colour in both panels
            scores = result["scores"].get(key, {"chrf": float("nan")})
            panel.plot(result["parameters"] / 1e6, scores["chrf"], "o", label=name)
        panel.set(title=title, xlabel="parameters (millions)", ylabel="chrF")
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
    panels[0].legend(loc="lower right")
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, format="png", dpi=100)
    temporary.replace(path)
    pyplot.close(figure)
