"""``--help`` with this project's flags, and a flag that is not understood in one line."""

import argparse
import difflib
import functools
import re
import sys
from typing import Dict, Iterable, List, NamedTuple, NoReturn, Optional, Tuple

from fairseq import options
from fairseq.dataclass.utils import gen_parser_from_dataclass

from kd_ext.parsing import typed_flags

GROUP = "fairseq-kd-ext"
_LISTED = "_kd_ext_listed"
# dataclasses of flags, and what has to be given so that they are some: in the order in which they are handed down
_LISTED_CONFIGS: List[Tuple[type, str]] = []
_NOT_HERE = "nothing here does the same"
_OF_THE_FORK = {  # flags of VarunGumma/fairseq, and what is in their place
    "--kd-args": "here --kd-strategy, --kd-rate, --kd-queue-size and --kd-temperature",
    "--kd-criterion": "what is computed here is kl_div; leave it out",
    "--kd-temp": "here --kd-temperature",
    "--language-tags": "here --kd-language-tags",
    **dict.fromkeys(("--factorized-embed-activation-fn", "--attn-implementation", "--adam-stable"), _NOT_HERE),
    **dict.fromkeys(("--lora-args", "--rope-args", "--alibi-args"), _NOT_HERE),
    **{f"--{side}-{name}": _NOT_HERE for side in ("encoder", "decoder") for name in ("use-glu", "use-rmsnorm")},
    **{f"--{side}-kv-attention-heads": _NOT_HERE for side in ("encoder", "decoder")},
}


class _Owned(NamedTuple):
    """A flag, and what has to be given so that it is one."""

    action: argparse.Action
    owner: str


def apply() -> None:
    """Change what a parser of fairseq's commands prints (fairseq 0.12.2).

    fairseq adds the flags of task, criterion and model after ``--help`` has been answered, and has argparse put the
    usage of all flags, 186 lines, before any error.
    """
    original = options.parse_args_and_arch
    if getattr(original, "_kd_ext_help", False):
        return

    @functools.wraps(original)
    def parse_args_and_arch(parser, *args, **kwargs):
        parser.print_help = functools.partial(_print_help, parser)
        parser.error = functools.partial(_error, parser)
        parser.parse_args = functools.partial(_parse_args, parser)
        try:
            return original(parser, *args, **kwargs)
        except RuntimeError as error:
            if error.args:
                raise
            # the one that says nothing, before any other flag is looked at
            _end("--arch is missing: name the architecture to train, such as transformer; --help lists all")

    parse_args_and_arch._kd_ext_help = True
    options.parse_args_and_arch = parse_args_and_arch


def list_flags(config: type, owner: str) -> None:
    """Let ``--help`` list the flags of a dataclass.

    Args:
        owner: what has to be given so that they are flags, such as ``--task NAME``
    """
    _LISTED_CONFIGS.append((config, owner))


def list_alone(parser: argparse.ArgumentParser, flags: Iterable[str]) -> None:
    """Of this project's flags let ``--help`` list these alone, whether the parser has them yet or not."""
    setattr(parser, _LISTED, list(flags))


def _own_flags(parser: argparse.ArgumentParser) -> Dict[str, _Owned]:
    """This project's flags of task, criterion and model, by name, for a command that trains."""
    if "--max-update" not in parser._option_string_actions:
        return {}
    from kd_ext.models.extension_flags import ExtensionFlags  # models register themselves after every touch is in place

    found: Dict[str, _Owned] = {}
    of_models = (ExtensionFlags, "--arch transformer_ext, or one of the architectures made of it", {"with_prefix": ""})
    for config, owner, flat in (*((config, owner, {}) for config, owner in _LISTED_CONFIGS), of_models):
        scratch = argparse.ArgumentParser(add_help=False)
        gen_parser_from_dataclass(scratch, config(), **flat)
        inherited = {name for base in config.__mro__[1:] for name in getattr(base, "__annotations__", {})}
        for action in scratch._actions:
            if action.option_strings and action.dest not in inherited:
                found[action.option_strings[-1]] = _Owned(action, owner)
    return found


def _print_help(parser: argparse.ArgumentParser, file=None) -> None:
    """As argparse's, this project's flags first, and a short usage."""
    from kd_ext.models.extension_flags import SIDES, activation_key
    from kd_ext.upstream import sanity_validation, torch_compile

    names = (sanity_validation.OPTION, torch_compile.OPTION, *map(activation_key, SIDES))
    moved = ["--" + name.replace("_", "-") for name in names]
    own = _own_flags(parser)
    listed = getattr(parser, _LISTED, None) or [*own, *moved]
    group = argparse._ArgumentGroup(parser, GROUP)
    for name in listed:
        action = parser._option_string_actions.get(name)
        if action is None and name in own:
            action = own[name].action
        if action is None:
            continue
        for others in parser._action_groups:
            if action in others._group_actions:
                others._group_actions.remove(action)
        group._group_actions.append(action)
    parser._action_groups.insert(0, group)
    parser.usage = "%(prog)s DATA [flags]"
    argparse.ArgumentParser.print_help(parser, file)


def _parse_args(parser: argparse.ArgumentParser, args=None, namespace=None) -> argparse.Namespace:
    parsed, unknown = parser.parse_known_args(args, namespace)
    if unknown:
        flag = next((word.split("=")[0] for word in unknown if word.startswith("-")), None)
        _end(_of_unknown(parser, flag) if flag else f"{' '.join(unknown)}: no flag, and of no flag that takes it")
    return parsed


def _of_unknown(parser: argparse.ArgumentParser, flag: str) -> str:
    own = _own_flags(parser)
    if flag in own:
        return f"{flag}: not without {own[flag].owner}"
    if flag in _OF_THE_FORK:
        return f"{flag}: of VarunGumma/fairseq; {_OF_THE_FORK[flag]} (docs/coming-from-the-fork.md)"
    known = [*parser._option_string_actions, *own]
    return f"{flag}: no such flag{near(flag, known) or '; --help lists all'}"


def _error(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Of a value: with the near ones in place of all that there are; or how one that begins with a dash is given."""
    match = re.match(r"argument ([^/:\s]+)\S*: invalid choice: ('[^']*'|\S+)", message)
    action: Optional[argparse.Action] = parser._option_string_actions.get(match[1]) if match else None
    if match and action is not None and action.choices is not None and len(list(action.choices)) > 10:
        value = match[2].strip("'\"")
        message = f"{match[1]} {value}: unknown{near(value, list(action.choices)) or '; nothing is near to it'}"
    alone = re.match(r"argument (\S+): expected one argument$", message)
    for flag, value in typed_flags() if alone else ():
        if flag == alone[1] and re.match("-[^-].", value):  # and no short flag
            message += f"; write {flag}={value}"
    _end(message)


def near(word: str, words: List[str]) -> str:
    """The end of a message on a `word`: those of the known `words` that are near to it; empty where none is."""
    found = difflib.get_close_matches(word, sorted(set(words)), n=3)
    return f"; near to it: {', '.join(found)}" if found else ""


def _end(message: str) -> NoReturn:
    """As argparse does, with its status, but for the usage."""
    print(f"kd_ext: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
