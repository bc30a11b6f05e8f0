"""From ``--teacher-checkpoint-path`` to a :class:`~kd_ext.modules.teacher.Teacher`."""

import inspect
import logging
import os
from argparse import Namespace
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
from fairseq import utils

from kd_ext.errors import ConfigError, in_short
from kd_ext.files.fingerprint import model_fingerprint
from kd_ext.models.layers import drop_dead_parameters
from kd_ext.models.output_projection import NoProjectionError, find_projection
from kd_ext.modules.input_format import InputFormat
from kd_ext.modules.random_state import random_state_kept
from kd_ext.modules.teacher import Projection, Teacher
from kd_ext.overrides import parse_overrides
from kd_ext.parsing import check_path
from kd_ext.teachers import check, reading
from kd_ext.teachers.check import in_a_line
from kd_ext.teachers.dictionaries import check_recorded, compare_dictionaries, left_over, point_at_dictionaries
from kd_ext.teachers.fused_attention import fuse_cross_attention
from kd_ext.teachers.kinds import FLAG, Kind, find_kind

logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """What a user says of a teacher.

    Attributes:
        path: one file, or several joined by ``:``
        overrides: a Python dictionary as text; its entries replace the saved settings
        user_dir: a module to import first
        ema: whether the averaged weights are taken that ``--store-ema`` keeps
    """

    path: Optional[str]
    overrides: str = "{}"
    user_dir: Optional[str] = None
    ema: bool = False

    def paths(self) -> List[str]:
        """Of each model.

        Raises:
            ConfigError: it is one file, whose name has what joins several
        """
        parts = utils.split_paths(self.path)
        if len(parts) > 1 and os.path.isfile(self.path):
            raise ConfigError(
                f"{FLAG} {self.path}: a file with a ':' in its path, and ':' joins several; name it by a path without, "
                "as of a link"
            )
        if "" in parts:
            raise ConfigError(f"{FLAG} {self.path}: an empty path before, between or after ':', which joins several")
        return parts

    def settings(self) -> Dict[str, Any]:
        return parse_overrides("--teacher-model-overrides", self.overrides)


class Loaded(NamedTuple):
    """One model of a teacher.

    Attributes:
        layout: how it is asked; None: as the student is
        identity: what tells it from others
        target_dictionary: its own, whose last words the student may not have
    """

    model: torch.nn.Module
    layout: Optional[InputFormat]
    identity: str
    target_dictionary: Any


def load_teacher(source: Source, student_task: Any) -> Teacher:
    """Load a teacher, on the CPU in float32, beside a student's task.

    Each model is built by a task of its own. The student's task, its dictionaries and the state of every random
    number generator stay as they are.

    Args:
        student_task: gives the dictionaries and the lengths that the teacher must match

    Raises:
        ConfigError: with the flag to blame: no path, no such file, not a checkpoint, other dictionaries, a model that
            cannot be asked as a teacher is
    """
    if not source.path:
        raise ConfigError(
            f"{FLAG} is missing: --kd-strategy {student_task.cfg.kd_strategy} distils a teacher; "
            "name its checkpoint, or train without one by --kd-strategy word_seq_level --alpha 0"
        )
    loaded = load_models(source, student_task)
    for one in loaded:
        fuse_cross_attention(one.model)
    return Teacher(
        [one.model for one in loaded],
        [_find_projection(one.model) for one in loaded],
        _identity([one.identity for one in loaded], source.settings()),
        [one.layout for one in loaded],
        len(student_task.target_dictionary),
    )


def load_models(source: Source, student_task: Any) -> List[Loaded]:
    """The models of a teacher, as :func:`load_teacher` loads them, which can also decode."""
    settings = source.settings()
    import_user_dir(source.user_dir)
    with random_state_kept():  # building a model draws its initial weights
        return [_load_one(path, settings, source.ema, student_task) for path in source.paths()]


def identify_teacher(source: Source, student_task: Any) -> str:
    """What tells a teacher from others: weights, how its models are asked, and what of their settings is overridden.

    Raises:
        ConfigError: with the flag to blame
    """
    settings = source.settings()
    import_user_dir(source.user_dir)
    found = []
    for path in source.paths():
        state = reading.read(path, settings, source.ema)
        found.append(_identity_of_one(state, find_kind(path, state["cfg"].task, student_task)))
        reading.let_go(state)
    return _identity(found, settings)


def _identity_of_one(state: Dict[str, Any], kind: Kind) -> str:
    return " ".join(filter(None, (model_fingerprint(state["model"]), kind.describe())))


def _identity(identities: Sequence[str], settings: Dict[str, Any]) -> str:
    others = {key: settings[key] for key in sorted(settings) if key != "data"}  # where dictionaries are
    return " ".join(sorted(identities)) + (f" with {others}" if others else "")


def _find_projection(model: torch.nn.Module) -> Optional[Projection]:
    try:
        return find_projection(model)
    except NoProjectionError as error:
        logger.info("the teacher projects all positions, padding too: %s", error)
        return None


def import_user_dir(user_dir: Optional[str]) -> None:
    """Import what ``--teacher-user-dir`` names, if it names anything, once: before a teacher's file is read."""
    if user_dir is None:
        return
    check_path("--teacher-user-dir", user_dir)  # fairseq would run what is in the current folder
    flag = f"--teacher-user-dir {user_dir}"
    try:
        utils.import_user_module(Namespace(user_dir=user_dir))
    except FileNotFoundError:
        raise ConfigError(f"{flag}: no such folder; name the one with the teacher's __init__.py") from None
    except (Exception, SystemExit) as error:  # whatever is in it
        if os.path.isfile(user_dir):
            remedy = "it is a file; name the folder with the teacher's __init__.py"
        elif "not globally unique" in str(error) or "__path__" in str(error):  # of a module that is no package
            remedy = "another module of that name was imported before it; give the folder another name"
        elif "duplicate" in str(error):
            remedy = "what it registers is registered already: leave this flag out, or rename what it registers"
        else:
            remedy = "mend it, or name another folder"
        raise ConfigError(f"{flag}: cannot be imported ({in_a_line(error)}); {remedy}") from error


def _load_one(path: str, settings: Dict[str, Any], ema: bool, student_task: Any) -> Loaded:
    try:
        return _build(path, settings, reading.read(path, settings, ema), student_task)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # what task and model have against their settings
        given = f"{FLAG} {path}" if not settings else f"--teacher-model-overrides {settings}"
        remedy = "mend its settings by --teacher-model-overrides" if not settings else "give other values"
        raise ConfigError(f"{given}: {path} cannot be loaded so ({in_a_line(error)}); {remedy}") from error


def _build(path: str, settings: Dict[str, Any], state: Dict[str, Any], student_task: Any) -> Loaded:
    cfg = state["cfg"]
    kind = find_kind(path, cfg.task, student_task)
    check.check_direction(kind, student_task)
    point_at_dictionaries(kind, settings, student_task, state)
    task = kind.setup()
    check_recorded(kind, task, state)
    compare_dictionaries(kind, task, student_task, state)
    identity = _identity_of_one(state, kind)
    model = kind.model_of(_build_model(path, task, cfg.model, state))
    drop_dead_parameters(model)
    layout = kind.input_format(task, student_task)
    check.check_is_encoder_decoder(path, model, cfg.model._name)
    check.check_lengths(path, model, layout, student_task)
    check.look(path, model, cfg.model._name, layout, student_task)
    _log(path, state, kind, task, model, student_task)
    reading.let_go(state)
    return Loaded(model, layout, identity, kind.dictionaries(task)[1])


def _log(path: str, state: Dict[str, Any], kind: Kind, task: Any, model: torch.nn.Module, student_task: Any) -> None:
    logger.info(
        "loaded teacher %s: architecture %s, %s parameters, saved as %s; %s weights, settings as '%s', task %s, %s",
        path,
        state["cfg"].model._name,
        f"{sum(p.numel() for p in model.parameters()):,}",
        next((str(v.dtype) for v in state["model"].values() if v.is_floating_point()), "no floats"),
        *(state[reading.WEIGHTS], state[reading.LAYOUT], state["cfg"].task._name, kind.pair),
    )
    more = left_over(kind.dictionaries(task)[1], student_task.target_dictionary)
    if more:
        logger.info("words that the teacher alone has, and that get no probability: %s", " ".join(more[:20]))


def _build_model(path: str, task: Any, model_cfg: Any, state: Dict[str, Any]) -> torch.nn.Module:
    if "from_checkpoint" in inspect.signature(task.build_model).parameters:
        model = task.build_model(model_cfg, from_checkpoint=True)
    else:
        model = task.build_model(model_cfg)
    history = state.get("optimizer_history") or [{}]
    model.set_num_updates(history[-1].get("num_updates", 0))
    try:
        model.load_state_dict(state["model"], strict=True, model_cfg=model_cfg)
    except (RuntimeError, KeyError) as error:
        raise ConfigError(
            f"{FLAG} {path}: its weights do not fit its settings ({in_short(error)}); "
            "mend the settings by --teacher-model-overrides"
        ) from error
    return model
