"""fairseq's ``eval`` understands literals and arithmetic, and runs nothing."""

import functools
import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

from fairseq import utils

from kd_ext.errors import ConfigError
from kd_ext.files.literals import NotALiteral, evaluate
from kd_ext.files.reading import require_regular
from kd_ext.files.settings import origin, shown
from kd_ext.parsing import typed_flags

_PACKAGES = ("fairseq", "fairseq_cli")


def apply() -> None:
    """Give every module of fairseq an ``eval`` of this project's (fairseq 0.12.2, every Python).

    fairseq evaluates strings as Python: of settings, which come from a checkpoint (``encoder_xformers_att_config``,
    ``adaptive_softmax_cutoff``, fconv's ``encoder_layers``, ...), of flags and of lines of data. In each it wants
    literals, with arithmetic on them: ``[(512, 3)] * 20``. A module finds a name in its own globals before Python's,
    so that nothing else of the process gets another ``eval``; modules that are imported later get it before they run.
    """
    for name, module in list(sys.modules.items()):
        if _is_fairseqs(name) and module is not None:
            module.__dict__["eval"] = _evaluate
    if _GivesEvaluate not in sys.meta_path:
        sys.meta_path.insert(0, _GivesEvaluate)
    if not getattr(utils.parse_embedding, "_kd_ext", False):
        utils.parse_embedding = _reading_files(utils.parse_embedding)


def _reading_files(original: Any) -> Any:
    """``--encoder-embed-path`` is also a setting that is obeyed: of a pipe, or of a number, nothing may ever come."""

    @functools.wraps(original)
    def parse_embedding(embed_path: Any) -> Any:
        if not isinstance(embed_path, str):
            raise ConfigError(f"{_where(embed_path)} {shown(str(embed_path))}: no path of a file of embeddings")
        try:
            require_regular(embed_path)
            return original(embed_path)
        except ConfigError as error:
            raise ConfigError(f"{_where(embed_path)} {error}") from error
        except (OSError, ValueError) as error:  # the latter of what is in the file, or of a null byte in its name
            said = getattr(error, "strerror", None) or f"no file of embeddings ({error})"
            raise ConfigError(f"{_where(embed_path)} {shown(embed_path)}: {said}") from error

    parse_embedding._kd_ext = True  # type: ignore[attr-defined]
    return parse_embedding


def _is_fairseqs(name: str) -> bool:
    return name.split(".")[0] in _PACKAGES


class _GivesEvaluate:
    """A meta path finder of fairseq's modules."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if not _is_fairseqs(name):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        @functools.wraps(run)
        def exec_module(module: ModuleType) -> None:
            module.__dict__["eval"] = _evaluate
            run(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _evaluate(source: Any, *_: Any) -> Any:
    """In place of ``eval``.

    Raises:
        TypeError: `source` is no text, as of ``eval``
        ConfigError: it is not an expression of literals; the message names file and setting, or flag
    """
    if isinstance(source, bytes):
        source = source.decode(errors="replace")
    if not isinstance(source, str):
        raise TypeError("eval() arg 1 must be a string, bytes or code object")
    try:
        return evaluate(source)
    except NotALiteral as error:
        raise ConfigError(
            f"{_where(source)} {shown(source)}: refused, only literals and arithmetic on them are understood here, "
            f"such as [(512, 3)] * 20; {error}"
        ) from None


def _where(text: Any) -> str:
    """Where a text is from: a flag goes first, as it overrides what a file has."""
    given = next((flag for flag, value in typed_flags() if value == text), None)
    if given is not None:
        return given
    setting = origin(text) if isinstance(text, str) else None
    return f"{setting.path}: its setting {setting.name}" if setting else "the value"
