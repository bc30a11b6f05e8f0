"""``python -m kd_ext.sequence_distillation``: a training set whose targets are a teacher's translations.

Sequence-level distillation of Kim and Rush (2016). Takes binarized data and the flags of fairseq-generate, and writes
binarized data. Interrupted and started again, it goes on where it was; several processes share the work.
"""

import argparse
import logging
import multiprocessing
import os
import shutil
import sys
import time
from typing import Any, List, Optional, Sequence

from fairseq import options as fairseq_options
from fairseq import utils
from fairseq.data import data_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from tqdm import tqdm

import kd_ext  # noqa: F401  lets fairseq's checkpoints be read
from kd_ext.errors import ConfigError
from kd_ext.sequences.choosing import CHOICES, CLOSENESS
from kd_ext.sequences.result import Result, check_sets
from kd_ext.sequences.work import Work
from kd_ext.sequences.work_files import WorkFiles, take
from kd_ext.upstream import torch_compile
from kd_ext.upstream.added_flags import unfold
from kd_ext.upstream.command_line import list_alone

TASK = "translation_with_kd"
_OWN = ("destdir", "subset", "processes", "choose", "closest-by", "with-references", "max-ratio", "min-score")
_OWN += ("rescore", "drop-worst", "teacher-user-dir", "kd-language-tag", "kd-language-tags", "kd-language-side")
_OF_GENERATE = {  # flags of fairseq-generate that would do nothing here, and what to do
    "gen_subset": "this command's flag is --subset",
    "nbest": "what is chosen from are all of --beam; leave it out",
    "num_shards": "--processes share the work; leave it out",
    "score_reference": "translations are made here, none is scored; leave it out",
    "constraints": "no sentence here has constraints; leave it out",
    "lm_path": "the teacher alone translates here; leave it out",
    "replace_unk": "targets are words of the dictionary; leave it out",
}
# the flags of a teacher in training, as this command has them
_NAMES = {"--teacher-checkpoint-path": "--path", "--teacher-model-overrides": "--model-overrides"}


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Make one set for each folder of the data.

    Raises:
        ConfigError: a flag cannot be used, or a file cannot be read or written
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        _main(arguments)
    except ConfigError as error:
        text = str(error)
        for of_training, own in _NAMES.items():
            text = text.replace(of_training, own)
        raise ConfigError(text) from error


def _main(arguments: List[str]) -> None:
    args = parse(arguments)
    parts = utils.split_paths(args.data)
    places = _places(args)
    check_destination(args.destdir, parts)
    for part, place in enumerate(places):
        if os.path.isdir(place):  # of several, one that an earlier start made
            print(f"{place}: is there")
            continue
        _make(arguments, args, part, place)
    print(f"train with {':'.join(places)}")


def check_destination(destdir: str, parts: Sequence[str]) -> None:
    """See that nothing is written over.

    Raises:
        ConfigError: it is there, or is or holds the data
    """
    real = os.path.realpath(destdir)
    for part in parts:
        if real == os.path.realpath(part) or os.path.realpath(part).startswith(real + os.sep):
            raise ConfigError(f"--destdir {destdir}: it holds the data that is read; name another folder")
    if os.path.lexists(destdir) and (len(parts) == 1 or not os.path.isdir(destdir)):
        raise ConfigError(f"--destdir {destdir}: is there; name a folder that is not, or remove it")


def _make(arguments: List[str], args: argparse.Namespace, part: int, place: str) -> None:
    started = time.time()
    work = Work(convert_namespace_to_omegaconf(args), args, part)
    check_sets(work)
    being_made = f"{place}.part"
    take(being_made)
    if os.path.lexists(place):  # another start has ended in the meantime
        shutil.rmtree(being_made)
        raise ConfigError(f"--destdir {place}: is there; name a folder that is not, or remove it")
    files = WorkFiles(being_made, work.manifest())
    done = {number for number, _ in files.lines()}
    sentences = sum(len(work.batches[number]) for number in done)
    if done:
        print(f"{being_made}: {sentences} sentences are translated already")
    try:
        _translate(arguments, args, part, work, files, done, sentences)
    except BaseException:
        if next(files.lines(), None) is None:  # nothing to go on with: a flag may be wrong
            shutil.rmtree(being_made, ignore_errors=True)
        raise
    result = Result(work, files)
    result.write(os.path.join(being_made, "data"))
    # in one step, without what the work left
    os.rename(os.path.join(being_made, "data"), place)
    shutil.rmtree(being_made)
    print(result.table(time.time() - started))


def _translate(
    arguments: List[str], args: argparse.Namespace, part: int, work: Work, files: WorkFiles, done: Any, sentences: int
) -> None:
    context = multiprocessing.get_context("spawn")
    counter = context.Value("l", sentences)
    others = [
        context.Process(target=_help, args=(arguments, part, i, sorted(done), counter, os.getpid()))
        for i in range(1, args.processes)
    ]
    for process in others:
        process.start()
    try:
        with tqdm(total=len(work.dataset), unit="sentence", desc=files.folder, initial=sentences) as bar:
            writer = files.writer()
            for number, content in work.run(0, args.processes, done):
                writer.write(number, content)
                with counter.get_lock():
                    counter.value += len(content)
                bar.update(counter.value - bar.n)
            while any(process.is_alive() for process in others):
                time.sleep(0.2)
                bar.update(counter.value - bar.n)
            bar.update(counter.value - bar.n)
    finally:
        for process in others:
            process.terminate()
            process.join()
    if any(process.exitcode != 0 for process in others):
        raise ConfigError(f"--processes {args.processes}: one of them failed; run the command again to go on")


def _help(arguments: List[str], part: int, index: int, done: List[int], counter: Any, parent: int) -> None:
    """What a process but the first does, while that is there; an error of it is said as any other."""
    try:
        args = parse(arguments)
        work = Work(convert_namespace_to_omegaconf(args), args, part)
        writer = WorkFiles.of(f"{_places(args)[part]}.part").writer()
        for number, content in work.run(index, args.processes, set(done)):
            writer.write(number, content)
            with counter.get_lock():
                counter.value += len(content)
            if os.getppid() != parent:  # it was killed
                sys.exit(1)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def _places(args: argparse.Namespace) -> List[str]:
    """The folder that is made of each part of the data."""
    parts = len(utils.split_paths(args.data))
    return [args.destdir] if parts == 1 else [os.path.join(args.destdir, str(i)) for i in range(parts)]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags of fairseq-generate and this command's own.

    Raises:
        ConfigError: one is missing or out of range
    """
    parser = fairseq_options.get_generation_parser(default_task=TASK)
    parser.prog, parser.description = "python -m kd_ext.sequence_distillation", __doc__
    parser.add_argument("--destdir", metavar="DIR", help="the folder to make")
    parser.add_argument("--subset", default="train", metavar="NAME", help="the set to translate")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="each on a GPU of its own")
    parser.add_argument("--choose", default="best", choices=CHOICES, help="what is taken of the n-best")
    parser.add_argument("--closest-by", default="chrf", choices=CLOSENESS, help="to the reference, a sentence")
    parser.add_argument("--with-references", action="store_true", help="add the pairs of the data themselves")
    parser.add_argument("--max-ratio", type=float, default=9.0, metavar="R", help="of the tokens of the two sides")
    parser.add_argument("--min-score", type=float, metavar="S", help="drop translations with a lower score")
    parser.add_argument("--rescore", metavar="PATH", help="a model of the reverse direction")
    parser.add_argument("--drop-worst", type=float, default=0.0, metavar="SHARE", help="by --rescore's scores")
    parser.add_argument("--teacher-user-dir", metavar="DIR", help="as for fairseq-train")
    list_alone(parser, [f"--{name}" for name in _OWN])
    args = fairseq_options.parse_args_and_arch(parser, list(arguments))
    for flag in ("path", "destdir"):
        if not getattr(args, flag):
            raise ConfigError(f"--{flag} is missing: the {'teacher' if flag == 'path' else 'folder to make'}")
    args.destdir = args.destdir.rstrip(os.sep) or os.sep
    unfold(args, ("bf16", torch_compile.OPTION))
    _refuse_unused(args, parser)
    if args.processes < 1:
        raise ConfigError(f"--processes {args.processes}: out of range; a number over 0")
    if args.beam < 1:
        raise ConfigError(f"--beam {args.beam}: out of range; a number over 0")
    if args.prefix_size < 0:
        raise ConfigError(f"--prefix-size {args.prefix_size}: out of range; 0 for none")
    if args.min_score is not None and args.min_score != args.min_score:
        raise ConfigError(f"--min-score {args.min_score}: not a number to compare scores with; such as -2.5")
    try:
        data_utils.post_process("", args.post_process)
    except NotImplementedError:
        raise ConfigError(
            f"--post-process {args.post_process}: unknown to fairseq; such as sentencepiece, or subword_nmt"
        ) from None
    if not args.max_ratio >= 1:
        raise ConfigError(f"--max-ratio {args.max_ratio}: out of range; a number from 1 on")
    if not 0 <= args.drop_worst < 1:
        raise ConfigError(f"--drop-worst {args.drop_worst}: out of range; a share from 0 to under 1")
    if args.drop_worst and not args.rescore:
        raise ConfigError(f"--drop-worst {args.drop_worst}: by which scores? name a model by --rescore")
    if args.rescore and not args.drop_worst:
        raise ConfigError(f"--rescore {args.rescore}: nothing is dropped; say which share by --drop-worst")
    if args.task != TASK:
        raise ConfigError(f"--task {args.task}: the data is read as by translation; leave the flag out")
    for name in ("max_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: out of range; a number over 0")
    if args.sampling_topp > 1:
        raise ConfigError(f"--sampling-topp {args.sampling_topp}: out of range; a share of the probability")
    if args.max_len_a == 0 and args.max_len_b < args.min_len:
        raise ConfigError(f"--max-len-b {args.max_len_b}: under --min-len {args.min_len}; no translation would do")
    if args.max_tokens is None and args.batch_size is None:
        args.max_tokens = 4000
    return args


def _refuse_unused(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    for name, remedy in _OF_GENERATE.items():
        value = getattr(args, name)
        if value != parser.get_default(name):
            shown = "" if value is True else f" {value}"
            raise ConfigError(f"--{name.replace('_', '-')}{shown}: not used here; {remedy}")


if __name__ == "__main__":
    main()
