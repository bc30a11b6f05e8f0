"""A teacher's file: what it is, and the settings in it with those that a user gives in their place."""

import difflib
import os
import re
from argparse import Namespace
from typing import Any, Dict

from fairseq import checkpoint_utils, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
from omegaconf import OmegaConf, open_dict

from kd_ext.errors import ConfigError
from kd_ext.files import trained_with
from kd_ext.models.same_function import settings_read
from kd_ext.teachers.kinds import FLAG, KINDS, SIDES, editable
from kd_ext.upstream.foreign_settings import UNREGISTERED_TASK
from kd_ext.upstream.mapped_checkpoints import mapped_checkpoints

_OF_PAIR = re.compile(r"train\d*\.([^.-]+)-([^.-]+)\.")
LAYOUT, WEIGHTS = "layout", "weights"  # of the state, for the log


def read(path: str, settings: Dict[str, Any], ema: bool = False) -> Dict[str, Any]:
    """The state in `path`, with its settings as a structured config under ``cfg``.

    Args:
        settings: replace those of the file
        ema: whether ``model`` is to be the averaged weights that ``--store-ema`` keeps

    Raises:
        ConfigError: there is no such file, it is not one to teach from, or nothing reads one of the settings
    """
    if os.path.isdir(path):
        raise ConfigError(f"{FLAG} {path}: a folder; name a checkpoint in it, such as {path}/checkpoint_best.pt")
    if not os.path.isfile(path):
        parts = re.split("[, ]+", path)
        several = len(parts) > 1 and all(map(os.path.isfile, parts))
        remedy = f"':' joins several: {':'.join(parts)}" if several else "name the checkpoint that fairseq-train wrote"
        raise ConfigError(f"{FLAG} {path}: no such file; {remedy}")
    chosen = settings.get("task") if isinstance(settings.get("task"), str) else None
    state = _read_state(path, {key: value for key, value in settings.items() if value is not chosen or key != "task"})
    state[LAYOUT] = "args" if state.get("args") is not None else "cfg"
    if state.get("args") is not None:
        state["cfg"], state["args"] = convert_namespace_to_omegaconf(state["args"]), None
    _check_is_checkpoint(path, state)
    _check_registered(path, "task", chosen or state.get(UNREGISTERED_TASK, state["cfg"].task._name), TASK_REGISTRY)
    if chosen:
        _choose_task(path, chosen, state)
    _fill_in_languages(state)
    _check_overrides(path, settings, state["cfg"])
    _check_registered(path, "architecture", state["cfg"].model._name, {**MODEL_REGISTRY, **ARCH_MODEL_REGISTRY})
    state[WEIGHTS] = "raw"
    if ema:
        averaged = (state.get("extra_state") or {}).get("ema")
        if not averaged:
            raise ConfigError(
                f"--teacher-ema: {path} has no averaged weights, as fairseq-train --store-ema keeps; leave it out"
            )
        state["model"], state[WEIGHTS] = averaged, "EMA"
    return state


def let_go(state: Dict[str, Any]) -> None:
    """What upgrades a checkpoint for fairseq leaves cycles of references, with all of the file."""
    state["model"].clear()
    state.clear()


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


def _check_is_checkpoint(path: str, state: Dict[str, Any]) -> None:
    if state.get("shard_metadata") is not None:
        raise ConfigError(
            f"{FLAG} {path}: one shard of a fully sharded run; name a checkpoint that holds all of the model (train "
            "with --no-shard-state, or consolidate the shards)"
        )
    if state.get("cfg") is None or "model" not in state:
        raise ConfigError(
            f"{FLAG} {path}: not a checkpoint of fairseq: it has no settings or no model; name a file that "
            "fairseq-train wrote"
        )


def _check_registered(path: str, kind: str, name: str, registry: Dict[str, Any]) -> None:
    if name not in registry:
        by_hand = ", or, if its input is that of translation, --teacher-model-overrides \"{'task': 'translation'}\""
        raise ConfigError(
            f"{FLAG} {path}: its {kind} '{name}' is not registered; "
            f"name the module that registers it by --teacher-user-dir{by_hand if kind == 'task' else ''}"
        )


def _choose_task(path: str, chosen: str, state: Dict[str, Any]) -> None:
    """Put a task in place of the file's, where nothing is known of how that one has its model asked."""
    cfg = state["cfg"]
    own = state.pop(UNREGISTERED_TASK, cfg.task._name)
    if own == chosen:
        return
    if own in KINDS or chosen in KINDS:
        raise ConfigError(
            f"--teacher-model-overrides {{'task': {chosen!r}}}: {path} is of the task '{own}', whose model would be "
            "asked in another way than it was trained; leave it out"
        )
    saved = vars(cfg.task) if isinstance(cfg.task, Namespace) else OmegaConf.to_container(cfg.task)
    with open_dict(cfg):
        if chosen in TASK_DATACLASS_REGISTRY:
            cfg.task = OmegaConf.structured(TASK_DATACLASS_REGISTRY[chosen])
            for key in saved.keys() & cfg.task.keys():
                cfg.task[key] = saved[key]
            cfg.task._name = chosen
        else:
            cfg.task = Namespace(**{**saved, "_name": chosen})


def _fill_in_languages(state: Dict[str, Any]) -> None:
    """Those of a run that read them off its data: as the plugin recorded them, or as the data is there."""
    task = state["cfg"].task
    if any(side not in task or getattr(task, side) for side in SIDES) or "data" not in task or not task.data:
        return
    pairs = {tuple(trained_with.recorded(state).get(trained_with.LANGUAGES, "").split("-"))}
    folder = utils.split_paths(task.data)[0]
    if pairs == {("",)}:
        names = os.listdir(folder) if os.path.isdir(folder) else []
        pairs = {match.groups() for match in map(_OF_PAIR.match, names) if match}
    if len(pairs) == 1 and len(pair := pairs.pop()) == 2:
        with editable(task):
            for side, language in zip(SIDES, pair):
                setattr(task, side, language)


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
