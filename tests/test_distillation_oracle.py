"""Loss, gradient, selection and metrics of every strategy against the oracle, over several batches in a row."""

import math

import numpy as np
import pytest
import torch
from kd_oracle import Oracle
from stubs import GivenFeatures, GivenLogits, Run, random_batch

STRATEGIES = {
    "word_seq_level": {"alpha": 0.3},
    "word_level": {},
    "batch_level": {"kd_rate": 0.3},
    "global_level": {"kd_rate": 0.3, "kd_queue_size": 40},
    "global_language_wise": {"kd_rate": 0.3, "kd_queue_size": 10},
    "shared": {"kd_rate": 0.3, "kd_queue_size": 30, "kd_queue_window": "shared"},
}
# the languages of each batch: one that is absent, a sentence without a tag, a batch larger than the queues
BATCHES = [["hi", "ta", "hi"], ["bn", "hi", None, "bn"], ["ta"] * 16 + ["hi"] * 6, ["hi", "bn", "ta"], ["bn"]]


@pytest.fixture(
    autouse=True,
    params=[(GivenLogits, GivenLogits), (GivenFeatures, GivenFeatures), (GivenFeatures, GivenLogits)],
    ids=["plain", "lean", "lean-plain-teacher"],
)
def _formulation(request, monkeypatch):
    """Every test with all logits at once, from features by chunks, and so with a teacher that gives only logits."""
    student, teacher = request.param
    monkeypatch.setattr(Run, "student_kind", student)
    monkeypatch.setattr(Run, "teacher_kind", teacher)


def make(strategy, teachers=1, **settings):
    flags = STRATEGIES[strategy]
    strategy = {"shared": "global_language_wise"}.get(strategy, strategy)
    names = {"kd_rate": "rate", "kd_queue_size": "queue_size", "kd_queue_window": "window"}
    oracle = Oracle(strategy, **{names.get(k, k): v for k, v in flags.items()}, **settings)
    run_settings = {{"temperature": "kd_temperature"}.get(k, k): v for k, v in settings.items()}
    return oracle, Run(strategy, teachers, **flags, **run_settings)


def check_batch(run, oracle, batch, extra=0, tolerance=2e-5, dtype=torch.float32):
    (expected,) = oracle.step([batch])
    loss, logged = run.forward(batch, extra, dtype)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected["loss"], rel=tolerance)
    assert logged["loss"].item() == pytest.approx(expected["loss"], rel=tolerance)
    assert logged["nll_loss"].item() == pytest.approx(expected["nll"], rel=tolerance)
    assert logged["kd_loss"].item() == pytest.approx(expected["kd"], rel=tolerance)
    assert logged["kd_kl"].item() == pytest.approx(expected["kl"], rel=tolerance, abs=tolerance)
    assert float(logged["kd_selected"]) == len(expected["selected"])
    assert float(logged["kd_tokens"]) == float(logged["total"]) == expected["tokens"]
    gradient = run.student.logits.grad.double().numpy()
    for s, rows in enumerate(expected["gradients"]):
        np.testing.assert_allclose(gradient[s, : len(rows)], rows, atol=tolerance)
        assert not gradient[s, len(rows) :].any()  # padding
    for name in logged:
        if name.startswith("kd_selected_"):
            pool = {"untagged": None}.get(name[12:], name[12:])
            assert float(logged[name]) == sum(batch[s][0] == pool for s, _ in expected["selected"])
    run.task.selector.commit()
    return expected


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_training(strategy, eps, prefix, temperature):
    oracle, run = make(strategy, eps=eps, prefix=prefix, temperature=temperature)
    rng = np.random.default_rng(5)
    for i, languages in enumerate(BATCHES):
        check_batch(run, oracle, random_batch(rng, languages), extra=i % 3)
    queues = run.task.state_dict().get("kd", {}).get("queues", {})
    if strategy == "shared":
        languages = [run.task.selector.pools[i].replace("untagged", "None") for i in queues["languages"]]
        assert languages == [str(name) for name, _ in oracle.queues["shared"]]
        expected = [x for _, x in oracle.queues["shared"]]
        np.testing.assert_allclose(queues["values"].numpy(), expected, rtol=1e-5)
        return
    assert {{"untagged": None}.get(name, name) for name in queues} == oracle.queues.keys()
    for name, values in queues.items():
        expected = oracle.queues[{"untagged": None}.get(name, name)]
        np.testing.assert_allclose(values.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_teacher_comes_before_the_students_activations(strategy):
    """In the plain formulation, which has other worries, it comes after."""
    _, run = make(strategy)
    order = []
    for name, model in (("student", run.student), ("teacher", run.teachers[0])):
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    run.forward(random_batch(np.random.default_rng(5), BATCHES[0]))
    assert order == (["teacher", "student"] if isinstance(run.student, GivenFeatures) else ["student", "teacher"])


def test_the_oracle_is_upstreams_label_smoothed_loss():
    """alpha = 0 is upstream's criterion itself: the oracle's smoothed target must give the same number."""
    run = Run("word_seq_level", alpha=0.0)
    rng = np.random.default_rng(0)
    batch = random_batch(rng, ["hi", "ta"])
    loss, _ = run.forward(batch)
    (expected,) = Oracle("word_seq_level", alpha=0.0).step([batch])
    assert run.criterion.teacher is None
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("strategy", ["word_level", "global_level"])
def test_ensemble_averages_probabilities(strategy):
    oracle, run = make(strategy, teachers=3, temperature=1.5)
    rng = np.random.default_rng(6)
    for languages in BATCHES[:2]:
        check_batch(run, oracle, random_batch(rng, languages, teachers=3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype):
    """The softmax is in float32: nothing but the rounding of the logits themselves is lost."""
    oracle, run = make("word_seq_level")
    batch = random_batch(np.random.default_rng(7), ["hi"] * 40)
    as_stored = lambda x: torch.tensor(x).to(dtype).double().numpy()  # noqa: E731
    batch = [(g, y, as_stored(student), [as_stored(t) for t in teachers]) for g, y, student, teachers in batch]
    (expected,) = oracle.step([batch])
    loss, _ = run.forward(batch, dtype=dtype)
    assert loss.item() == pytest.approx(expected["loss"], rel=2e-5)


def test_sum_over_a_large_half_precision_batch_is_finite():
    """Defect 4: 20,000 tokens of nll 7 are 140,000, more than float16 holds."""
    run = Run("word_seq_level")
    batch = [("hi", np.full(200, 5), np.zeros((200, 17)), [np.zeros((200, 17))]) for _ in range(100)]
    for _, _, student, _ in batch:
        student[:, 5] = -7.0
    loss, _ = run.forward(batch, dtype=torch.float16)
    assert 65504 < loss.item() < math.inf


@pytest.mark.parametrize("strategy", ["batch_level", "global_level", "global_language_wise", "shared"])
def test_gates_and_losses_do_not_change_with_padding(strategy):
    """Defect 2."""
    results = []
    for extra in (0, 13):
        _, run = make(strategy)
        rng = np.random.default_rng(8)
        results.append([run.forward(random_batch(rng, languages), extra)[1] for languages in BATCHES])
    for tight, loose in zip(*results):
        assert tight.keys() == loose.keys()
        for name in tight:
            assert float(tight[name]) == pytest.approx(float(loose[name]), rel=1e-5), name


def test_language_wise_selects_in_every_position():
    """Defect 1: not only the first B of the B x T tokens."""
    rng = np.random.default_rng(9)
    oracle, run = make("global_language_wise")
    positions = set()
    for _ in range(12):
        batch = random_batch(rng, ["hi", "ta"])
        positions.update(check_batch(run, oracle, batch)["selected"])
    assert {t for _, t in positions} >= {0, 1, 2, 3, 4, 5}
    assert {s for s, _ in positions} == {0, 1}


@pytest.mark.parametrize("strategy", ["global_level", "global_language_wise", "shared"])
def test_only_training_steps_push(strategy):
    """Defect 3: validation, dummy batches, and updates that the optimizer skipped leave no trace."""
    _, run = make(strategy)
    rng = np.random.default_rng(10)
    run.forward(random_batch(rng, ["hi", "ta", "bn"]))
    run.task.selector.commit()
    before = run.task.state_dict()["kd"]["queues"]
    batch = random_batch(rng, ["hi", "ta", "bn"])

    _, logged = run.forward(batch, is_dummy=True)
    assert float(logged["kd_selected"]) == 0
    run.task.selector.commit()

    run.student.eval()
    run.criterion.eval()
    run.forward(batch)
    run.student.train()

    run.criterion.train()
    run.forward(batch)  # pushed, but its update is never made
    run.criterion.train()
    run.task.selector.commit()  # of the next one
    after = run.task.state_dict()["kd"]["queues"]
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name])


def test_validation_is_upstreams_loss_without_a_teacher():
    run = Run("word_level")
    run.task.load_teacher = None
    run.criterion.teacher = None
    run.student.eval()
    batch = random_batch(np.random.default_rng(11), ["hi", "ta"])
    loss, logged = run.forward(batch)
    (expected,) = Oracle("word_seq_level", alpha=0.0).step([batch])
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert not [name for name in logged if name.startswith("kd")]


def test_accuracy_is_that_of_the_student():
    run = Run("batch_level", kd_rate=0.5, prefix=1)
    batch = random_batch(np.random.default_rng(12), ["hi", "ta", "bn"] * 10)
    _, logged = run.forward(batch, extra=2)
    correct = sum(student[t].argmax() == y[t] for _, y, student, _ in batch for t in range(1, len(y)))
    assert float(logged["n_correct"]) == correct
    assert float(logged["total"]) == sum(len(y) - 1 for _, y, _, _ in batch)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_dummy_batch_logs_what_a_real_one_does(strategy):
    """By the same names, and tensors where it has tensors: the workers add them up place by place."""
    _, run = make(strategy)
    sentences = random_batch(np.random.default_rng(5), BATCHES[0])
    kinds = []
    for is_dummy in (False, True):
        _, logged = run.forward(sentences, is_dummy=is_dummy)
        kinds.append({name: torch.is_tensor(value) for name, value in logged.items()})
    assert kinds[0] == kinds[1]
