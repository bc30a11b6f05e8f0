"""What must be in place before ``import fairseq``. Imports neither fairseq nor the rest of this package."""

import dataclasses
import os
import re
import sys
import typing
from importlib.machinery import FileFinder, PathFinder
from types import ModuleType
from typing import List, NoReturn


def apply() -> None:
    """Apply every remedy that this Python needs; safe to call twice."""
    _refuse_two_user_dirs()
    _refuse_a_recipe_that_is_not_there()
    if sys.version_info >= (3, 10):
        _show_errors_of_hydra()
    if sys.version_info >= (3, 11):
        _allow_config_defaults()
    if sys.version_info >= (3, 12):
        _restore_find_module()
    if sys.version_info >= (3, 13):
        _restore_typing_io()
    if sys.version_info >= (3, 14):
        _read_optional_types()


def _refuse_two_user_dirs() -> None:
    """Of several folders fairseq (0.12.2) takes the last, without a word; two in one value are no such file to it."""
    if "fairseq_cli" not in sys.modules:
        return
    given = _given("--user-dir")
    parts = [part for value in given for part in re.split("[:,]", value)]
    joined = len(parts) > len(given) and not all(map(os.path.exists, given)) and any(map(os.path.exists, parts))
    if len({os.path.realpath(value) for value in given}) > 1 or joined:
        shown = " ".join(f"--user-dir {value}" for value in given)
        _end(
            f"{shown}: fairseq imports one folder; name one whose __init__.py imports both, as `import kd_ext` does "
            "for this plugin once it is installed"
        )


def _refuse_a_recipe_that_is_not_there() -> None:
    """fairseq-hydra-train (0.12.2) trains by its defaults instead, or ends at the first setting that they lack."""
    folders, names = _given("--config-dir", "-cd"), _given("--config-name", "-cn")
    if "fairseq_cli" not in sys.modules or not folders or not names:
        return
    folder, name = folders[-1], re.sub(r"\.yaml$", "", names[-1])
    if name == "config" or os.path.isfile(os.path.join(folder, f"{name}.yaml")):  # the former is fairseq's own
        return
    found = sorted(file[: -len(".yaml")] for file in _names_in(folder) if file.endswith(".yaml"))
    shown = f"there are {', '.join(found)}" if found else "it has no recipe (.yaml)"
    _end(f"--config-name {name}: no recipe in --config-dir {folder}; {shown}")


def _names_in(folder: str) -> List[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        _end(f"--config-dir {folder}: {error.strerror}; name a folder of recipes (.yaml)")


def _given(*flags: str) -> List[str]:
    """The values that the command line gives flags of one meaning."""
    words, found = sys.argv[1:], []
    for word, following in zip(words, [*words[1:], ""]):
        flag, equals, value = word.partition("=")
        if flag in flags:
            found.append(value if equals else following)
    return found


def _end(message: str) -> NoReturn:
    print(f"kd_ext: error: {message}", file=sys.stderr)
    sys.exit(2)


_OF_THE_COMMAND_LINE = ("OverrideParseException", "ConfigCompositionException")


def _show_errors_of_hydra() -> None:
    """Python >= 3.10 has no ``print_exception(etype=...)``, by which hydra-core 1.0 reports errors: it shows its own.

    Its switch that leaves errors as they are is set for fairseq's commands alone. What Hydra has against the command
    line it would have shown without their traceback: so it is shown here.
    """
    if "fairseq_cli" not in sys.modules or os.environ.get("HYDRA_FULL_ERROR"):
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"
    previous = sys.excepthook

    def excepthook(kind, error, traceback):
        if kind.__module__ != "hydra.errors" or kind.__name__ not in _OF_THE_COMMAND_LINE:
            previous(kind, error, traceback)
            return
        override = getattr(error, "override", None)  # of which Hydra's message may say a part
        key, equals, _ = (override or "").partition("=")
        remedy = f"; quote a value that has = , or brackets: \"{key}='...'\"" if equals else ""
        said = " ".join(str(error).split())
        print(f"kd_ext: error: {override + ': ' if override else ''}{said}{remedy}", file=sys.stderr)

    sys.excepthook = excepthook


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
        if kind.__hash__ is None and _is_of_fairseq_or_hydra(kind):
            kind.__hash__ = object.__hash__
        return make_field(cls, name, annotation, *rest)

    make_field_of_config._kd_ext = True
    dataclasses._get_field = make_field_of_config  # type: ignore[attr-defined]


def _is_of_fairseq_or_hydra(kind: type) -> bool:
    package = kind.__module__.split(".")[0]
    if package != "hydra":
        return package == "fairseq"
    # a user's own package may have that name
    folders = getattr(sys.modules.get("hydra"), "__path__", ())
    return any(os.path.isfile(os.path.join(folder, "_internal", "hydra.py")) for folder in folders)


def _restore_find_module() -> None:
    """Python >= 3.12 has no ``FileFinder.find_module``, by which hydra-core 1.0 looks for its plugins."""
    if not hasattr(FileFinder, "find_module"):
        FileFinder.find_module = _find_module


def _find_module(finder, name, path=None):
    spec = finder.find_spec(name)
    return spec.loader if spec is not None else None


def _restore_typing_io() -> None:
    """Python >= 3.13 has no ``typing.io``, from which antlr4 4.8, Hydra's parser, takes ``TextIO``."""
    if "typing.io" in sys.modules:
        return
    module = ModuleType("typing.io")
    for name in ("IO", "BinaryIO", "TextIO"):
        setattr(module, name, getattr(typing, name))
    sys.modules["typing.io"] = module


def _read_optional_types() -> None:
    """Python >= 3.14 shows ``Optional[int]`` as ``int | None``, by which fairseq does not know it.

    fairseq 0.12.2 goes by how the types of its options are shown, and does so in its own import: the function is
    replaced as soon as its module is there.
    """
    if "fairseq.dataclass.utils" not in sys.modules and _ChangesUtils not in sys.meta_path:
        sys.meta_path.insert(0, _ChangesUtils)


class _ChangesUtils:
    """A meta path finder of that one module."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "fairseq.dataclass.utils":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None:
            return None
        load = spec.loader.exec_module

        def load_and_change(module):
            load(module)
            sys.meta_path.remove(cls)
            module.interpret_dc_type = _knowing_optional_types(module.interpret_dc_type)

        spec.loader.exec_module = load_and_change
        return spec


def _knowing_optional_types(original):
    def interpret_dc_type(field_type):
        is_optional = typing.get_origin(field_type) is typing.Union and type(None) in field_type.__args__
        return original(field_type.__args__[0] if is_optional else field_type)

    interpret_dc_type._kd_ext = True
    return interpret_dc_type
