"""Doing something on the side without a trace in the random numbers that come after."""

import contextlib
import random
from typing import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the generators of Python, numpy and torch (the CPU's and this process's CUDA device's) back at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
