"""A teacher's dictionaries: where they are, whether they are its own, and whether they are the student's."""

import logging
import os
from typing import Any, Dict, List, Sequence

from fairseq import utils
from fairseq.data import Dictionary

from kd_ext.errors import ConfigError
from kd_ext.files import trained_with
from kd_ext.teachers.kinds import FLAG, Kind, editable

logger = logging.getLogger(__name__)

_NAME_FOLDER = "name {} by --teacher-model-overrides \"{{'data': 'folder'}}\""


def point_at_dictionaries(kind: Kind, settings: Dict[str, Any], student_task: Any, state: Dict[str, Any]) -> None:
    """Make a task's settings fit for building a teacher: dictionaries, and no generator of its own.

    Args:
        state: the teacher's checkpoint, which may have a record of its dictionaries

    Raises:
        ConfigError: there are none where the user says, or else beside the checkpoint, where it was trained, or in the
            student's data
    """
    with editable(kind.cfg):
        if "data" in kind.cfg:
            kind.cfg.data = _folder(kind, settings, student_task, trained_with.recorded(state))
        if "eval_bleu" in kind.cfg:
            kind.cfg.eval_bleu = False


def _folder(kind: Kind, settings: Dict[str, Any], student_task: Any, saved: Dict[str, str]) -> str:
    beside, recorded = os.path.dirname(os.path.abspath(kind.path)), utils.split_paths(kind.cfg.data)[0]
    own = getattr(student_task.cfg, "data", None)
    students = utils.split_paths(own)[:1] if own else []
    folders = [settings["data"]] if "data" in settings else list(dict.fromkeys([beside, recorded, *students]))
    names, others = kind.dictionary_names(), kind.students_dictionary_names()
    there = [
        (folder, wanted)
        for folder in folders
        for wanted in ((names,) if kind.languages_matter else (names, others))
        if all(os.path.isfile(os.path.join(folder, name)) for name in wanted)
    ]
    if not there:
        raise ConfigError(
            f"{FLAG} {kind.path}: no {' and '.join(names)} in {' or '.join(folders)}; "
            f"{_NAME_FOLDER.format('their folder')}"
        )
    # a relative folder can be another project's by now; if none has the recorded words, that is said of the first
    folder, wanted = next((place for place in there if _are_recorded(kind, *place, saved)), there[0])
    if wanted != names:
        kind.name_as_student()
    if folder in students and not any(place in (beside, recorded) for place, _ in there):
        logger.warning(
            "%s: its dictionaries are neither beside it nor in %s, where it was trained; those in %s are taken",
            *(kind.path, recorded, folder),
        )
    return folder


def _are_recorded(kind: Kind, folder: str, names: Sequence[str], saved: Dict[str, str]) -> bool:
    """Whether a folder's dictionaries are those of a record; without one, any are."""
    if not saved.keys() & {trained_with.SOURCE, trained_with.TARGET} or len(names) != 2:
        return True
    found = kind.read_dictionaries(folder, names)
    return trained_with.has_words(saved, *([*each.symbols, *kind.appended_words(None)] for each in found))


def check_recorded(kind: Kind, task: Any, state: Dict[str, Any]) -> None:
    """See that the dictionaries are the teacher's, where its run had the plugin, which records them."""
    recorded = trained_with.recorded(state)
    for side, found in trained_with.of_dictionaries(*kind.dictionaries(task)).items():
        if recorded.get(side, found) != found:
            raise ConfigError(
                f"{FLAG} {kind.path}: the {side} in {kind.cfg.data} is not the one that it was trained with; "
                f"{_NAME_FOLDER.format('the folder of its own')}"
            )


def compare_dictionaries(kind: Kind, task: Any, student_task: Any, state: Dict[str, Any]) -> None:
    """See that what the student can say is what the teacher has for it; words that its task appends may follow."""
    remedy = "preprocess the student's data with the teacher's dictionaries (fairseq-preprocess --srcdict, --tgtdict)"
    if trained_with.SOURCE not in trained_with.recorded(state):  # these may not be its own
        remedy += f", or {_NAME_FOLDER.format('the folder of its own')}"
    read = f"those in {getattr(kind.cfg, 'data', None)} were read; {remedy}"
    theirs, ours = kind.dictionaries(task), (student_task.source_dictionary, student_task.target_dictionary)
    for side, teacher, student in zip(("source", "target"), theirs, ours):
        _compare(f"{FLAG} {kind.path}: its {side}", teacher, student, kind.appended_words(task), read)


def _compare(name: str, teacher: Dictionary, student: Dictionary, appended: Sequence[str], read: str) -> None:
    if teacher.symbols[: len(student)] == student.symbols and {*teacher.symbols[len(student) :]} <= {*appended}:
        return
    pairs = zip(teacher.symbols, student.symbols)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(teacher), len(student)))
    theirs, ours = (repr(d.symbols[first]) if first < len(d) else "nothing" for d in (teacher, student))
    raise ConfigError(
        f"{name} dictionary differs from the student's: entry {first} is {theirs} for the teacher and {ours} for the "
        f"student (sizes {len(teacher)} and {len(student)}); {read}"
    )


def left_over(teacher: Dictionary, student: Dictionary) -> List[str]:
    """The teacher's words that the student does not have."""
    return teacher.symbols[len(student) :]
