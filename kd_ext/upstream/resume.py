"""What tasks and models have to say when training is resumed, or begins from nothing."""

import functools
import glob
import logging
import os

from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer

from kd_ext.errors import ConfigError
from kd_ext.modules.random_state import random_state_kept
from kd_ext.upstream.checkpoints import STRIPPED

logger = logging.getLogger(__name__)


def apply() -> None:
    """Give a task that asks for it (``restores_state``) its saved state back on resume.

    fairseq writes ``task_state`` into every checkpoint, but its trainer never reads it (0.12.2, and git main).
    The state is restored with the optimizer's, and dropped with it under ``--reset-optimizer`` and
    ``--finetune-from-model``.

    What a translation task was trained with is recorded and, before anything of a checkpoint is used, compared: once
    weights are loaded, fairseq reports other dictionaries as another architecture or, if they are as long, not at all.
    A model that may have something against going on (``check_resumed``) is asked as well. fairseq compares no settings:
    that the weights compute what they computed before is seen here, where a run goes on, or a part of it is frozen.

    Where there is no checkpoint fairseq begins from random weights, whatever ``--restore-file`` names, over whatever is
    in ``--save-dir``; and they are no base for what a model freezes (``frozen_by``).
    """
    original, saving = Trainer.load_checkpoint, Trainer.save_checkpoint
    if getattr(original, "_kd_ext", False):
        return

    @functools.wraps(original)
    def load_checkpoint(self, filename, reset_optimizer=False, *args, **kwargs):
        read = checkpoint_utils.load_checkpoint_to_cpu
        found = {}

        def read_and_keep(*read_args, **read_kwargs):
            state = read(*read_args, **read_kwargs)
            found["task_state"] = state.get("task_state", {})
            _check(self, filename, state, resumes=not reset_optimizer)
            return state

        checkpoint_utils.load_checkpoint_to_cpu = read_and_keep
        try:
            extra_state = original(self, filename, reset_optimizer, *args, **kwargs)
        finally:
            checkpoint_utils.load_checkpoint_to_cpu = read
        if extra_state is None:
            _check_random(self, filename)
        if getattr(self.task, "restores_state", False) and extra_state is not None and not reset_optimizer:
            self.task.load_state_dict(_from_rank_0(self, found))
        return extra_state

    @functools.wraps(saving)
    def save_checkpoint(self, filename, extra_state):
        from kd_ext.files import trained_with  # not at the top: models register themselves after every touch

        return saving(self, filename, {**extra_state, trained_with.KEY: trained_with.of_task(self.task)})

    load_checkpoint._kd_ext = True
    Trainer.load_checkpoint, Trainer.save_checkpoint = load_checkpoint, save_checkpoint


def _check(trainer, filename, state, resumes) -> None:
    from kd_ext.files import trained_with
    from kd_ext.models.saved_settings import model_settings

    # without, or with an empty one, fairseq begins at update 0 in mid-data
    has_optimizer = trainer.is_fsdp or any(state.get(name) for name in ("last_optimizer_state", "optimizer"))
    if resumes and (state.get(STRIPPED) or not has_optimizer):
        what = "settings and weights alone" if state.get(STRIPPED) else "no optimizer state"
        raise ConfigError(
            f"{filename}: it has {what}, from which no run can go on; begin from its weights by --finetune-from-model "
            f"{filename} and another --save-dir"
        )
    now = trained_with.of_task(trainer.task)
    if now:
        frozen_by = getattr(trainer.get_model(), "frozen_by", None)
        trained_with.compare(trained_with.recorded(state), now, trainer.task.cfg, resumes, frozen_by)
    check_model = getattr(trainer.get_model(), "check_resumed", None)
    if check_model is not None and resumes:
        check_model(filename, model_settings(state))
    is_frozen = any(not parameter.requires_grad for parameter in trainer.get_model().parameters())
    if (resumes or is_frozen) and not trainer.is_fsdp:  # which may have a part of the weights alone
        _check_function(trainer, filename, state)


def _check_random(trainer, filename) -> None:
    """Nothing was loaded: see that this was asked for, and that no random weights are frozen."""
    cfg, named = trainer.cfg.checkpoint, None
    for name in ("restore_file", "continue_once"):
        if getattr(cfg, name, None) == filename:  # else it is the default, in --save-dir
            named = f"--{name.replace('_', '-')} {filename}: no such file"
    frozen_by = getattr(trainer.get_model(), "frozen_by", None)
    random = "would stay at its initial, random values"
    if frozen_by and named:
        raise ConfigError(f"{named}, and what {frozen_by} freezes {random}; name the base's checkpoint")
    if frozen_by:
        raise ConfigError(
            f"{frozen_by}: there is no checkpoint to begin with, and what is frozen {random}; name that of the base by "
            "--finetune-from-model"
        )
    if named and not _is_to_be_written(filename, cfg.save_dir):
        inside = os.path.join(cfg.save_dir, filename)
        remedy = f"name {inside}" if os.path.isfile(inside) else "name the checkpoint to begin with"
        raise ConfigError(f"{named}; {remedy}, or leave the flag out to begin from random weights")
    if named:
        logger.warning("%s; training begins from random weights", named)


def _is_to_be_written(filename, save_dir) -> bool:
    """Whether a file that is not there is one of a first run: a command that is given again and again names it."""
    folder = os.path.realpath(save_dir)
    in_folder = os.path.dirname(os.path.realpath(filename)) == folder
    return in_folder and not glob.glob(os.path.join(glob.escape(folder), "checkpoint*.pt"))


def _check_function(trainer, filename, state) -> None:
    from kd_ext.models.same_function import Probe, check_same_function
    from kd_ext.models.saved_settings import model_settings

    saved = model_settings(state)
    frozen_by = getattr(trainer.get_model(), "frozen_by", None)
    if frozen_by and not saved:
        raise ConfigError(
            f"{filename}: it has no settings of its model (args or cfg), so nothing tells whether what {frozen_by} "
            "freezes computes here what it was trained to; name a checkpoint that fairseq-train wrote"
        )
    if not saved or not state.get("model"):
        return
    liberally = getattr(trainer.get_model(), "_load_liberally", False)
    probe = Probe(trainer.task, state["model"], _batch_to_compare(trainer.task))
    check_same_function(filename, saved, trainer.cfg.model, liberally, probe)


def _batch_to_compare(task):
    """What a model is given of a few sentences: those of validation are there before anything is loaded."""
    dataset = next(iter(getattr(task, "datasets", {}).values()), None)
    try:
        with random_state_kept():  # some datasets draw what they hide
            numbers = range(min(3, len(dataset)))
            return dataset.collater([dataset[i] for i in numbers])["net_input"]
    except Exception:  # there is none, it is empty, or of another kind
        return None


def _from_rank_0(trainer, found):
    """The state that was read: usually rank 0 alone reads the file, and sends the others what is in it."""
    if trainer.data_parallel_world_size > 1:
        found = distributed_utils.broadcast_object(
            found,
            src_rank=0,
            group=trainer.data_parallel_process_group,
            dist_device=trainer.device,
        )
    return found["task_state"]
