"""The checkpoint of upstream's ``transformer``, with the dictionaries beside it."""

import os
import shutil
from typing import Any, Dict, List

import torch
from fairseq.data import Dictionary

from kd_ext.errors import ConfigError
from kd_ext.exporting.plain import Plain
from kd_ext.exporting.student import Student
from kd_ext.files.dictionaries import load_dictionary
from kd_ext.files.reading import explained
from kd_ext.files.safe_loading import load
from kd_ext.files.writing import PART, written_whole

# what fairseq looks for in a checkpoint that it loads; the optimizer's state and a run's record are not in it
_EXTRA = {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}}


def check_is_exported(path: str) -> None:
    """See that a file may be replaced: an older one of this command's.

    Raises:
        ConfigError: it is something else
    """
    with explained(path, "exported checkpoint"):
        state = load(path)
    if not isinstance(state, dict) or state.get("extra_state") != _EXTRA:
        raise ConfigError(f"{path}: not an exported checkpoint")


def dictionary_paths(student: Student, folder: str) -> Dict[str, Dictionary]:
    """Where a student's dictionaries go in a folder, and each of them."""
    task = student.task
    pairs = ((task.cfg.source_lang, task.source_dictionary), (task.cfg.target_lang, task.target_dictionary))
    return {os.path.join(folder, f"dict.{language}.txt"): words for language, words in pairs}


def check_dictionaries(student: Student, folder: str) -> None:
    """See that no other dictionary lies where a student's is to go.

    Raises:
        ConfigError: one does
    """
    for path, words in dictionary_paths(student, folder).items():
        if os.path.lexists(path) and not _is_dictionary(path, words):
            raise ConfigError(
                f"{path}: is there, and not the dictionary of {student.path}; write to a folder without one"
            )


def _is_dictionary(path: str, words: Dictionary) -> bool:
    try:
        return load_dictionary(path).symbols == words.symbols
    except ConfigError:
        return False


def write_files(student: Student, plain: Plain, path: str) -> List[str]:
    """Write a checkpoint and the dictionaries beside it, all or none; the paths of the dictionaries.

    Raises:
        ConfigError: they cannot be written
    """
    written = write_dictionaries(student, os.path.dirname(path))
    try:
        write_checkpoint(student, plain, path)
    except BaseException:
        for dictionary in written:
            os.remove(dictionary)
        raise
    return written


def write_dictionaries(student: Student, folder: str) -> List[str]:
    """Copy the dictionaries to a folder that lacks them; the paths of those that were written."""
    written = []
    for path in dictionary_paths(student, folder):
        if os.path.exists(path):
            continue
        with open(os.path.join(student.folder, os.path.basename(path)), "rb") as source:
            with written_whole(path, f"{path}.{os.getpid()}{PART}") as file:
                shutil.copyfileobj(source, file)
        written.append(path)
    return written


def write_checkpoint(student: Student, plain: Plain, path: str) -> None:
    """Write a checkpoint of upstream's ``transformer``, whole or not at all.

    In it are tensors, numbers, strings and containers alone, so that every release of torch loads it.
    """
    state: Dict[str, Any] = {
        "args": None,
        "cfg": plain.groups,
        "model": plain.weights,
        "optimizer_history": [
            {
                "criterion_name": "CrossEntropyCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {"best": None},
                "num_updates": student.updates,
            }
        ],
        "task_state": {},
        "extra_state": _EXTRA,
    }
    with written_whole(path, f"{path}.{os.getpid()}{PART}") as file:
        torch.save(state, file)
