"""Restoring a task's state when training is resumed."""

import functools

from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer


def apply() -> None:
    """Give a task that asks for it (``restores_state``) its saved state back on resume.

    fairseq writes ``task_state`` into every checkpoint, but its trainer never reads it (0.12.2, and git main).
    The state is restored with the optimizer's, and dropped with it under ``--reset-optimizer`` and
    ``--finetune-from-model``. The task is first asked (``check_state``) whether it can go on from there: once weights
    are loaded, other dictionaries are reported as another architecture or, if they are as long, not at all.
    """
    original = Trainer.load_checkpoint
    if getattr(original, "_kd_ext", False):
        return

    @functools.wraps(original)
    def load_checkpoint(self, filename, reset_optimizer=False, *args, **kwargs):
        if not getattr(self.task, "restores_state", False):
            return original(self, filename, reset_optimizer, *args, **kwargs)
        read = checkpoint_utils.load_checkpoint_to_cpu
        found = {}

        def read_and_keep(*read_args, **read_kwargs):
            state = read(*read_args, **read_kwargs)
            found["task_state"] = state.get("task_state", {})
            self.task.check_state(found["task_state"], resumes=not reset_optimizer)
            return state

        checkpoint_utils.load_checkpoint_to_cpu = read_and_keep
        try:
            extra_state = original(self, filename, reset_optimizer, *args, **kwargs)
        finally:
            checkpoint_utils.load_checkpoint_to_cpu = read
        if extra_state is not None and not reset_optimizer:
            self.task.load_state_dict(_from_rank_0(self, found))
        return extra_state

    load_checkpoint._kd_ext = True
    Trainer.load_checkpoint = load_checkpoint


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
