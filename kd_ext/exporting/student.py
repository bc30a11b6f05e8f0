"""A checkpoint as a model in evaluation mode, with its dictionaries and its settings."""

import itertools
import os
from argparse import Namespace
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from fairseq import checkpoint_utils, utils
from fairseq.data.data_utils import infer_language_pair
from fairseq.models.transformer import TransformerModel
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import OmegaConf
from torch import nn

from kd_ext.errors import ConfigError
from kd_ext.files import trained_with
from kd_ext.files.dictionaries import load_dictionary
from kd_ext.models.extension_flags import Extensions, activation_key, read_extensions
from kd_ext.models.transformer_ext import TransformerExtModel, transformer_ext
from kd_ext.upstream.foreign_settings import UNREGISTERED_TASK

TASKS = ("translation", "translation_with_kd")


class Student(NamedTuple):
    """What is exported.

    Attributes:
        path: of its file
        model: in evaluation mode
        settings: every one that its class reads
        extensions: those of this project, as its class reads them
        task: with its dictionaries
        updates: of its training
        folder: where its dictionaries are
    """

    path: str
    model: nn.Module
    settings: Namespace
    extensions: Extensions
    task: TranslationTask
    updates: int
    folder: str


def load_student(
    path: str,
    data: Optional[str] = None,
    languages: Tuple[Optional[str], Optional[str]] = (None, None),
    adapters: Optional[Dict[str, Optional[str]]] = None,
    may_lack_adapters: bool = False,
) -> Student:
    """Load a checkpoint on the CPU in float32.

    Args:
        path: of a ``transformer_ext`` or upstream's ``transformer``, exported or not
        data: the folder with its dictionaries; None: beside it, or where it was trained
        languages: source and target; None: what it says, or what the data does
        adapters: by side, the id to use, or ``none``; None: the one that was trained
        may_lack_adapters: leave a side without adapters as it is, whatever is asked for

    Raises:
        ConfigError: it cannot be read, is of another class, has values that are no numbers, or its dictionaries are not
            found or are others
    """
    if not os.path.exists(path):
        raise ConfigError(f"{path}: no such file; name a checkpoint that fairseq-train wrote")
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    cfg = state.get("cfg")
    if cfg is None or cfg.get("model") is None or "model" not in state:
        raise ConfigError(f"{path}: not a checkpoint of fairseq: it has no settings or no model")
    asked = {side: name for side, name in (adapters or {}).items() if name is not None}
    if may_lack_adapters:
        asked = {side: name for side, name in asked.items() if getattr(cfg.model, f"{side}_add_adapters", False)}
    overrides = {activation_key(side): name for side, name in asked.items()}
    if overrides:
        state = checkpoint_utils.load_checkpoint_to_cpu(path, overrides)
    _check_task(path, state.get(UNREGISTERED_TASK, cfg.task._name))
    recorded = trained_with.recorded(state)
    task = _task(path, cfg.task, data, languages, recorded)
    _check_recorded(path, task, recorded)
    history = state.get("optimizer_history") or [{}]
    updates = history[-1].get("num_updates", 0)
    (model,), cfg, _ = checkpoint_utils.load_model_ensemble_and_task([path], overrides, task, state=state)
    if type(model) not in (TransformerExtModel, TransformerModel):
        raise ConfigError(
            f"{path}: its model is a {type(model).__name__}; what can be exported are transformer_ext, with whichever "
            "of this project's features, and upstream's transformer"
        )
    _check_finite(path, model)
    settings = _filled(cfg.model)
    _check_activation(path, settings.activation_fn)
    return Student(path, model.eval(), settings, read_extensions(settings), task, updates, task.cfg.data)


def _check_finite(path: str, model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ConfigError(
                f"{path}: its {name} has values that are not finite numbers: its training diverged; name an earlier "
                "checkpoint"
            )


def _check_activation(path: str, name: str) -> None:
    """See that fairseq 0.12.2 can run a model: of ``swish`` it calls the class where it means the function."""
    if name == "swish":
        raise ConfigError(
            f"{path}: --activation-fn swish: fairseq can build a model with it, and run none; name a checkpoint with "
            f"one of {', '.join(utils.get_available_activation_fns())}"
        )


def _check_task(path: str, name: str) -> None:
    if name not in TASKS:
        raise ConfigError(
            f"{path}: its task is {name}, which gives its model other input than the task of an exported one would; "
            f"what can be exported was trained by one of {', '.join(TASKS)}"
        )


def _task(
    path: str, saved: Any, data: Optional[str], languages: Tuple[Optional[str], ...], recorded: Dict[str, str]
) -> TranslationTask:
    """Upstream's own task, with a student's dictionaries."""
    if data is not None and not os.path.isdir(data):
        raise ConfigError(f"--data {data}: no such folder; name the one with the dictionaries of {path}")
    beside = os.path.dirname(os.path.abspath(path))
    folders = [data] if data is not None else [beside, utils.split_paths(saved.data or "")[0]]
    there = list(filter(os.path.isdir, folders))
    pairs = _languages(saved, languages, recorded, there)
    found: List[TranslationTask] = []
    for folder, pair in itertools.product(there, pairs):
        paths = [os.path.join(folder, f"dict.{language}.txt") for language in pair]
        if all(map(os.path.isfile, paths)):
            cfg = OmegaConf.structured(TranslationConfig)
            for key in ("left_pad_source", "left_pad_target", "truncate_source"):
                cfg[key] = saved.get(key, cfg[key])
            for key in ("max_source_positions", "max_target_positions"):
                cfg[key] = saved.get(key) or cfg[key]
            cfg.data, (cfg.source_lang, cfg.target_lang) = folder, pair
            # not by its setup, to which a colon in the folder's name parts two folders
            task = TranslationTask(cfg, *map(load_dictionary, paths))
            if trained_with.has_words(recorded, task.source_dictionary.symbols, task.target_dictionary.symbols):
                return task
            found.append(task)
    if found:
        return found[0]  # another project's, say, of which that is said
    where = " or ".join(filter(None, folders))
    if not pairs and any(name.startswith("dict.") for folder in there for name in os.listdir(folder)):
        raise ConfigError(
            f"--source-lang, --target-lang are missing: neither {path} nor the data in {where} says which languages "
            "its dictionaries are of"
        )
    names = " and ".join(f"dict.{language}.txt" for language in (pairs or [("SRC", "TGT")])[0])
    raise ConfigError(
        f"{'--data ' + data if data else path}: no {names} in {where}; name the folder of the dictionaries that it was "
        "trained with by --data"
    )


def _languages(
    saved: Any, asked: Tuple[Optional[str], ...], recorded: Dict[str, str], folders: Sequence[str]
) -> List[List[str]]:
    """Source and target, the likeliest first: what is asked for or a setting counts, else what the run with the plugin
    recorded, or what data in a folder is called."""
    given = [name or setting for name, setting in zip(asked, (saved.get("source_lang"), saved.get("target_lang")))]
    known = recorded.get(trained_with.LANGUAGES, "").split("-")
    others = [known] if len(known) == 2 else []
    pairs = [[a or b for a, b in zip(given, other)] for other in [*others, *map(infer_language_pair, folders)]]
    return [pair for pair in [given, *pairs] if None not in pair]


def _check_recorded(path: str, task: Any, recorded: Dict[str, str]) -> None:
    """See that the dictionaries are those of a student's training, where that had the plugin, which records them."""
    for side, found in trained_with.of_dictionaries(task.source_dictionary, task.target_dictionary).items():
        if recorded.get(side, found) != found:
            raise ConfigError(
                f"{path}: the {side} in {task.cfg.data} is not the one that it was trained with (words {found}, then "
                f"{recorded[side]}); name the folder of its own by --data"
            )


def _filled(settings: Any) -> Namespace:
    values = OmegaConf.to_container(settings) if OmegaConf.is_config(settings) else vars(settings)
    filled = Namespace(**{key: value for key, value in values.items() if value is not None})
    transformer_ext(filled)
    return filled
