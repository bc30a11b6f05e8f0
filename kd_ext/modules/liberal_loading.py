"""What of a checkpoint fits a model, and a readable list of what does not."""

from typing import Dict, Iterable, List, NamedTuple

from torch import Tensor


class Match(NamedTuple):
    """How the tensors of a checkpoint fit those of a model.

    Attributes:
        fitting: the checkpoint's tensors whose name and shape the model has
        missing: names that the model alone has
        unexpected: names that the checkpoint alone has
        misshapen: names that both have, with their two shapes
    """

    fitting: Dict[str, Tensor]
    missing: List[str]
    unexpected: List[str]
    misshapen: List[str]


def match(model: Dict[str, Tensor], checkpoint: Dict[str, Tensor]) -> Match:
    """Compare two state dictionaries by name and shape."""
    both = [name for name in checkpoint if name in model]
    fitting = [name for name in both if model[name].shape == checkpoint[name].shape]
    return Match(
        fitting={name: checkpoint[name] for name in fitting},
        missing=summary((name for name in model if name not in checkpoint), model),
        unexpected=summary((name for name in checkpoint if name not in model), checkpoint),
        misshapen=[
            f"{name} (model {tuple(model[name].shape)}, checkpoint {tuple(checkpoint[name].shape)})"
            for name in both
            if name not in set(fitting)
        ],
    )


def summary(names: Iterable[str], among: Iterable[str]) -> List[str]:
    """`names`, shortened: ``prefix.* (count)`` where all of `among` that begin with the prefix are there."""
    chosen, rest = list(names), set(among)
    rest.difference_update(chosen)
    kept = {prefix for name in rest for prefix in _prefixes(name)}
    counts: Dict[str, int] = {}
    for name in chosen:
        whole = next((prefix for prefix in _prefixes(name) if prefix not in kept), name)
        counts[whole] = counts.get(whole, 0) + 1
    chosen_names = set(chosen)
    return [name if name in chosen_names else f"{name}.* ({count})" for name, count in counts.items()]


def _prefixes(name: str) -> List[str]:
    """``a.b.c``: ``a``, ``a.b``, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
