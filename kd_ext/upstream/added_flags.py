"""How a flag of this project gets to where fairseq takes it."""

import copy
from argparse import Namespace
from typing import Any, Dict, Iterable, Set

from fairseq.dataclass.configs import OptimizationConfig

from kd_ext.overrides import parse_overrides

ADDED: Set[str] = set()  # the names of the switches


def add_switch(group: type, name: str, text: str) -> None:
    """Add a switch, off by default, to a group of fairseq's options (0.12.2).

    Options that are in no dataclass are lost when they become a configuration. The field is added to the dataclass
    itself: a subclass would not do where an instance of it is the default.

    Args:
        group: one of the dataclasses in ``fairseq.dataclass.configs``
        name: of the flag, with underscores
        text: its help
    """
    switch = copy.copy(OptimizationConfig.__dataclass_fields__["sentence_avg"])  # also a bool, off
    switch.name = name
    switch.metadata = {"help": text}
    group.__dataclass_fields__[name] = switch  # type: ignore[attr-defined]
    group.__annotations__[name] = bool
    setattr(group, name, switch.default)
    ADDED.add(name)


def fold_into_overrides(args: Namespace, settings: Dict[str, Any]) -> None:
    """Add `settings` to ``--model-overrides``, by which the commands that use a model hand them on with its path."""
    overrides = parse_overrides("--model-overrides", getattr(args, "model_overrides", "{}"))
    args.model_overrides = str({**overrides, **settings})


def unfold(args: Namespace, names: Iterable[str]) -> None:
    """Take settings out of ``--model-overrides`` again, for a command that reads the flags themselves."""
    overrides = parse_overrides("--model-overrides", args.model_overrides)
    args.model_overrides = str({key: value for key, value in overrides.items() if key not in names})
