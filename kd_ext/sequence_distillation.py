"""``python -m kd_ext.sequence_distillation``: a training set whose targets are a teacher's translations.

Sequence-level distillation of Kim and Rush (2016). Takes binarized data and the flags of fairseq-generate, and writes
binarized data. Interrupted and started again, it goes on where it was; several processes share the work.
"""

import argparse
import logging
import os
import shutil
import sys
import time
from typing import Iterator, List, Optional, Sequence, Set

from fairseq import utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from tqdm import tqdm

import kd_ext  # noqa: F401  lets fairseq's checkpoints be read
from kd_ext.errors import ConfigError
from kd_ext.processes import work_together
from kd_ext.sequences.flags import parse
from kd_ext.sequences.result import Result, check_sets
from kd_ext.sequences.work import Work
from kd_ext.sequences.work_files import WorkFiles, check_same, take


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Make one set for each folder of the data.

    Raises:
        ConfigError: a flag cannot be used, or a file cannot be read or written
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parse(arguments, __doc__)
    parts = utils.split_paths(args.data)
    places = _places(args)
    check_destination(args.destdir, parts, places)
    missing = [part for part, place in enumerate(places) if not os.path.lexists(place)]
    for part, place in enumerate(places):
        if part not in missing:  # an earlier start made it
            work = _work(args, part)
            check_same(place, {**work.manifest(), **work.later_flags()}, "made")
            print(f"{place}: is there")
    for part in missing:
        _make(arguments, args, part, places[part])
    print(f"train with {':'.join(places)}")


def check_destination(destdir: str, parts: Sequence[str], places: Sequence[str]) -> None:
    """See that nothing is written over, and that there is something to make.

    Args:
        parts: the folders of the data
        places: what is made of each

    Raises:
        ConfigError: it is there, or is or holds the data
    """
    real = os.path.realpath(destdir)
    for part in parts:
        if real == os.path.realpath(part) or os.path.realpath(part).startswith(real + os.sep):
            raise ConfigError(f"--destdir {destdir}: it holds the data that is read; name another folder")
    if all(map(os.path.lexists, places)) or (os.path.lexists(destdir) and not os.path.isdir(destdir)):
        raise ConfigError(f"--destdir {destdir}: is there; name a folder that is not, or remove it")


def _make(arguments: List[str], args: argparse.Namespace, part: int, place: str) -> None:
    started = time.time()
    work = _work(args, part)
    check_sets(work)
    manifest = work.manifest()  # before anything is made: a flag may be wrong
    being_made = f"{place}.part"
    take(being_made)
    if os.path.lexists(place):  # another start has ended in the meantime
        shutil.rmtree(being_made)
        raise ConfigError(f"--destdir {place}: is there; name a folder that is not, or remove it")
    files = WorkFiles(being_made, manifest)
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
    result.check()  # what is translated stays: with another --min-score the command goes on from there
    result.write(os.path.join(being_made, "data"), {**manifest, **work.later_flags()})
    # in one step, without what the work left
    os.rename(os.path.join(being_made, "data"), place)
    shutil.rmtree(being_made)
    print(result.table(time.time() - started))


def _translate(
    arguments: List[str],
    args: argparse.Namespace,
    part: int,
    work: Work,
    files: WorkFiles,
    done: Set[int],
    sentences: int,
) -> None:
    shown = {"unit": "sentence", "desc": files.folder, "disable": args.no_progress_bar}
    with tqdm(total=len(work.dataset), initial=sentences, **shown) as bar:
        own = _write(work, files, 0, args.processes, done)
        work_together(args.processes, own, _help, (arguments, part, done), bar)


def _help(index: int, arguments: List[str], part: int, done: Set[int]) -> Iterator[int]:
    """What a process but the first does."""
    args = parse(arguments, __doc__)
    work = _work(args, part)
    return _write(work, WorkFiles.of(f"{_places(args)[part]}.part"), index, args.processes, done)


def _write(work: Work, files: WorkFiles, index: int, processes: int, done: Set[int]) -> Iterator[int]:
    """Translate one process's part; gives the number of sentences of each batch."""
    writer = files.writer()
    for number, content in work.run(index, processes, done):
        writer.write(number, content)
        yield len(content)


def _work(args: argparse.Namespace, part: int) -> Work:
    return Work(convert_namespace_to_omegaconf(args), args, part)


def _places(args: argparse.Namespace) -> List[str]:
    """The folder that is made of each part of the data."""
    parts = len(utils.split_paths(args.data))
    return [args.destdir] if parts == 1 else [os.path.join(args.destdir, str(i)) for i in range(parts)]


if __name__ == "__main__":
    main()
