"""A checkpoint that cannot be read is an error of one line, for every command."""

import functools
import glob
import os
import traceback
from typing import Optional

from fairseq import checkpoint_utils
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY

from kd_ext.errors import ConfigError, in_short
from kd_ext.files.reading import explained
from kd_ext.files.safe_loading import load
from kd_ext.overrides import FLAG, typed_overrides

EXPECTED = "checkpoint of fairseq"


def apply() -> None:
    """Say what is wrong with a checkpoint, and which one could be used (fairseq 0.12.2, every torch).

    fairseq passes on what ``torch.load`` raises: for a type that is not listed a page of advice to load the file
    unsafely, for damage any exception, and for a changed weight none at all. So it does with whatever comes of settings
    of the wrong type, or that do not go with the weights.
    """
    original = checkpoint_utils.load_checkpoint_to_cpu
    if getattr(original, "_kd_ext", False):
        return

    from kd_ext.files.model_settings import check_model_settings  # models register themselves after every touch
    from kd_ext.models.saved_settings import model_settings

    @functools.wraps(original)
    def load_checkpoint_to_cpu(path, *args, **kwargs):
        try:
            with explained(path, EXPECTED):
                state = original(path, *args, **kwargs)
                check_model_settings(path, model_settings(state), state.get("model"))
                return state
        except ConfigError as error:
            _check_architecture(path)
            if (typed := typed_overrides()) and _is_whole(path):
                raise ConfigError(f"{FLAG} {typed}: {error}; give other values") from error
            whole = _newest_whole_beside(path)
            advice = f"the newest whole one beside it is {whole}" if whole else "beside it is no whole checkpoint*.pt"
            raise ConfigError(f"{error}; {advice}") from error

    load_checkpoint_to_cpu._kd_ext = True
    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu
    checkpoint_utils.load_model_ensemble_and_task = _building(checkpoint_utils.load_model_ensemble_and_task)


def _building(original):
    @functools.wraps(original)
    def load_model_ensemble_and_task(filenames, *args, **kwargs):
        try:
            return original(filenames, *args, **kwargs)
        except OSError as error:
            if str(error).startswith("Model file not found"):  # of fairseq's own making
                raise ConfigError(
                    f"{':'.join(filenames)}: {error}; name a checkpoint that fairseq-train wrote"
                ) from error
            raise
        except (ConfigError, MemoryError):  # the latter is no fault of the file
            raise
        except Exception as error:
            if "allocate memory" in str(error) or "out of memory" in str(error):
                raise
            for path in filenames:
                _check_architecture(path)
            if str(error).startswith("Neither args nor cfg exist"):
                raise ConfigError(
                    f"{':'.join(filenames)}: no settings of a model (args or cfg) beside the weights; name a "
                    "checkpoint that fairseq-train wrote"
                ) from error
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = in_short(error)
            made_of = f"settings, {FLAG} {typed_overrides()}, and" if typed_overrides() else "settings and"
            raise ConfigError(
                f"{':'.join(filenames)}: no model can be made of its {made_of} weights ({type(error).__name__}: "
                f"{said}; {os.path.basename(place.filename)}, line {place.lineno})"
            ) from error

    return load_model_ensemble_and_task


def _is_whole(path: str) -> bool:
    """Whether a file's own settings, without any that are typed, can be those of its weights."""
    from kd_ext.files.model_settings import check_model_settings
    from kd_ext.models.saved_settings import model_settings

    try:
        with explained(path, EXPECTED):
            state = load(path)
            check_model_settings(path, model_settings(state), state.get("model"))
    except ConfigError:
        return False
    return True


def _check_architecture(path: str) -> None:
    """Name an architecture that is not registered: fairseq ends with a KeyError, of that or of something else."""
    from kd_ext.models.saved_settings import get, model_settings

    try:
        with explained(path, EXPECTED):
            settings = model_settings(load(path))
    except ConfigError:  # that is said elsewhere
        return
    names = [name for name in (get(settings, "_name"), get(settings, "arch")) if isinstance(name, str)]
    name = names[0] if names else None
    if name is not None and name not in {**MODEL_REGISTRY, **ARCH_MODEL_REGISTRY}:
        raise ConfigError(
            f"{path}: its architecture '{name}' is not registered; name the folder that registers it by --user-dir (of "
            "a teacher by --teacher-user-dir); one that also does `import kd_ext` has this plugin with it"
        )


def _newest_whole_beside(damaged: str) -> Optional[str]:
    """The checkpoint in the same folder that was written last, of those that can be read."""
    paths = glob.glob(os.path.join(glob.escape(os.path.dirname(damaged)), "checkpoint*.pt"))
    others = [path for path in paths if os.path.isfile(path) and not os.path.samefile(path, damaged)]
    for path in sorted(others, key=os.path.getmtime, reverse=True):
        try:
            with explained(path, EXPECTED):
                load(path)
        except ConfigError:
            continue
        return path
    return None
