"""What must be in place before ``import fairseq``. Imports neither fairseq nor the rest of this package."""

import dataclasses
import sys


def apply() -> None:
    """Apply every remedy that this Python needs; safe to call twice."""
    if sys.version_info >= (3, 11):
        _allow_config_defaults()


def _allow_config_defaults() -> None:
    """Python >= 3.11 refuses a dataclass instance as a field's default unless it is hashable.

    The configuration classes of fairseq 0.12.2 and hydra-core 1.0 have such defaults. Their classes are given
    back the identity hash that every object starts with, when one of them is met as a default; the classes of
    other packages are left as they are.
    """
    make_field = dataclasses._get_field  # type: ignore[attr-defined]
    if getattr(make_field, "_kd_ext", False):
        return

    def make_field_of_config(cls, name, annotation, *rest):
        default = getattr(cls, name, None)
        if isinstance(default, dataclasses.Field):
            default = default.default
        kind = type(default)
        if kind.__hash__ is None and kind.__module__.split(".")[0] in ("fairseq", "hydra"):
            kind.__hash__ = object.__hash__
        return make_field(cls, name, annotation, *rest)

    make_field_of_config._kd_ext = True
    dataclasses._get_field = make_field_of_config  # type: ignore[attr-defined]
