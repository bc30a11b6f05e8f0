"""What of a run's surroundings must not change in mid-training: a record of it, which goes into every checkpoint."""

import logging
from typing import Any, Dict, Optional, Sequence

from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationTask

from kd_ext.errors import ConfigError
from kd_ext.files.fingerprint import dictionary_fingerprint

logger = logging.getLogger(__name__)

KEY = "trained_with"
TEACHER, SOURCE, TARGET = "teacher", "source dictionary", "target dictionary"
LANGUAGES = "languages"  # for who reads the checkpoint: fairseq saves none that it read off the data
_FLAGS = {SOURCE: "--srcdict", TARGET: "--tgtdict"}


def of_dictionaries(source: Dictionary, target: Dictionary) -> Dict[str, str]:
    return _of_words(source.symbols, target.symbols)


def _of_words(source: Sequence[str], target: Sequence[str]) -> Dict[str, str]:
    return {SOURCE: dictionary_fingerprint(source), TARGET: dictionary_fingerprint(target)}


def of_task(task: Any) -> Dict[str, str]:
    """What is to be recorded of a run of a task: of one that says nothing of it the dictionaries, if it translates."""
    if not isinstance(task, TranslationTask):
        return {}
    found = getattr(task, KEY, None) or of_dictionaries(task.source_dictionary, task.target_dictionary)
    return {**found, LANGUAGES: f"{task.cfg.source_lang}-{task.cfg.target_lang}"}


def recorded(state: Dict[str, Any]) -> Dict[str, str]:
    """What a checkpoint has of it; nothing if its run did not have the plugin."""
    return (state.get("extra_state") or {}).get(KEY, {})


def compare(saved: Dict[str, str], now: Dict[str, str], cfg, resumes: bool, frozen_by: Optional[str]) -> None:
    """As :func:`check_same` for a run that goes on from a checkpoint, else as :func:`warn_of_other_words`.

    Args:
        frozen_by: the flag by which the checkpoint's embeddings stay as they are, so that they cannot come to belong
            to other words
    """
    if resumes:
        check_same(saved, now, cfg)
    elif frozen_by:
        check_words(saved, now, cfg.data, f"the checkpoint, whose embeddings {frozen_by} freezes,")
    else:
        warn_of_other_words(saved, now)


def check_same(saved: Dict[str, str], now: Dict[str, str], cfg) -> None:
    """Compare the fingerprints of a checkpoint with those of the run that is to go on from it.

    What only one of them has is not compared: ``--alpha 0`` needs no teacher.

    Args:
        cfg: the task's settings, for the messages

    Raises:
        ConfigError: something differs
    """
    if _differs(saved, now, TEACHER):
        path, cache = cfg.teacher_checkpoint_path, cfg.teacher_cache_dir
        flag = f"--teacher-checkpoint-path {path}" if path else f"--teacher-cache-dir {cache}"
        raise ConfigError(
            f"{flag}: not the teacher that the checkpoint was trained with (weights {now[TEACHER]}, then "
            f"{saved[TEACHER]}); name that one, or begin anew from the student's weights with this one: "
            "--finetune-from-model CHECKPOINT and another --save-dir, or --reset-optimizer"
        )
    check_words(saved, now, cfg.data)


def has_words(saved: Dict[str, str], source: Sequence[str], target: Sequence[str]) -> bool:
    """Whether the words of two dictionaries are those that a checkpoint was trained with; also if it has no record."""
    now = _of_words(source, target)
    return not any(_differs(saved, now, side) for side in now)


def check_words(saved: Dict[str, str], now: Dict[str, str], data: str, checkpoint: str = "the checkpoint") -> None:
    """See that the dictionaries are those that a checkpoint was trained with, as far as it has a record of them.

    Args:
        data: the folder of those at hand, for the message
        checkpoint: the same

    Raises:
        ConfigError: one is another
    """
    for side in (SOURCE, TARGET):
        if _differs(saved, now, side):
            raise ConfigError(
                f"{data}: its {side} is not the one that {checkpoint} was trained with; preprocess the data with that "
                f"one (fairseq-preprocess {_FLAGS[side]})"
            )


def warn_of_other_words(saved: Dict[str, str], now: Dict[str, str]) -> None:
    """For a run that begins anew from a checkpoint's weights, where other words can be what is wanted."""
    for side in (SOURCE, TARGET):
        if _differs(saved, now, side):
            logger.warning("the %s is not that of the checkpoint: its embeddings now belong to other words", side)


def _differs(saved: Dict[str, str], now: Dict[str, str], name: str) -> bool:
    return name in saved and name in now and saved[name] != now[name]
