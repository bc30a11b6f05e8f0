"""What tasks and models have to say when training is resumed."""

import functools

from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.tasks.translation import TranslationTask
from fairseq.trainer import Trainer

from kd_ext.saved_settings import model_settings

KEY = "trained_with"


def apply() -> None:
    """Give a task that asks for it (``restores_state``) its saved state back on resume.

    fairseq writes ``task_state`` into every checkpoint, but its trainer never reads it (0.12.2, and git main).
    The state is restored with the optimizer's, and dropped with it under ``--reset-optimizer`` and
    ``--finetune-from-model``. The task is first asked (``check_state``) whether it can go on from there: once weights
    are loaded, other dictionaries are reported as another architecture or, if they are as long, not at all.

    A model that may have something against it (``check_resumed``) is asked as well: fairseq compares no settings. Of
    all other translation tasks the dictionaries are recorded and compared here.
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
        if _restores_state(self.task) and extra_state is not None and not reset_optimizer:
            self.task.load_state_dict(_from_rank_0(self, found))
        return extra_state

    @functools.wraps(saving)
    def save_checkpoint(self, filename, extra_state):
        return saving(self, filename, {**extra_state, KEY: _dictionaries(self.task)})

    load_checkpoint._kd_ext = True
    Trainer.load_checkpoint, Trainer.save_checkpoint = load_checkpoint, save_checkpoint


def _restores_state(task) -> bool:
    return getattr(task, "restores_state", False)


def _check(trainer, filename, state, resumes) -> None:
    from kd_ext.tasks import trained_with  # not at the top: tasks register themselves after every touch is in place

    if _restores_state(trainer.task):
        trainer.task.check_state(state.get("task_state", {}), resumes)
    else:
        saved, now = (state.get("extra_state") or {}).get(KEY, {}), _dictionaries(trainer.task)
        if resumes:
            trained_with.check_same(saved, now, trainer.task.cfg)
        else:
            trained_with.warn_of_other_words(saved, now)
    check_model = getattr(trainer.get_model(), "check_resumed", None)
    if check_model is not None and resumes:
        check_model(filename, model_settings(state))


def _dictionaries(task):
    """Their fingerprints, of a translation task; of others nothing."""
    from kd_ext.tasks import trained_with

    is_translation = isinstance(task, TranslationTask)
    return trained_with.of_dictionaries(task.source_dictionary, task.target_dictionary) if is_translation else {}


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
