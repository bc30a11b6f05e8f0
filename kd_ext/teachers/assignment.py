"""Which teacher a language has: what ``--teacher-checkpoint-path hi=a.pt,ta=b.pt,...=base.pt`` says."""

import hashlib
import os
import re
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from fairseq import utils

from kd_ext.errors import ConfigError
from kd_ext.files.reading import require_regular
from kd_ext.teachers.kinds import FLAG

REST = "..."
_LONGEST = 1 << 20  # bytes of a file that says so
_FORM = "hi=a.pt,ta=b.pt,...=base.pt"
_COMMENT = re.compile(r"#(\s|[^=]*$)")  # and not ``#hi=a.pt``, as a language's name can begin so


def is_by_language(path: Optional[str]) -> bool:
    """Whether `path` names teachers by language, or a file that does: not where it is itself a checkpoint."""
    return bool(path) and _entries(path) is not None


def require_any(path: str) -> None:
    """See that of teachers by language a file is there: before tags are looked for, as a name may just have a '='.

    Raises:
        ConfigError: none is
    """
    if os.path.exists(path) or any(map(os.path.exists, named_paths(path))):
        return
    raise ConfigError(
        f"{FLAG} {path}: no such file, and taken for teachers by language ({_FORM}) it names none that is there; "
        "name the checkpoint that fairseq-train wrote"
    )


def named_paths(path: Optional[str]) -> List[str]:
    """The files that ``--teacher-checkpoint-path`` names; of teachers by language all that can be read out of it.

    A language may have a '=' as well, and which ones there are is not known yet.
    """
    entries = _entries(path) if path else None
    if entries is None:
        return utils.split_paths(path or "")
    named = [entry[place.end() :].strip() for entry in entries for place in re.finditer("=", entry)]
    return [part for paths in named for part in utils.split_paths(paths)]


class Assignment(NamedTuple):
    """A teacher for each of some languages.

    Attributes:
        paths: of the teachers, as of one teacher each; no two are the same
        of_pools: of each pool its teacher, as an index into `paths`; None: it has none
        named: the languages that are named, and their teachers
        rest: the teacher of all others
    """

    paths: List[str]
    of_pools: List[Optional[int]]
    named: List[Tuple[str, int]]
    rest: Optional[int]

    def identity(self, languages: str, teachers: Sequence[str]) -> str:
        """What tells these teachers, so assigned, from others.

        Args:
            languages: what tells how a sentence's language is found from other ways
            teachers: what tells each teacher from others
        """
        rest = "" if self.rest is None else teachers[self.rest]
        assigned = sorted((name, teachers[number]) for name, number in self.named)
        digest = hashlib.sha256(repr((languages, assigned, rest)).encode()).hexdigest()[:16]
        return f"{'; '.join(sorted(set(teachers)))}; by language {digest}"


def read_assignment(path: str, pools: Sequence[str], names: Dict[str, int], counts: Sequence[int]) -> Assignment:
    """Read what :func:`is_by_language` takes for one.

    Args:
        path: as it was given
        pools: the languages, and last the sentences without a tag
        names: of each name that a language can be called by, its pool
        counts: sentences of each pool

    Raises:
        ConfigError: a language that there is not, or twice, or that has no teacher
    """
    entries = _entries(path)
    assert entries is not None
    found: Dict[int, str] = {}
    rest = None
    for entry in entries:
        name, teacher = _split(entry, names)
        if not teacher:
            raise ConfigError(f"{FLAG} {path}: '{entry}' names no checkpoint; {_FORM}")
        if name == REST and rest is None:
            rest = teacher
        elif name == REST or names.get(name) in found:
            raise ConfigError(f"{FLAG} {path}: '{name}' is there twice; name each language once")
        elif name in names:
            found[names[name]] = teacher
        else:
            raise ConfigError(
                f"{FLAG} {path}: '{name}' is no language of the training set; it has {', '.join(pools[:-1])}, and "
                f"'{REST}' is all that are not named"
            )
    without = [pool for i, pool in enumerate(pools) if i not in found and counts[i] > 0]
    if without and rest is None:
        also = f" ('{pools[-1]}' are {counts[-1]:,} sentences without a tag)" if pools[-1] in without else ""
        raise ConfigError(
            f"{FLAG} {path}: none for {', '.join(without)}{also}; name one of each, or of the rest, {REST}=base.pt"
        )
    if not without:
        rest = None  # which need not be loaded
    paths = list(dict.fromkeys([*found.values(), *([] if rest is None else [rest])]))
    numbers = {path: number for number, path in enumerate(paths)}
    of_pools = [numbers.get(found.get(i, rest)) for i in range(len(pools))]
    named = [(pools[i], numbers[teacher]) for i, teacher in found.items()]
    return Assignment(paths, of_pools, named, numbers.get(rest))


def _split(entry: str, names: Dict[str, int]) -> Tuple[str, str]:
    """The language and the path: a language may have a '=' as well, as far as it is known."""
    known = [name for name in (*names, REST) if entry.startswith(f"{name}=")]
    name = max(known, key=len) if known else entry.split("=", 1)[0].strip()
    return name, entry[len(name) + 1 :].strip() if known else entry.split("=", 1)[1].strip()


def _entries(path: str) -> Optional[List[str]]:
    """``hi=a.pt`` and so on; None: `path` is that of a teacher."""
    if os.path.exists(path):
        return _lines(path)
    if all(map(_is_path, utils.split_paths(path))) or not re.match(r"[^/]*=|\.\.\.=", path):
        return None
    entries: List[str] = []
    for part in path.split(","):
        if "=" in part or not entries:
            entries.append(part.strip())
        else:
            entries[-1] += f",{part}"  # of a path
    return entries


def _is_path(text: str) -> bool:
    """Whether a text with a '=' in it is that of a file, which may be misspelt in a folder that is there."""
    return "=" not in text or os.path.exists(text) or os.path.isdir(os.path.dirname(text))


def _lines(path: str) -> Optional[List[str]]:
    """Of a text file whose first line, but for comments, is ``language=checkpoint``; None: it is another file."""
    if not os.path.isfile(path) or os.path.getsize(path) > _LONGEST:
        return None
    require_regular(path)
    with open(path, "rb") as file:
        content = file.read()
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        return None
    lines = [line for line in lines if line and not _COMMENT.match(line)]
    if not lines or "=" not in lines[0] or "\0" in lines[0]:
        return None
    wrong = next((line for line in lines if "=" not in line), None)
    if wrong is not None:
        raise ConfigError(f"{FLAG} {path}: its line '{wrong}' names no checkpoint; hi=a.pt in each line")
    return lines
