"""A wrong flag ends the command with one line, not with a traceback."""

import errno
import os
import re
import sys
from traceback import walk_tb
from types import FrameType
from typing import Optional

from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from torch.multiprocessing import ProcessRaisedException

from kd_ext.errors import ConfigError, in_short
from kd_ext.parsing import typed_flags


def apply() -> None:
    """Print an uncaught :class:`ConfigError` as a line; leave every other exception to who printed it before.

    Also one that was caught and raised as another: fairseq's trainer (0.12.2) turns whatever a model's
    ``load_state_dict`` raises into a plain ``Exception``. Also a ``???`` of a recipe that was given no value, a
    setting that its dataclass does not take, and what fairseq itself has against its flags: an error of one line that
    names one of them, or a package to install.

    hydra-core 1.0 catches every error and reports it itself, without this hook up to Python 3.9, and from 3.10 on
    with a TypeError of its own (``print_exception`` has no ``etype`` there). Its own switch turns that off.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    previous = sys.excepthook
    if getattr(previous, "_kd_ext", False):
        return

    def excepthook(kind, error, traceback):
        mendable = _message(error)
        if mendable is not None:
            print(f"kd_ext: error: {mendable}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    excepthook._kd_ext = True
    sys.excepthook = excepthook


_OF_A_FLAG = re.compile(r"(?<![\w-])--[a-z]|(?i:please|pip) install [a-z]")  # or of a package that a flag needs
# what a flag's value or a model's settings are refused by
_KINDS = (ValueError, AssertionError, NotImplementedError, RuntimeError, ImportError, FileNotFoundError)
_PLAIN = "Exception"  # by which sentences that are too long are refused
_AT_ITS_END = re.compile(  # of a traceback as text: the last frame, and what was raised there
    r'File "[^"]*[\\/](?:fairseq|fairseq_cli)[\\/][^"]*", line \d+, in \w+\n(?:    .*\n)*'
    rf"(?:{'|'.join([_PLAIN, *(kind.__name__ for kind in _KINDS)])}): (.*)\s*$"
)
# of a recipe's setting that a dataclass does not take: its name is in another line
_OF_A_SETTING = re.compile(
    r"^omegaconf\.errors\.(?:ValidationError|ConfigKeyError(?=: .* not in ')): (.*)\n\s+full_key: (.*)$", re.MULTILINE
)
_REMEDIES = {  # by what fairseq says
    r"requires a join(ed|t) dictionary": "source and target have other words: preprocess the data, and the teacher's, "
    "by fairseq-preprocess --joined-dictionary, or leave the flag out",
    r"pip install sacremoses": "or give no 'moses' to --eval-bleu-detok or --tokenizer",
    r"Set --combine-val to": "that flag is --combine-valid-subsets",
}
_WITHOUT_A_FLAG = {  # what fairseq says of a flag that it does not name
    r"Dataset not found: ([^/]*) \((.*)\)": "{1}: it has no set '{0}' of these languages; name one that "
    "fairseq-preprocess wrote by --train-subset, --valid-subset or --gen-subset, and no --dataset-impl but its own",
    r"Sentences lengths should not exceed max_tokens=(.*)": "--max-tokens {0} (or --max-tokens-valid): a sentence has "
    "more, and a batch holds one at least; give a larger one",
    r"Could not infer language pair": "no pair of languages is in the names of the data's files; name the folder that "
    "fairseq-preprocess wrote, or give --source-lang and --target-lang",
    r"world size is (\d+) but have (\d+) available devices": "--distributed-world-size {0}: fairseq starts a process "
    "on each of this machine's GPUs, of which there are {1}; start several on a CPU, or on several machines, by "
    "python -m torch.distributed.run",
    r"Source and target must contain the same number": "a set has other numbers of sentences on its two sides, as the "
    "lines before say (loaded ... examples from); preprocess both again, of as many lines each",
    r"The dataset is empty\.": "no sentence of a set is left: each is longer than --max-source-positions, "
    "--max-target-positions or --max-tokens, or there are none; raise them",
}
_NAMES_A_FILE = re.compile(r"--.*(path|file|dir|input|from-model|output|dict|tags|vocab)")
_DO_NOT_FIT = "Cannot load model parameters from checkpoint"  # how the trainer's Exception begins


def _message(error: Optional[BaseException]) -> Optional[str]:
    """The line for what `error` is, or was raised from; None if that is nothing that a flag can mend."""
    outermost = error
    if not isinstance(error, Exception):  # stopped by the user, whatever was being handled
        return None
    if isinstance(error, OmegaConfBaseException):
        refused = _about_a_setting(f"{type(error).__module__}.{type(error).__name__}: {error}")
        if refused is not None:
            return refused
    while error is not None:
        if isinstance(error, ConfigError):
            return str(error)
        if isinstance(error, ProcessRaisedException):  # of a worker that fairseq started: its traceback is the text
            lines = re.findall(rf"^{ConfigError.__module__}\.{ConfigError.__name__}: (.*)", str(error), re.MULTILINE)
            if lines:
                return lines[-1]  # it was raised from those before
            at_its_end = _AT_ITS_END.search(str(error))
            return _about_a_flag(at_its_end[1]) if at_its_end else _about_a_setting(str(error))
        if isinstance(error, MissingMandatoryValue):
            return f"{str(error).splitlines()[0]}; the recipe leaves it open (???): name it on the command line"
        error = error.__cause__ or error.__context__
    if outermost is not None and str(outermost).startswith(_DO_NOT_FIT):
        reason = outermost.__cause__ or outermost.__context__
        said = in_short(reason)
        remedy = "give the flags of the model that it was trained with, or another checkpoint"
        return f"{outermost} ({type(reason).__name__}: {said}); {remedy}"
    return _of_a_file(outermost) or _of_fairseq(outermost)


def _of_a_file(error: Optional[BaseException]) -> Optional[str]:
    """What the system has against a file that the command line names, or one in a folder of it, or what is in it."""
    flags = [(flag, value) for flag, value in typed_flags() if _NAMES_A_FILE.match(flag)]
    if isinstance(error, OSError) and isinstance(error.filename, str):
        exact = [(flag, value) for flag, value in flags if value == error.filename]
        for flag, value in [*exact, *flags]:
            if value and _is_in(error.filename, value):
                return f"{flag} {value}{_inner(error.filename, value)}: {error.strerror}"
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and _is_fairseqs(error):
            return _of_data(error.filename, error.strerror)
    if isinstance(error, UnicodeDecodeError) and ("--input" in dict(flags) or _comes_of_input(error)):
        path = dict(flags).get("--input", "-")
        return f"--input {path}: not in UTF-8 (byte {error.start}: {error.reason}); convert it, as by iconv"
    return None


def _comes_of_input(error: BaseException) -> bool:
    """Whether fairseq-interactive was reading sentences."""
    return any(frame.f_code.co_name == "buffered_read" for frame, _ in walk_tb(error.__traceback__))


def _of_data(filename: str, said: str) -> Optional[str]:
    """Of a file in a folder of data, which is the word that no flag is before."""
    words = sys.argv[1:]
    for word, before in zip(words, ["", *words]):
        if word.startswith("-") or (before.startswith("-") and "=" not in before):
            continue
        for part in word.split(":"):
            if part and _is_in(filename, part):
                languages = ", and its languages" if re.fullmatch(r"dict\..*\.txt", os.path.basename(filename)) else ""
                remedy = f"name the folder that fairseq-preprocess wrote{languages}"
                return f"{part}{_inner(filename, part)}: {said}; {remedy}"
    return None


def _inner(path: str, place: str) -> str:
    return f": {path}" if path != place else ""


def _is_in(path: str, place: str) -> bool:
    """Whether a file is what a flag names, or lies there."""
    path, place = os.path.abspath(path), os.path.abspath(place)
    return path == place or path.startswith(place + os.sep)


def _of_fairseq(error: Optional[BaseException]) -> Optional[str]:
    """What fairseq says of a flag of its own."""
    if error is None or not (isinstance(error, _KINDS) or type(error).__name__ == _PLAIN):
        return None
    return _about_a_flag(str(error)) if _is_fairseqs(error) else None


def _is_fairseqs(error: BaseException) -> bool:
    """Whether it was raised there."""
    frames = error.__traceback__
    if frames is None:
        return False
    while frames.tb_next is not None:
        frames = frames.tb_next
    return _package(frames.tb_frame) in ("fairseq", "fairseq_cli", "iopath")


def _package(frame: FrameType) -> str:
    name = frame.f_globals.get("__name__", "")
    is_command = name == "__main__" and os.path.basename(os.path.dirname(frame.f_code.co_filename)) == "fairseq_cli"
    return "fairseq_cli" if is_command else name.split(".")[0]  # the former by python -m, or as a file


def _about_a_flag(said: str) -> Optional[str]:
    for pattern, line in _WITHOUT_A_FLAG.items():
        found = re.match(pattern, said)
        if found:
            return line.format(*found.groups())
    if "\n" in said.strip() or not _OF_A_FLAG.search(said):
        return None
    remedies = [remedy for what, remedy in _REMEDIES.items() if re.search(what, said)]
    return "; ".join([" ".join(said.split()).rstrip("."), *remedies])


def _about_a_setting(traceback: str) -> Optional[str]:
    """What omegaconf says at the end of a traceback."""
    found = _OF_A_SETTING.findall(traceback)
    return "{1}: {0}; mend it in the recipe or on the command line".format(*found[-1]) if found else None
