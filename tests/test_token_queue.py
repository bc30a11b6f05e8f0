"""The FIFO queue against a deque, and its gate against sorting."""

import random
from collections import deque
from decimal import ROUND_CEILING, Decimal

import pytest
import torch

from kd_ext.modules.token_queue import TokenQueue, selection_size


@pytest.mark.parametrize("capacity", [1, 7, 64])
@pytest.mark.parametrize("seed", range(5))
def test_is_a_fifo_of_exactly_the_newest(capacity, seed):
    """Defect 9: never a value more, never one fewer once filled; a batch larger than the queue leaves its newest."""
    rng = random.Random(seed)
    queue, newest = TokenQueue(capacity), deque(maxlen=capacity)
    for _ in range(60):
        values = torch.randn(rng.choice([0, 1, 3, 10, 100]))
        queue.push(values)
        newest.extend(values.tolist())
        assert len(queue) == len(newest)
        assert queue.values().tolist() == list(newest)
        if rng.random() < 0.5:
            queue.commit()
        if newest:
            k = rng.randint(1, len(newest))
            rate = k / len(newest)
            size = int((Decimal(repr(rate)) * len(newest)).to_integral_value(ROUND_CEILING))
            assert queue.gate(rate).item() == sorted(newest, reverse=True)[size - 1]


@pytest.mark.parametrize("seed", range(10))
def test_rollback_restores_the_last_commit(seed):
    rng = random.Random(seed)
    queue, newest = TokenQueue(20), deque(maxlen=20)
    for _ in range(40):
        pushed = [torch.randn(rng.choice([0, 2, 15, 50])) for _ in range(rng.randint(1, 4))]
        for values in pushed:
            queue.push(values)
        if rng.random() < 0.5:
            queue.commit()
            for values in pushed:
                newest.extend(values.tolist())
        else:
            queue.rollback()
        assert queue.values().tolist() == list(newest)


def test_from_values_keeps_the_newest():
    assert TokenQueue.from_values(3, torch.arange(5.0)).values().tolist() == [2, 3, 4]
    assert TokenQueue.from_values(9, torch.arange(5.0)).values().tolist() == [0, 1, 2, 3, 4]


def test_values_are_kept_in_float32():
    queue = TokenQueue(4)
    queue.push(torch.tensor([1.5], dtype=torch.float16))
    assert queue.values().dtype == torch.float32


def test_selection_size_is_exact():
    assert selection_size(0.07, 100) == 7  # 0.07 * 100 is 7.000000000000001 in floating point
    assert selection_size(1.0, 13) == 13
    assert selection_size(0.001, 5) == 1
    for pool in (1, 9, 10, 11, 1000):
        for rate in (0.1, 0.3, 0.55, 1 / 3):
            exact = int((Decimal(repr(rate)) * pool).to_integral_value(ROUND_CEILING))
            assert selection_size(rate, pool) == exact
