"""What the log says of a selection that is far from --kd-rate."""

import logging

import numpy as np
import pytest
from stubs import Run, random_batch

from kd_ext.modules.share_watch import UPDATES, ShareWatch


def told(watch, updates, tokens, selected):
    """What is said, and after which of the updates."""
    said = {}
    for update in range(1, updates + 1):
        watch.add(tokens, selected)
        shares = watch.update()
        if shares:
            said[update] = shares
    return said


def test_each_pool_is_told_of_once_after_the_second_window():
    watch = ShareWatch(0.5, ["de", "bn", "hi"])
    assert told(watch, 3 * UPDATES, [100, 100, 0], [49, 25, 0]) == {2 * UPDATES: {"bn": 0.25}}
    assert told(watch, 2 * UPDATES, [100, 100, 10], [30, 25, 7]) == {UPDATES: {"de": 0.3, "hi": 0.7}}


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
@pytest.mark.parametrize(("part", "is_far"), [(0.79, True), (0.81, False), (1.0, False), (1.19, False), (1.21, True)])
def test_a_fifth_of_the_rate_is_far(rate, part, is_far):
    watch = ShareWatch(rate, ["all"])
    assert bool(told(watch, 2 * UPDATES, [10_000], [round(10_000 * rate * part)])) == is_far


def test_a_few_tokens_raise_no_alarm():
    """Of 200 tokens of independent sentences, 68 selected are 4.5 standard errors from a half, 60 are 5.7."""
    assert not told(ShareWatch(0.5, ["all"]), 2 * UPDATES, [1], [0.34])
    assert told(ShareWatch(0.5, ["all"]), 2 * UPDATES, [1], [0.3])


def test_the_batches_of_an_update_are_one_and_no_batch_is_none():
    watch = ShareWatch(0.5, ["all"])
    for _ in range(2 * UPDATES - 1):
        watch.add([100], [10])
        watch.add([100], [20])
        assert not watch.update()
        assert not watch.update()
    watch.add([200], [30])
    assert watch.update() == {"all": pytest.approx(0.15)}


@pytest.mark.parametrize(
    ("strategy", "flags", "remedy"),
    [
        ("global_level", {}, "a smaller --kd-queue-size helps"),
        ("global_language_wise", {}, "a smaller --kd-queue-size helps, or --kd-queue-window shared"),
        ("global_language_wise", {"kd_queue_window": "shared"}, "a smaller --kd-queue-size helps"),
    ],
)
def test_the_log(caplog, monkeypatch, strategy, flags, remedy):
    """A student that gets better all the time, and a queue that is never full."""
    monkeypatch.setattr("kd_ext.modules.share_watch.UPDATES", 20)
    run = Run(strategy, kd_rate=0.5, kd_queue_size=10**6, **flags)
    rng = np.random.default_rng(0)
    for update in range(100):
        batch = random_batch(rng, ["hi", "ta", "ta"] * 8)
        for _, targets, student, _ in batch:
            student[np.arange(len(targets)), targets] += update / 10
        run.criterion.train()
        run.forward(batch)
        run.task.selector.commit()
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    (message,) = (message for message in messages if "far fewer tokens were selected" in message)
    assert "--kd-rate 0.5" in message
    for pool in ["all"] if strategy == "global_level" else ["hi", "ta"]:
        assert f"{pool} 0." in message
    assert message.endswith(remedy)
