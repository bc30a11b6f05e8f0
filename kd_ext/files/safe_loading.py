"""``torch.load`` that runs no code: a file may refer to what torch itself and a list of this package name, no more.

From torch 2.6 on that is torch's own way, which has to be given the list. Older ones load whatever a file asks
for, or, told not to, refuse even the settings in fairseq's checkpoints; there an unpickler of this module stands in.
"""

import _compat_pickle
import pickle
from typing import Any, ClassVar, Dict

import torch
from torch import serialization

HAS_SAFE_GLOBALS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)

_allowed: Dict[str, Any] = {}


def allow(named: Dict[str, Any]) -> None:
    """Let files refer to these objects by these names; may be repeated.

    Args:
        named: ``module.name``, as a pickle has it, to the object that is meant
    """
    if HAS_SAFE_GLOBALS:
        serialization.add_safe_globals([(value, name) for name, value in named.items()])
    else:
        from torch import _weights_only_unpickler  # torch's own list; the module is there from 1.13 on

        _allowed.update(_weights_only_unpickler._get_allowed_globals())
        _allowed.update(named)


def load(file: Any, map_location: Any = "cpu") -> Any:
    """What ``torch.save`` wrote to `file`, a path or an open file.

    Raises:
        pickle.UnpicklingError: the file refers to something that is not allowed; nothing of it has run
        Exception: whatever else torch raises for bytes that it cannot make sense of
    """
    if HAS_SAFE_GLOBALS:
        return torch.load(file, map_location=map_location, weights_only=True)
    # not torch.load with a pickle_module: 1.13 ignores that argument, and all hand TorchScript on to another reader
    with serialization._open_file_like(file, "rb") as opened:
        if not serialization._is_zipfile(opened):
            return serialization._legacy_load(opened, map_location, _Pickle, encoding="utf-8")
        with serialization._open_zipfile_reader(opened) as archive:
            return serialization._load(archive, map_location, _Pickle, encoding="utf-8")


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Python's own, in which an instruction can be given another meaning."""

    def find_class(self, module: str, name: str) -> Any:
        # torch writes names as Python 2 had them, such as __builtin__.dict
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        try:
            return _allowed[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed") from None

    def _build(self) -> None:
        """Give an object its state: not a class or a function, which would be another for the whole process."""
        if callable(self.stack[-2]):
            raise pickle.UnpicklingError(f"{self.stack[-2]!r} would be changed")
        pickle._Unpickler.load_build(self)  # type: ignore[attr-defined]

    dispatch: ClassVar[Dict[int, Any]] = {
        **pickle._Unpickler.dispatch,  # type: ignore[attr-defined]
        pickle.BUILD[0]: _build,
    }


class _Pickle:
    """As much of the module ``pickle`` as torch uses in loading."""

    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _Unpickler(file, **options).load()
