"""The window that all languages share, against a list of all that was pushed, in float64."""

import math
import random
from decimal import ROUND_CEILING, Decimal

import numpy as np
import pytest
import torch

from kd_ext.modules.language_gates import LanguageGates, pack, selection_sizes, unpack
from kd_ext.modules.token_queue import selection_size
from kd_ext.modules.token_selection import GlobalLanguageWise, SharedWindow

POOLS = ["hi", "ta", "bn", "as", "untagged"]


class Plain:
    """Every push, as (language, value), oldest first."""

    def __init__(self, rate, capacity):
        self.rate, self.capacity, self.pushed = rate, capacity, []

    def window(self):
        return self.pushed[-self.capacity :]

    def kth(self, pool):
        k = int((Decimal(str(self.rate)) * len(pool)).to_integral_value(ROUND_CEILING))
        return sorted(pool, reverse=True)[k - 1]

    def gate(self, language):
        own = [value for name, value in self.window() if name == language]
        if len(own) < 20 and len(own) < len(self.window()) / 100:
            return self.kth([value for _, value in self.window()])
        return self.kth(own)


def batch(rng, size, languages, has_ties):
    language = rng.choices(languages, weights=range(len(languages), 0, -1), k=size)
    values = [round(rng.gammavariate(2, 2), 1) if has_ties else rng.gammavariate(2, 2) for _ in range(size)]
    return torch.tensor(values, dtype=torch.float32), torch.tensor(language, dtype=torch.int64)


def select_and_compare(selector, plain, nll, language):
    plain.pushed += list(zip(language.tolist(), nll.double().tolist()))
    selection = selector.select(nll, language)
    gates = {name: plain.gate(name) for name in set(language.tolist())}
    assert {i: gate for i, gate in enumerate(selection.gates.tolist()) if not math.isnan(gate)} == gates
    expected = [value >= gates[name] for name, value in zip(language.tolist(), nll.double().tolist())]
    assert selection.mask.tolist() == expected
    return selection.mask


def saved(selector):
    queue = selector.state_dict()
    return list(zip(queue["languages"].tolist(), queue["values"].double().tolist()))


@pytest.mark.parametrize("capacity", [1, 7, 150, 2500])
@pytest.mark.parametrize("rate", [0.07, 0.5, 1.0])
@pytest.mark.parametrize("has_ties", [False, True])
def test_many_batches(capacity, rate, has_ties):
    """Languages that come and go, batches larger than the window, empty ones, updates that are skipped."""
    rng = random.Random(f"{capacity} {rate} {has_ties}")
    selector, plain = SharedWindow(rate, capacity, POOLS), Plain(rate, capacity)
    kept = []
    for step in range(120):
        languages = rng.sample(range(5), rng.randint(1, 5))
        if 40 < step < 80 and 3 in languages and len(languages) > 1:
            languages.remove(3)
        nll, language = batch(rng, rng.choice([0, 1, 3, 60, 200]), languages, has_ties)
        select_and_compare(selector, plain, nll, language)
        if rng.random() < 0.7:
            selector.commit()
            kept = list(plain.pushed)
        elif rng.random() < 0.6:
            selector.rollback()
            plain.pushed = list(kept)
        if rng.random() < 0.1:  # what is not committed is not saved
            plain.pushed = list(kept)
            assert saved(selector) == plain.window()


def test_a_language_away_for_longer_than_the_window():
    rng = random.Random(0)
    selector, plain = SharedWindow(0.5, 100, POOLS), Plain(0.5, 100)
    for languages in ([0, 1, 2], [0, 1], [0, 1], [0, 1, 2]):
        select_and_compare(selector, plain, *batch(rng, 90, languages, False))
        selector.commit()
        assert saved(selector) == plain.window()


@pytest.mark.parametrize("count", [1, 2, 9, 10, 19, 20])
@pytest.mark.parametrize("size", [100, 1000, 1001, 2001, 5000])
def test_a_language_with_few_tokens_has_the_gate_of_all(count, size):
    """Of 1 % or 20 tokens its own."""
    language = torch.tensor([0] * (size - count) + [1] * count)
    nll = torch.arange(1.0, size + 1)  # the tokens of language 1 are the hardest
    gates = SharedWindow(0.5, 10_000, POOLS).select(nll, language).gates
    own = size - math.ceil(count / 2) + 1
    of_all = size - math.ceil(size / 2) + 1
    assert gates[1].item() == (of_all if count < 20 and count < size / 100 else own)
    assert gates[0].item() == size - count - math.ceil((size - count) / 2) + 1


def test_a_language_that_the_same_batch_pushes_out_has_the_gate_of_all():
    nll, language = torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0]), torch.tensor([1, 0, 0, 0, 0])
    selection = SharedWindow(0.5, 4, POOLS).select(nll, language)
    assert selection.gates[:2].tolist() == [3.0, 3.0]
    assert selection.mask.tolist() == [True, False, False, True, True]


def test_a_share_is_the_same_for_all_languages_while_the_student_learns():
    """What the window is for: losses fall by half in ten batches, and one language has a fiftieth of the tokens."""
    rng = random.Random(1)
    shares = {}
    for kind in (SharedWindow, GlobalLanguageWise):
        selector, selected, tokens = kind(0.5, 10_000, POOLS), [0, 0], [0, 0]
        for step in range(100):
            language = torch.tensor(rng.choices([0, 1], weights=[49, 1], k=2000))
            nll = torch.tensor([rng.gammavariate(2, 2) for _ in range(2000)]) * 0.5 ** (step / 100)
            mask = selector.select(nll, language).mask
            selector.commit()
            for name in (0, 1) if step >= 50 else ():
                selected[name] += int(mask[language == name].sum())
                tokens[name] += int((language == name).sum())
        shares[kind] = [a / b for a, b in zip(selected, tokens)]
    assert abs(shares[SharedWindow][0] - shares[SharedWindow][1]) < 0.04
    assert shares[SharedWindow][1] > 0.46
    assert shares[GlobalLanguageWise][1] < 0.43


@pytest.mark.parametrize("size", [1, 50, 200, 1000])
def test_resumed_with_the_same_or_another_size(size):
    rng = random.Random(2)
    selector, plain = SharedWindow(0.5, 200, POOLS), Plain(0.5, 200)
    for _ in range(5):
        select_and_compare(selector, plain, *batch(rng, 70, [0, 1, 2], False))
        selector.commit()
    resumed, of_size = SharedWindow(0.5, size, POOLS), Plain(0.5, size)
    resumed.load_state_dict(selector.state_dict(), POOLS)
    of_size.pushed = plain.window()
    assert saved(resumed) == of_size.window()
    assert sum(resumed.sizes().values()) == min(size, 200)
    for _ in range(10):
        nll, language = batch(rng, 70, [0, 1, 2, 3], False)
        mask = select_and_compare(resumed, of_size, nll, language)
        uninterrupted = selector.select(nll, language).mask
        assert size != 200 or torch.equal(mask, uninterrupted)


def test_tokens_are_resumed_by_the_name_of_their_language():
    selector = SharedWindow(0.5, 10, ["hi", "ta", "untagged"])
    selector.select(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 1, 2, 1]))
    selector.commit()
    resumed = SharedWindow(0.5, 10, ["as", "ta", "untagged"])
    resumed.load_state_dict(selector.state_dict(), selector.pools)
    assert resumed.sizes() == {"ta": 2, "untagged": 1}
    assert saved(resumed) == [(1, 2.0), (2, 3.0), (1, 4.0)]


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.07, 1 / 3, 0.3333333333333334, 0.1, 1e-9, 1.2345e-13, 3e-30])
def test_sizes_of_many_pools_are_exact(rate):
    pools = [0, 1, 2, 3, 99, 100, 101, 10**6, 2**31 - 1]
    pools += [random.Random(rate).randrange(2**31) for _ in range(200)]
    expected = [selection_size(rate, pool) for pool in pools]
    assert selection_sizes(rate, torch.tensor(pools)).tolist() == expected
    assert selection_sizes(rate, np.array(pools)).tolist() == expected


def test_keys_are_in_the_order_of_languages_and_values():
    values = [-math.inf, -3.5, -1e-42, 0.0, 1e-42, 2.0, 3e38, math.inf, math.nan]
    shuffled = list(enumerate(values)) * 3
    random.Random(3).shuffle(shuffled)
    language = torch.tensor([i % 3 for i in range(len(shuffled))])
    keys = pack(torch.tensor([value for _, value in shuffled]), language)
    found, languages = unpack(keys)
    assert torch.equal(languages, language)
    torch.testing.assert_close(found, torch.tensor([v for _, v in shuffled]), rtol=0, atol=0, equal_nan=True)
    by_rank = sorted((name, rank) for (rank, _), name in zip(shuffled, language.tolist()))
    order = keys.argsort(stable=True).tolist()
    assert [(language[i].item(), shuffled[i][0]) for i in order] == by_rank
    assert pack(torch.tensor([-0.0]), language[:1]) == pack(torch.tensor([0.0]), language[:1])
    negative_nan = torch.tensor([-(2**22)], dtype=torch.int32).view(torch.float32)
    assert pack(negative_nan, language[:1]) == pack(torch.tensor([math.nan]), language[:1])


@pytest.mark.parametrize("languages", [1, 11, 100])
def test_near_the_last_gates_is_as_exact_as_sorting(languages):
    """Of queues that change little, then at once, with ties and NaN: what a CPU does, against what a GPU does."""
    generator = torch.Generator().manual_seed(languages)
    gates = LanguageGates(0.3, languages)
    values = torch.rand(200_000, generator=generator) * 10
    language = (torch.rand(200_000, generator=generator) ** 3 * languages).long()
    for step in range(30):
        place = torch.randint(200_000, (3000,), generator=generator)
        values[place] = torch.rand(3000, generator=generator) * (10 - 0.1 * step)
        if step == 10:
            values = values.round()
        if step == 15:
            values *= 0.1
        if step == 20:
            values[:1000] = math.nan
        keys = pack(values, language)
        found, counts = gates._near_the_last(keys.numpy())
        expected, expected_counts = gates._sorted(keys)
        assert torch.equal(counts, expected_counts)
        assert torch.equal(found[counts > 0], expected[counts > 0])


def test_gates_of_languages_are_seldom_searched_among_all(monkeypatch):
    """As test_running_rank.py has it for one queue."""
    made, search = [], LanguageGates._anew

    def counted(self, *args):
        made.append(1)
        return search(self, *args)

    monkeypatch.setattr(LanguageGates, "_anew", counted)
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(40_000, generator=generator)
    language = torch.arange(40_000) % 3
    gates, asked = LanguageGates(0.5, 3), torch.ones(3, dtype=torch.bool)
    for _ in range(30):
        values = values.roll(60)
        values[:60] = torch.rand(60, generator=generator)
        gates(pack(values, language), asked)
    assert len(made) == 1
