"""The task's own state: when queues are committed, saved and restored."""

import math

import numpy as np
import pytest
import torch
from fairseq.logging import metrics
from fairseq.optim.amp_optimizer import AMPOptimizer
from kd_oracle import Oracle
from stubs import GivenFeatures, GivenLogits, Run, random_batch, to_sample

BATCH = random_batch(np.random.default_rng(0), ["hi", "ta"])


class Optimizer:
    def step(self):
        pass


class Scaler:
    """Skips an update and halves its scale, as torch's does on overflow."""

    def __init__(self, overflows):
        self.scale, self.overflows = 8.0, overflows

    def get_scale(self):
        return self.scale


class AMP(AMPOptimizer):
    def __init__(self, overflows):
        self._grad_scaler = Scaler(overflows)

    def step(self):
        if self.scaler.overflows:
            self.scaler.scale /= 2


@pytest.mark.parametrize(
    ("optimizer", "is_kept"), [(Optimizer(), True), (AMP(overflows=False), True), (AMP(overflows=True), False)]
)
def test_an_update_that_is_made_keeps_its_pushes(optimizer, is_kept):
    run = Run("global_level", kd_rate=0.5, kd_queue_size=100)
    run.forward(BATCH)
    run.task.optimizer_step(optimizer, run.student, 0)
    run.criterion.train()  # as the trainer begins the next update
    kept = run.task.state_dict()["kd"]["queues"]["all"].numel()
    assert kept == (sum(len(targets) for _, targets, _, _ in BATCH) if is_kept else 0)


def test_state_goes_to_the_checkpoint_and_back():
    flags = {"kd_rate": 0.5, "kd_queue_size": 7}
    run, resumed = Run("global_language_wise", **flags), Run("global_language_wise", **flags)
    run.forward(BATCH)
    run.task.selector.commit()
    state = run.task.state_dict()
    assert all(type(v) is torch.Tensor and v.device.type == "cpu" for v in state["kd"]["queues"].values())
    resumed.task.load_state_dict(state)
    again = resumed.task.state_dict()["kd"]
    assert again["strategy"] == "global_language_wise"
    for name, values in state["kd"]["queues"].items():
        assert torch.equal(values, again["queues"][name])


@pytest.mark.parametrize("size", [1, 9, 20, 24, 1000])
def test_a_queue_of_another_size_on_resume_goes_on_from_the_newest(size):
    run = Run("global_level", kd_rate=0.5, kd_queue_size=size)
    run.task.load_state_dict({"kd": {"strategy": "global_level", "queues": {"all": torch.arange(20.0)}}})
    expected = list(range(20))[-size:]
    assert run.task.state_dict()["kd"]["queues"]["all"].tolist() == expected
    for tokens in (range(100, 103), range(200, 230)):
        run.task.selector.select(torch.tensor(tokens, dtype=torch.float32), torch.zeros(len(tokens)).long())
        run.task.selector.commit()
        expected = (expected + list(tokens))[-size:]
        assert run.task.state_dict()["kd"]["queues"]["all"].tolist() == expected


@pytest.mark.parametrize("size", [1, 9, 20, 24, 1000])
def test_a_shared_window_of_another_size_on_resume(size):
    flags = {"kd_rate": 0.5, "kd_queue_window": "shared"}
    run = Run("global_language_wise", kd_queue_size=20, **flags)
    values, language = torch.arange(30.0), torch.arange(30) % 3
    run.task.selector.select(values, language)
    run.task.selector.commit()
    resumed = Run("global_language_wise", kd_queue_size=size, **flags)
    resumed.task.load_state_dict(run.task.state_dict())
    queues = resumed.task.state_dict()["kd"]["queues"]
    assert queues["values"].tolist() == list(range(10, 30))[-size:]
    assert queues["languages"].tolist() == [i % 3 for i in range(10, 30)][-size:]


@pytest.mark.parametrize(("saved", "now"), [("each", "shared"), ("shared", "each")])
def test_another_window_on_resume_starts_empty(saved, now, caplog):
    flags = {"kd_rate": 0.5, "kd_queue_size": 20}
    run, resumed = (Run("global_language_wise", kd_queue_window=window, **flags) for window in (saved, now))
    run.forward(BATCH)
    run.task.selector.commit()
    resumed.task.load_state_dict(run.task.state_dict())
    assert "they start empty" in caplog.text
    assert sum(resumed.task.selector.sizes().values()) == 0
    resumed.forward(BATCH)


@pytest.mark.parametrize("strategy", ["word_seq_level", "word_level", "batch_level"])
def test_strategies_without_a_queue_save_nothing(strategy):
    run = Run(strategy, kd_rate=0.5)
    assert "kd" not in run.task.state_dict()
    run.task.load_state_dict({"kd": {"strategy": "global_level", "queues": {}}})
    assert "kd" not in run.task.state_dict()


def test_a_sentence_without_a_tag_is_said_once(caplog):
    run = Run("global_language_wise", kd_rate=0.5, kd_queue_size=50)
    for _ in range(3):
        run.forward(random_batch(np.random.default_rng(1), ["hi", None]))
    assert sum("without a language tag" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("kind", [GivenLogits, GivenFeatures])
@pytest.mark.parametrize("by_sentence", [False, True])
def test_what_the_loss_is_divided_by(monkeypatch, kind, by_sentence):
    """As upstream: the sentences with --sentence-avg, else all target tokens, those of an ignored prefix, too."""
    monkeypatch.setattr(Run, "student_kind", kind)
    run = Run("word_seq_level", prefix=1)
    run.criterion.sentence_avg = by_sentence
    batch = random_batch(np.random.default_rng(1), ["hi", "ta", "bn"])
    tokens = sum(len(targets) for _, targets, _, _ in batch)
    run.set_logits(batch, extra=2)
    _, size, logged = run.criterion(run.student, to_sample(run.words, batch, extra=2))
    assert size == logged["sample_size"] == (3 if by_sentence else tokens)
    assert (logged["nsentences"], logged["ntokens"]) == (3, tokens)


@pytest.mark.parametrize("strategy", ["word_level", "batch_level"])
def test_what_is_logged_of_two_updates_of_two_workers(strategy):
    """Each a mean over what it is of, in bits: as of all tokens at once."""
    flags = {"batch_level": {"kd_rate": 0.4}}.get(strategy, {})
    oracle = Oracle(strategy, **({"rate": 0.4} if flags else {}))
    run, rng = Run(strategy, **flags), np.random.default_rng(2)
    sums, gates = {"kd": 0.0, "kl": 0.0, "selected": 0, "tokens": 0}, []
    with metrics.aggregate(new_root=True) as found:
        for languages in (["hi"], ["hi", "ta"] * 8):
            logs = []
            for _ in range(2):
                batch = random_batch(rng, languages)
                logs.append(run.forward(batch)[1])
                gates.append(oracle.gates([batch])[0]("hi"))
                (expected,) = oracle.step([batch])
                expected["selected"] = len(expected["selected"])
                sums = {name: sums[name] + expected[name] for name in sums}
            run.criterion.reduce_metrics(logs)
        values = found.get_smoothed_values()
    assert values["kd_loss"] == pytest.approx(sums["kd"] / sums["selected"] / math.log(2), abs=2e-3)
    assert values["kd_kl"] == pytest.approx(sums["kl"] / sums["selected"] / math.log(2), abs=2e-3)
    assert values["kd_selected"] == pytest.approx(sums["selected"] / sums["tokens"], abs=2e-3)
    if strategy == "batch_level":
        assert values["kd_gate"] == pytest.approx(sum(gates) / 4 / math.log(2), abs=2e-3)


@pytest.mark.parametrize(("prefix", "times"), [(1, 0), (60, 1)])
def test_a_prefix_longer_than_every_sentence_is_said_once(prefix, times, caplog):
    run = Run("word_seq_level", prefix=prefix)
    for seed in range(3):
        run.forward(random_batch(np.random.default_rng(seed), ["hi", "ta"]))
    said = [record.getMessage() for record in caplog.records if "no token of a batch is left" in record.getMessage()]
    assert len(said) == times
    assert all(text.startswith("--ignore-prefix-size 60: ") for text in said)
