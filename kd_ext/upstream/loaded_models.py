"""What a model that is loaded to be used is compared with: the dictionaries at hand, and ``--model-overrides``."""

import functools
from typing import Any, Dict, Iterator, Set

from fairseq import checkpoint_utils, tasks
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from omegaconf import DictConfig

from kd_ext.errors import ConfigError
from kd_ext.overrides import FLAG, typed_overrides
from kd_ext.upstream.command_line import near


def apply() -> None:
    """Refuse other dictionaries than those of a model's training, and overrides that nothing reads (fairseq 0.12.2).

    Of dictionaries fairseq compares the number of words alone: with others that are as many it translates into other
    words, and scores them. Of overrides it adds whatever name there is to the settings.
    """
    original = checkpoint_utils.load_model_ensemble_and_task
    if getattr(original, "_kd_ext_compares", False):
        return

    @functools.wraps(original)
    def load_model_ensemble_and_task(filenames, arg_overrides=None, task=None, *args, **kwargs):
        from kd_ext.files import trained_with  # not at the top: models register themselves after every touch

        read, setup = checkpoint_utils.load_checkpoint_to_cpu, tasks.setup_task
        given = kwargs.get("state")
        records = {} if given is None else {filenames[0]: trained_with.recorded(given)}
        asked, known = (arg_overrides or {}).keys() & typed_overrides().keys(), set()

        def setup_and_compare(*setup_args, **setup_kwargs):
            made = setup(*setup_args, **setup_kwargs)
            _check_words(records, made)
            return made

        def read_and_note(path, *read_args, **read_kwargs):
            state = read(path, *read_args, **read_kwargs)
            records[path] = trained_with.recorded(state)
            if asked:
                known.update(_names(state["cfg"]), _read_by_model(state["cfg"]))
            _check_words(records, task)  # before a model is built, which may be of another shape
            return state

        _check_words(records, task)
        checkpoint_utils.load_checkpoint_to_cpu, tasks.setup_task = read_and_note, setup_and_compare
        try:
            loaded = original(filenames, arg_overrides, task, *args, **kwargs)
        finally:
            checkpoint_utils.load_checkpoint_to_cpu, tasks.setup_task = read, setup
        if known:
            _check_overrides(filenames, asked, known)
        return loaded

    load_model_ensemble_and_task._kd_ext_compares = True
    checkpoint_utils.load_model_ensemble_and_task = load_model_ensemble_and_task


def _check_words(records: Dict[str, Dict[str, str]], task: Any) -> None:
    from kd_ext.files import trained_with

    now = trained_with.of_task(task)  # nothing where there is none yet, or it does not translate
    for path, recorded in records.items():
        if now:
            trained_with.check_words(recorded, now, task.cfg.data, path)


def _names(cfg: Any) -> Iterator[str]:
    """Of all settings in a checkpoint but those of a model without a dataclass, to which any name is added."""
    for key in cfg if isinstance(cfg, DictConfig) else ():
        yield str(key)
        if key in cfg:  # not where a value is missing
            yield from _names(cfg[key])


def _read_by_model(cfg: Any) -> Set[str]:
    from kd_ext.models.same_function import settings_read

    known = getattr(cfg.model, "_name", None) in {**MODEL_REGISTRY, **ARCH_MODEL_REGISTRY}
    return settings_read(cfg.model) if known else set()


def _check_overrides(filenames: Any, names: Set[str], known: Set[str]) -> None:
    for name in sorted(names - known):
        advice = near(name, list(known)) or "; leave it out"
        raise ConfigError(f"{FLAG} {typed_overrides()}: nothing of {':'.join(filenames)} reads '{name}'{advice}")
