"""Work on sentences that several processes share, with one progress bar."""

import multiprocessing
import os
import sys
import time
from typing import Any, Callable, Iterator, Tuple

from tqdm import tqdm

from kd_ext.errors import ConfigError


def work_together(
    processes: int, own: Iterator[int], help_: Callable[..., Iterator[int]], arguments: Tuple[Any, ...], bar: tqdm
) -> None:
    """Do this process's part while others do theirs.

    Args:
        processes: how many, this one among them
        own: this one's part; gives the number of sentences that were done since it last gave one
        help_: gives ``help_(i, *arguments)``, the part of the process `i` from 1 on, which does it in the same way
        arguments: of `help_`, to be pickled
        bar: counts the sentences; what it begins with was done before

    Raises:
        ConfigError: one of the others failed, and has said why
    """
    context = multiprocessing.get_context("spawn")
    done = context.Value("l", bar.n)
    inherited = (done, os.getpid(), multiprocessing.get_start_method(), help_)
    others = [context.Process(target=_help, args=(*inherited, i, *arguments)) for i in range(1, processes)]
    for process in others:
        process.start()
    try:
        for count in own:
            with done.get_lock():
                done.value += count
            bar.update(done.value - bar.n)
        while any(process.is_alive() for process in others):
            time.sleep(0.2)
            bar.update(done.value - bar.n)
        bar.update(done.value - bar.n)
    finally:
        for process in others:
            process.terminate()
            process.join()
    if any(process.exitcode != 0 for process in others):
        raise ConfigError(f"--processes {processes}: one of them failed; run the command again to go on")


def _help(done: Any, parent: int, loaders: str, help_: Callable[..., Iterator[int]], *arguments: Any) -> None:
    """A part, for as long as the first process is there; an error of it is said as any other."""
    try:
        # Those that load batches are started as the first process's are. A spawned process would spawn them: each of
        # them imports all of fairseq, whose locks it leaves behind when it is ended.
        multiprocessing.set_start_method(loaders, force=True)
        for count in help_(*arguments):
            with done.get_lock():
                done.value += count
            if os.getppid() != parent:  # it was killed
                sys.exit(1)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
