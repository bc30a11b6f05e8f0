"""``python -m kd_ext.teacher_cache``: fill a teacher's cache before anything is trained.

Takes the flags of fairseq-train, of which those of data, batches, teacher and cache count. Interrupted and started
again, it goes on where it was; what is damaged is asked for again.
"""

import argparse
import logging
import sys
from collections import defaultdict
from typing import Any, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from fairseq import options, utils
from fairseq.data import iterators
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from tqdm import tqdm

import kd_ext  # noqa: F401  registers the task and its criterion
from kd_ext.criterions.label_smoothed_cross_entropy_with_kd import check_temperature
from kd_ext.errors import ConfigError
from kd_ext.processes import work_together
from kd_ext.tasks.translation_with_kd import CRITERION, TranslationWithKDTask
from kd_ext.teachers.by_language import SplitByTeacher
from kd_ext.upstream.command_line import list_alone

logger = logging.getLogger("kd_ext.teacher_cache")  # as __main__ too

TASK = "translation_with_kd"


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Fill the cache with as many processes as asked for.

    Raises:
        ConfigError: a flag cannot be used
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = _parse(arguments)
    filling = _fill(args, 0)
    total, _ = next(filling)  # the files are there now, and everything is checked
    with tqdm(total=total, unit="sentence", desc=args.teacher_cache_dir) as bar:
        own = (count for bar.total, count in filling)
        work_together(args.processes, own, _help, (arguments,), bar)
    logger.info("%s: %d sentences are there", args.teacher_cache_dir, bar.n)


def _parse(arguments: List[str]) -> argparse.Namespace:
    parser = options.get_training_parser(default_task=TASK)
    parser.prog, parser.description = "python -m kd_ext.teacher_cache", __doc__
    parser.set_defaults(criterion=CRITERION, arch="transformer")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="each loads the teacher, each on a GPU of its own"
    )
    teacher = ("checkpoint-path", "model-overrides", "user-dir", "ema", "dtype", "cache-dir", "cache-top-k")
    tags = ("--kd-language-tag", "--kd-language-tags", "--kd-language-side")
    list_alone(parser, ["--processes", *(f"--teacher-{name}" for name in teacher), "--kd-temperature", *tags])
    args = options.parse_args_and_arch(parser, arguments)
    if args.task != TASK or args.criterion != CRITERION:
        raise ConfigError(f"--task {args.task} --criterion {args.criterion}: use --task {TASK} --criterion {CRITERION}")
    check_temperature(args.kd_temperature)
    if args.processes < 1:
        raise ConfigError(f"--processes {args.processes}: out of range; a number over 0")
    for flag in ("teacher_cache_dir", "teacher_checkpoint_path"):
        if not getattr(args, flag):
            raise ConfigError(f"--{flag.replace('_', '-')} is missing: nothing can be filled without it")
    if args.max_tokens is None and args.batch_size is None:
        raise ConfigError("--max-tokens is missing: how much the teacher is asked at once, in tokens")
    return args


def _help(index: int, arguments: List[str]) -> Iterator[int]:
    """What a process but the first does."""
    for _, count in _fill(_parse(arguments), index):
        yield count


def _fill(args: argparse.Namespace, index: int) -> Iterator[Tuple[int, int]]:
    """Fill one process's part.

    Gives the number of sentences in all, and of those done: 0 as soon as all is checked, then those of each batch.
    """
    cfg = convert_namespace_to_omegaconf(args)
    use_cuda = torch.cuda.is_available() and not cfg.common.cpu
    if use_cuda:
        torch.cuda.set_device(index % torch.cuda.device_count())
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // args.processes))
    task = TranslationWithKDTask.setup_task(cfg.task)
    cache = task.open_cache(cfg.criterion.kd_temperature, mends=True)
    dtype = torch.half if use_cuda and cfg.common.fp16 else torch.bfloat16 if cfg.common.bf16 else torch.float32
    cache.place(torch.device("cuda" if use_cuda else "cpu"), task.teacher_dtype(dtype))
    if getattr(cfg.common, "torch_compile", False):
        cache.compile_layers()
    total = 0
    for epoch in range(1, 1 + len(utils.split_paths(cfg.task.data))):  # fairseq reads one part of the data an epoch
        batches = _batches(task, cfg, epoch, index, args.processes)
        total += sum(map(len, batches.frozen_batches))
        yield total, 0
        for sample in _samples(batches, task.split, cfg, index, args.processes):
            if sample:
                cache.mend(utils.move_to_cuda(sample) if use_cuda else sample)
                yield total, len(sample["id"])


def _batches(task: TranslationWithKDTask, cfg: Any, epoch: int, index: int, processes: int) -> Any:
    subset = cfg.dataset.train_subset
    task.load_dataset(subset, epoch=epoch, combine=True)
    batches = task.get_batch_iterator(
        task.dataset(subset),
        max_tokens=cfg.dataset.max_tokens,
        max_sentences=cfg.dataset.batch_size,
        max_positions=utils.resolve_max_positions(task.max_positions(), cfg.dataset.max_tokens),
        ignore_invalid_inputs=True,
        required_batch_size_multiple=cfg.dataset.required_batch_size_multiple,
        num_shards=processes,
        shard_id=index,
        num_workers=cfg.dataset.num_workers,
        epoch=epoch,
    )
    task.begin_epoch(epoch, None)
    return batches


def _samples(batches: Any, split: Optional[SplitByTeacher], cfg: Any, index: int, processes: int) -> Iterator[Any]:
    """A process's batches: of several teachers' sentences those of one after those of another, which comes for them."""
    if split is None:
        yield from batches.next_epoch_itr(shuffle=False)
        return
    dataset, of_teachers = batches.dataset, defaultdict(list)
    for batch in tqdm(batches.frozen_batches[index::processes], desc="which teacher's", leave=False, delay=2):
        sample = dataset.collater([dataset[i] for i in batch])
        for number, teacher in zip(sample["id"].tolist(), split.of_sentences(sample)):
            of_teachers[teacher].append(number)
    for _, sentences in sorted(of_teachers.items()):
        of_one = dataset.batch_by_size(
            np.array(sentences),
            max_tokens=cfg.dataset.max_tokens,
            max_sentences=cfg.dataset.batch_size,
            required_batch_size_multiple=cfg.dataset.required_batch_size_multiple,
        )
        yield from iterators.EpochBatchIterator(
            dataset, dataset.collater, of_one, num_workers=cfg.dataset.num_workers
        ).next_epoch_itr(shuffle=False)


if __name__ == "__main__":
    main()
