"""Workers on several machines that find different files under the same names."""

import functools
import os
import socket
import zlib
from typing import Any, Dict, NamedTuple

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from kd_ext.errors import ConfigError


class _Found(NamedTuple):
    """What a worker finds under a name.

    Attributes:
        flag: where the name was given
        value: what must be the same for all workers
        remedy: what would make it so
    """

    flag: str
    value: str
    remedy: str


def apply() -> None:
    """Compare, before the first update, what the workers have found where their flags point (fairseq 0.12.2).

    Every worker looks for the checkpoint itself, rank 0 reads it, and all that saw one wait for what it holds: where
    each machine has a --save-dir of its own, a run that is started again waits for ever. Data, dictionaries and
    teachers are read by every worker, and nobody would notice that a machine has older ones: its gradients are of
    other words, or of sentences that another worker has as well.
    """
    original = checkpoint_utils.load_checkpoint
    if getattr(original, "_kd_ext_compares", False):
        return

    @functools.wraps(original)
    def load_checkpoint(cfg, trainer, **kwargs):
        workers = getattr(trainer, "data_parallel_world_size", 1)  # fairseq itself takes any trainer here, a mock too
        # parts of a model, or of its state, have files of their own
        is_compared = isinstance(workers, int) and workers > 1 and not trainer.checkpoint_suffix and not trainer.tpu
        if is_compared:
            _compare(trainer, {**_checkpoints(cfg), **_trained_with(trainer.task)})
        loaded = original(cfg, trainer, **kwargs)
        if is_compared:
            _compare(trainer, _data(trainer))  # which is there only now
        return loaded

    load_checkpoint._kd_ext_compares = True
    checkpoint_utils.load_checkpoint = load_checkpoint


def _checkpoints(cfg: Any) -> Dict[str, _Found]:
    found = {}
    for flag, folder, name in (
        ("--save-dir", cfg.save_dir, "checkpoint_last.pt"),
        ("--restore-file", "", cfg.restore_file),
        ("--finetune-from-model", "", cfg.finetune_from_model),
    ):
        if name and (folder or name != "checkpoint_last.pt"):
            is_there = PathManager.exists(os.path.join(folder, name))
            remedy = "name one that all machines share, or copy that checkpoint to each"
            value = f"{os.path.basename(name)} {'is' if is_there else 'is not'} there"
            found[flag] = _Found(f"{flag} {folder or name}", value, remedy)
    return found


def _trained_with(task: Any) -> Dict[str, _Found]:
    from kd_ext.files import trained_with  # not at the top: models register themselves after every touch

    found = {}
    for what, value in trained_with.of_task(task).items():
        if what == trained_with.TEACHER:
            path, cache = task.cfg.teacher_checkpoint_path, task.cfg.teacher_cache_dir
            flag = f"--teacher-checkpoint-path {path}" if path else f"--teacher-cache-dir {cache}"
            remedy = "give every machine the same teacher"
        else:
            flag, remedy = task.cfg.data, "give every machine the same data"
        found[what] = _Found(flag, f"{what} {value}", remedy)
    return found


def _data(trainer: Any) -> Dict[str, _Found]:
    dataset = trainer.task.datasets.get(trainer.cfg.dataset.train_subset)
    if not _trained_with(trainer.task) or getattr(dataset, "sizes", None) is None:
        return {}
    lengths = zlib.crc32(np.ascontiguousarray(dataset.sizes).tobytes())
    value = f"{len(dataset)} training sentences, their lengths {lengths:08x}"
    return {"data": _Found(trainer.task.cfg.data, value, "give every machine the same data")}


def _compare(trainer: Any, found: Dict[str, _Found]) -> None:
    """Raise on every worker what differs, so that none of them waits for another."""
    mine = socket.gethostname(), {name: each.value for name, each in found.items()}
    of_workers = [None] * trainer.data_parallel_world_size
    torch.distributed.all_gather_object(of_workers, mine, group=trainer.data_parallel_process_group)
    first_host, first = of_workers[0]
    for worker, (host, values) in enumerate(of_workers):
        for name, each in found.items():
            if values.get(name) != first.get(name):
                raise ConfigError(
                    f"{each.flag}: not the same for all workers ({first_host}, worker 0: {first.get(name)}; "
                    f"{host}, worker {worker}: {values.get(name)}); {each.remedy}"
                )
