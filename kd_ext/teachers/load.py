"""From ``--teacher-checkpoint-path`` to a :class:`~kd_ext.modules.teacher.Teacher`."""

import difflib
import inspect
import logging
import os
from argparse import Namespace
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
from fairseq import checkpoint_utils, tasks, utils
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
from omegaconf import OmegaConf, open_dict

from kd_ext.errors import ConfigError
from kd_ext.files import trained_with
from kd_ext.files.fingerprint import model_fingerprint
from kd_ext.models.layers import drop_dead_parameters
from kd_ext.models.output_projection import NoProjectionError, find_projection
from kd_ext.models.same_function import settings_read
from kd_ext.modules.random_state import random_state_kept
from kd_ext.modules.teacher import Projection, Teacher
from kd_ext.overrides import parse_overrides
from kd_ext.teachers.fused_attention import fuse_cross_attention
from kd_ext.upstream.foreign_settings import UNREGISTERED_TASK
from kd_ext.upstream.mapped_checkpoints import mapped_checkpoints

logger = logging.getLogger(__name__)

FLAG = "--teacher-checkpoint-path"


def load_teacher(checkpoint_path: Optional[str], overrides: str, user_dir: Optional[str], student_task: Any) -> Teacher:
    """Load a teacher, on the CPU in float32, beside a student's task.

    Each model is built by a task of its own. The student's task, its dictionaries and the state of every random
    number generator stay as they are.

    Args:
        checkpoint_path: one file, or several joined by ``:``
        overrides: a Python dictionary as text; its entries replace the saved settings
        user_dir: a module to import first
        student_task: gives the dictionaries and the lengths that the teacher must match

    Raises:
        ConfigError: with the flag to blame: no path, no such file, not a checkpoint, other dictionaries
    """
    if not checkpoint_path:
        raise ConfigError(
            f"{FLAG} is missing: --kd-strategy {student_task.cfg.kd_strategy} distils a teacher; "
            "name its checkpoint, or train without one by --kd-strategy word_seq_level --alpha 0"
        )
    settings = parse_overrides("--teacher-model-overrides", overrides)
    if user_dir is not None:
        _import_user_dir(user_dir)
    with random_state_kept():  # building a model draws its initial weights
        loaded = [_load_one(path, settings, student_task) for path in utils.split_paths(checkpoint_path)]
    models, fingerprints = zip(*loaded)
    return Teacher(models, [_find_projection(model) for model in models], _identity(fingerprints, settings))


def identify_teacher(checkpoint_path: str, overrides: str) -> str:
    """What tells a teacher from others: the weights of its models, and what of their settings is overridden.

    Raises:
        ConfigError: with the flag to blame
    """
    settings = parse_overrides("--teacher-model-overrides", overrides)
    paths = utils.split_paths(checkpoint_path)
    return _identity([_fingerprint_of_file(path, settings) for path in paths], settings)


def _fingerprint_of_file(path: str, settings: Dict[str, Any]) -> str:
    state = _read_checkpoint(path, settings)
    fingerprint = model_fingerprint(state["model"])
    _let_go(state)
    return fingerprint


def _let_go(state: Dict[str, Any]) -> None:
    """What upgrades a checkpoint for fairseq leaves cycles of references, with all of the file."""
    state["model"].clear()
    state.clear()


def _identity(fingerprints: Sequence[str], settings: Dict[str, Any]) -> str:
    others = {key: settings[key] for key in sorted(settings) if key != "data"}  # where dictionaries are
    return " ".join(sorted(fingerprints)) + (f" with {others}" if others else "")


def _find_projection(model: torch.nn.Module) -> Optional[Projection]:
    try:
        return find_projection(model)
    except NoProjectionError as error:
        logger.info("the teacher projects all positions, padding too: %s", error)
        return None


def _import_user_dir(user_dir: str) -> None:
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
        raise ConfigError(f"{flag}: cannot be imported ({_in_a_line(error)}); {remedy}") from error


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _load_one(path: str, settings: Dict[str, Any], student_task: Any) -> Tuple[torch.nn.Module, str]:
    """The model, and the fingerprint of its weights."""
    try:
        return _build(path, settings, _read_checkpoint(path, settings), student_task)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # what task and model have against their settings
        given = f"{FLAG} {path}" if not settings else f"--teacher-model-overrides {settings}"
        remedy = "mend its settings by --teacher-model-overrides" if not settings else "give other values"
        raise ConfigError(f"{given}: {path} cannot be loaded so ({_in_a_line(error)}); {remedy}") from error


def _build(path: str, settings: Dict[str, Any], state: Dict[str, Any], student_task: Any):
    cfg = state["cfg"]
    _check_registered(path, "task", state.get(UNREGISTERED_TASK, cfg.task._name), TASK_REGISTRY)
    _check_registered(path, "architecture", cfg.model._name, {**MODEL_REGISTRY, **ARCH_MODEL_REGISTRY})
    _point_at_dictionaries(path, settings, cfg.task, student_task)
    task = tasks.setup_task(cfg.task)
    _compare_dictionaries(path, "source", task.source_dictionary, student_task.source_dictionary)
    _compare_dictionaries(path, "target", task.target_dictionary, student_task.target_dictionary)
    _check_recorded(path, cfg.task.data, task, state)
    fingerprint = model_fingerprint(state["model"])
    model = _build_model(path, task, cfg.model, state)
    _check_lengths(path, model, student_task)
    logger.info(
        "loaded teacher %s: architecture %s, %s parameters, saved as %s",
        path,
        cfg.model._name,
        f"{sum(p.numel() for p in model.parameters()):,}",
        next((str(v.dtype) for v in state["model"].values() if v.is_floating_point()), "no floats"),
    )
    _let_go(state)
    return model, fingerprint


def _read_checkpoint(path: str, settings: Dict[str, Any]) -> Dict[str, Any]:
    """The state in `path`, with its settings as a structured config under ``cfg``."""
    if os.path.isdir(path):
        raise ConfigError(f"{FLAG} {path}: a folder; name a checkpoint in it, such as {path}/checkpoint_best.pt")
    if not os.path.isfile(path):
        raise ConfigError(f"{FLAG} {path}: no such file; name the checkpoint that fairseq-train wrote")
    state = _read_state(path, settings)
    if state.get("args") is not None:
        state["cfg"], state["args"] = convert_namespace_to_omegaconf(state["args"]), None
    if state.get("cfg") is None or "model" not in state:
        raise ConfigError(f"{FLAG} {path}: not a checkpoint of fairseq: it has no settings or no model")
    _check_overrides(path, settings, state["cfg"])
    return state


def _read_state(path: str, settings: Dict[str, Any]) -> Dict[str, Any]:
    try:
        with mapped_checkpoints():
            return checkpoint_utils.load_checkpoint_to_cpu(path, settings)
    except ConfigError as error:
        if not settings:
            raise ConfigError(f"{FLAG} {error}; name a file that fairseq-train wrote") from error
        said = error
    _read_state(path, {})  # if this works, it is not the file
    raise ConfigError(
        f"--teacher-model-overrides {settings}: not for {path}; give names and values as it has them ({said})"
    )


def _check_overrides(path: str, settings: Dict[str, Any], cfg: Any) -> None:
    """See that the task or the model of a teacher reads each of them: what else is in its file is not used."""
    if not settings.keys() - {"data"} or cfg.model._name not in {**MODEL_REGISTRY, **ARCH_MODEL_REGISTRY}:
        return
    known = {"data", *(vars(cfg.task) if isinstance(cfg.task, Namespace) else cfg.task), *settings_read(cfg.model)}
    # of an old file they replace what it says; a later one has its names elsewhere
    known |= {key for key, part in (("arch", cfg.model), ("task", cfg.task)) if settings.get(key) == part._name}
    known -= {"_name"}
    for key, value in settings.items():
        if key in ("task", "model") and isinstance(value, dict) and OmegaConf.is_config(cfg[key]):
            continue  # omegaconf knows what these have
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            raise ConfigError(
                f"--teacher-model-overrides {settings}: nothing reads '{key}', neither the model nor the task of "
                f"{path}; {'near to it: ' + ', '.join(near) if near else 'leave it out'}"
            )


def _check_registered(path: str, kind: str, name: str, registry: Dict[str, Any]) -> None:
    if name not in registry:
        raise ConfigError(
            f"{FLAG} {path}: its {kind} '{name}' is not registered; "
            "name the module that registers it by --teacher-user-dir"
        )


def _point_at_dictionaries(path: str, settings: Dict[str, Any], task_cfg: Any, student_task: Any) -> None:
    """Make a task's settings fit for building a teacher: dictionaries, and no generator of its own."""
    with open_dict(task_cfg):
        for side in ("source_lang", "target_lang"):
            if side in task_cfg and task_cfg[side] is None:
                task_cfg[side] = getattr(student_task.cfg, side)
        if "data" in task_cfg:
            task_cfg.data = _dictionary_folder(path, settings, task_cfg, student_task)
        if "eval_bleu" in task_cfg:
            task_cfg.eval_bleu = False


def _dictionary_folder(path: str, settings: Dict[str, Any], task_cfg: Any, student_task: Any) -> str:
    """Where the teacher's dictionaries are: as the user says, beside the checkpoint, or where it was trained."""
    beside, recorded = os.path.dirname(os.path.abspath(path)), utils.split_paths(task_cfg.data)[0]
    folders = [settings["data"]] if "data" in settings else [beside, recorded]
    languages = [task_cfg.get(side) or getattr(student_task.cfg, side) for side in ("source_lang", "target_lang")]
    names = [f"dict.{language}.txt" for language in languages]
    for folder in folders:
        if all(os.path.isfile(os.path.join(folder, name)) for name in names):
            return folder
    raise ConfigError(
        f"{FLAG} {path}: no {names[0]} and {names[1]} in {' or '.join(folders)}; "
        "name their folder by --teacher-model-overrides \"{'data': 'folder'}\""
    )


def _check_recorded(path: str, folder: str, task: Any, state: Dict[str, Any]) -> None:
    """See that the dictionaries in `folder` are the teacher's, where its run had the plugin, which records them."""
    recorded = trained_with.recorded(state)
    for side, found in trained_with.of_dictionaries(task.source_dictionary, task.target_dictionary).items():
        if recorded.get(side, found) != found:
            raise ConfigError(
                f"{FLAG} {path}: the {side} in {folder} is not the one that it was trained with; name the folder of "
                "its own by --teacher-model-overrides \"{'data': 'folder'}\""
            )


def _compare_dictionaries(path: str, side: str, teacher: Dictionary, student: Dictionary) -> None:
    if teacher.symbols == student.symbols:
        return
    pairs = zip(teacher.symbols, student.symbols)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(teacher), len(student)))
    theirs, ours = (repr(d.symbols[first]) if first < len(d) else "nothing" for d in (teacher, student))
    raise ConfigError(
        f"{FLAG} {path}: its {side} dictionary differs from the student's: entry {first} is {theirs} for the "
        f"teacher and {ours} for the student (sizes {len(teacher)} and {len(student)}); preprocess the "
        "student's data with the teacher's dictionaries (fairseq-preprocess --srcdict, --tgtdict)"
    )


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
            f"{FLAG} {path}: its weights do not fit its settings ({' '.join(str(error).split())[:300]}); "
            "mend the settings by --teacher-model-overrides"
        ) from error
    drop_dead_parameters(model)
    fuse_cross_attention(model)
    return model


def _check_lengths(path: str, model: torch.nn.Module, student_task: Any) -> None:
    sides = zip(("source", "target"), model.max_positions(), student_task.max_positions())
    for side, theirs, ours in sides:
        if theirs < ours:
            raise ConfigError(
                f"--max-{side}-positions {ours}: the teacher {path} takes at most {theirs} tokens; "
                f"use --max-{side}-positions {theirs}"
            )
