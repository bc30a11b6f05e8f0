"""``--torch-compile``: the layers of student and teacher compiled by torch, in training and in translation."""

import functools
import logging
import warnings
from typing import Any

import torch
from fairseq import checkpoint_utils, options
from fairseq.dataclass.configs import CommonConfig
from fairseq.incremental_decoding_utils import FairseqIncrementalState
from fairseq.trainer import Trainer

from kd_ext.errors import ConfigError
from kd_ext.modules.compiled_layers import compile_layers, seconds_spent
from kd_ext.upstream.added_flags import add_switch, fold_into_overrides

logger = logging.getLogger(__name__)

FLAG = "--torch-compile"
OPTION = "torch_compile"


def apply() -> None:
    """Add the switch to every command, and what it does to those that have a model (fairseq 0.12.2, torch >= 2.3).

    A trainer compiles its model, and its criterion's teacher. The commands that use a model learn of the switch by
    ``--model-overrides``. Hydra, which has closed the groups before a plugin is loaded, takes it at the root.
    """
    if OPTION in CommonConfig.__dataclass_fields__:
        return
    add_switch(CommonConfig, OPTION, "let torch compile the layers of the model and of a teacher (torch >= 2.3)")
    _fold_option()
    _compile_loaded_models()
    _compile_trained_model()


def _fold_option() -> None:
    original = options.parse_args_and_arch

    @functools.wraps(original)
    def parse_args_and_arch(*args, **kwargs):
        parsed = original(*args, **kwargs)
        settings = parsed[0] if isinstance(parsed, tuple) else parsed
        if getattr(settings, OPTION, False) and hasattr(settings, "model_overrides"):
            fold_into_overrides(settings, {OPTION: True})
        return parsed

    options.parse_args_and_arch = parse_args_and_arch


def _compile_loaded_models() -> None:
    original = checkpoint_utils.load_model_ensemble_and_task

    @functools.wraps(original)
    def load_model_ensemble_and_task(filenames, arg_overrides=None, *args, **kwargs):
        loaded = original(filenames, arg_overrides, *args, **kwargs)
        if (arg_overrides or {}).get(OPTION) is True:
            _require_compiler()
            for model in loaded[0]:
                _compile(model)
        return loaded

    checkpoint_utils.load_model_ensemble_and_task = load_model_ensemble_and_task


def _compile_trained_model() -> None:
    building, training = Trainer.__init__, Trainer.train_step

    @functools.wraps(building)
    def init(self, cfg, task, model, criterion, *args, **kwargs):
        building(self, cfg, task, model, criterion, *args, **kwargs)
        if not any(getattr(group, OPTION, False) is True for group in (cfg.common, cfg)):
            return
        if getattr(cfg.model, "checkpoint_activations", False):
            raise ConfigError(f"{FLAG}: not with --checkpoint-activations; leave one of the two out")
        _require_compiler()
        _compile(model)
        teacher = getattr(criterion, "teacher", None)
        if hasattr(teacher, "compile_layers"):
            teacher.compile_layers()
        self._kd_ext_compiling = _Announcement()

    @functools.wraps(training)
    def train_step(self, *args, **kwargs):
        logged = training(self, *args, **kwargs)
        if hasattr(self, "_kd_ext_compiling"):
            self._kd_ext_compiling.after_update()
        return logged

    Trainer.__init__, Trainer.train_step = init, train_step


class _Announcement:
    """Says once how long compiling took, when it seems to be over."""

    QUIET_UPDATES = 20

    def __init__(self) -> None:
        self._spent = seconds_spent()
        self._quiet = 0

    def after_update(self) -> None:
        if self._quiet is None:
            return
        spent = seconds_spent()
        self._quiet = self._quiet + 1 if spent == self._spent else 0
        self._spent = spent
        if self._quiet == self.QUIET_UPDATES:
            logger.info("%s: compiling took %.0f seconds", FLAG, spent)
            self._quiet = None


def _compile(model: Any) -> None:
    count = compile_layers(model)
    if count == 0:
        raise ConfigError(f"{FLAG}: a {type(model).__name__} has no layers in its encoder and decoder; leave it out")
    _no_flood()
    _no_states()


@functools.lru_cache(maxsize=None)
def _no_flood() -> None:
    """fairseq shows the messages of every module that are for information; torch's compiler has thousands.

    And each time that it compiles, Python forgets which warnings it has shown.
    """
    for name in ("torch._dynamo", "torch._inductor", "torch._functorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # on a GPU torch 2.11 warns of each product of matrices whose length it does not know yet
    logging.getLogger("torch._inductor.select_algorithm").setLevel(logging.ERROR)
    show, shown = warnings.showwarning, set()

    @functools.wraps(show)
    def showwarning(message, category, filename, lineno, *args, **kwargs):
        warning = str(message), category, filename, lineno
        if warning not in shown:
            shown.add(warning)
            show(message, category, filename, lineno, *args, **kwargs)

    warnings.showwarning = showwarning


@functools.lru_cache(maxsize=None)
def _no_states() -> None:
    """fairseq looks for a name of each layer's own before it sees that there is no incremental state to look it up in.

    So each decoder layer would be compiled by itself.
    """
    original = FairseqIncrementalState.get_incremental_state

    def get_incremental_state(self, incremental_state, key):
        return None if incremental_state is None else original(self, incremental_state, key)

    FairseqIncrementalState.get_incremental_state = functools.wraps(original)(get_incremental_state)


@functools.lru_cache(maxsize=None)
def _require_compiler() -> None:
    """See that torch can compile here: by compiling."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 3):
        raise ConfigError(f"{FLAG}: torch {torch.__version__} is too old; torch >= 2.3, or leave it out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device))
    except Exception as error:  # of torch, of a compiler that is missing, of a Python that it does not know yet
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{FLAG}: torch cannot compile here ({cause}); leave it out") from error
