"""The k-th largest of a queue's content, against sorting."""

import numpy as np
import pytest
import torch

from kd_ext.modules.running_rank import RunningRank, kth_largest


@pytest.fixture
def searches(monkeypatch):
    """How often all values were searched."""
    made = []
    search = RunningRank._among_all

    def counted(self, array, k):
        made.append(k)
        return search(self, array, k)

    monkeypatch.setattr(RunningRank, "_among_all", counted)
    return made


def test_kth_largest_with_ties():
    values = torch.tensor([3.0, 1.0, 3.0, 2.0])
    assert [kth_largest(values, k).item() for k in (1, 2, 3, 4)] == [3, 3, 2, 1]


@pytest.mark.parametrize("size", [1, 5, 300, 20_000])
@pytest.mark.parametrize("make", [torch.rand, lambda n: torch.randint(4, (n,)).float()], ids=["distinct", "ties"])
def test_it_is_exact_while_the_values_change(size, make):
    torch.manual_seed(size)
    values, rank = make(size), RunningRank()
    for turn in range(40):
        values = values.roll(7)
        values[:7] = make(7)[:size] + 0.1 * turn  # they grow
        k = [max(1, size // 2), 1, size][0 if turn < 30 else turn % 3]
        found = rank(values, k)
        assert found.dtype == torch.float32
        assert found.item() == sorted(values.tolist(), reverse=True)[k - 1]


def test_all_values_are_seldom_searched(searches):
    torch.manual_seed(0)
    values, rank = torch.rand(20_000), RunningRank()
    for _ in range(50):
        values = values.roll(40)
        values[:40] = torch.rand(40)
        assert rank(values, 10_000) == values.sort().values[10_000]
    assert len(searches) == 1
    values += 1  # out of the window
    assert rank(values, 10_000) == values.sort().values[10_000]
    assert len(searches) == 2


def test_nan_is_larger_than_any_number():
    values, rank = torch.arange(200.0), RunningRank()
    assert rank(values, 100) == 100
    values[:3] = float("nan")
    assert rank(values, 100) == np.sort(values.numpy())[100] == 103
    assert all(rank(values, k).isnan() for k in (1, 2, 3))
    assert rank(values, 4) == 199
    values[3] = float("inf")
    assert rank(values, 4) == float("inf")
    assert rank(values, 100) == np.sort(values.numpy())[100]
