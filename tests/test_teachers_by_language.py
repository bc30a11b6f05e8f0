"""A teacher for each language, against a plain formulation: each sentence by itself, with the teacher of its own."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from fairseq import utils
from fairseq.models import BaseFairseqModel
from stubs import VOCABULARY, Decoder, GivenFeatures, GivenLogits, Run, random_batch, to_sample
from test_distillation_oracle import BATCHES, STRATEGIES, check_batch
from test_distillation_oracle import make as make_runs
from torch.nn import functional as F

from kd_ext.models.output_projection import find_projection
from kd_ext.modules.chunked_loss import of_tokens
from kd_ext.modules.parted_logits import PartedLogits
from kd_ext.modules.positions import Positions
from kd_ext.modules.teacher import Teacher
from kd_ext.modules.top_probs import top_probs
from kd_ext.teachers.assignment import Assignment
from kd_ext.teachers.by_language import BringsParts, SplitByTeacher, TeachersByLanguage

PAD = 1
# hi has an ensemble, ta and the sentences without a tag another teacher
OF_POOLS = [0, 1, 2, 1]
OF_LANGUAGES = dict(zip(["hi", "ta", "bn", None], OF_POOLS))
SIZES = [2, 1, 3]


class ByFeatures(BaseFairseqModel):
    """Its logits depend on the previous word alone, so that each sentence's are known without it."""

    def __init__(self, seed):
        super().__init__()
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
        self.seen = []
        self.decoder = Decoder(lambda: self.table)

    def forward(self, src_tokens, prev_output_tokens, src_lengths=None, features_only=False):
        self.seen.append((src_tokens, prev_output_tokens))
        return self.table[prev_output_tokens], None


class ByPreviousWord(ByFeatures):
    """One that can only be asked for probabilities."""

    def get_normalized_probs(self, net_output, log_probs, sample=None):
        return F.log_softmax(net_output[0], dim=-1)


@pytest.fixture(params=[(GivenLogits, ByPreviousWord), (GivenFeatures, ByFeatures), (GivenFeatures, ByPreviousWord)])
def kinds(request, monkeypatch):
    """The plain loss, the lean one, and the lean one with teachers that give only probabilities."""
    monkeypatch.setattr(Run, "student_kind", request.param[0])
    return request.param


def teachers_of(kind):
    ensembles = [[kind(10 * i + j) for j in range(size)] for i, size in enumerate(SIZES)]
    projections = [[find_projection(x) if kind is ByFeatures else None for x in models] for models in ensembles]
    return ensembles, [Teacher(*both, str(i)) for i, both in enumerate(zip(ensembles, projections))]


def make(kinds, strategy, **settings):
    """The oracle, a run whose teacher is several, and their models."""
    oracle, run = make_runs(strategy, **settings)
    ensembles, teachers = teachers_of(kinds[1])
    split = SplitByTeacher(OF_POOLS, run.task.languages.of_batch, PAD)
    run.criterion.teacher = TeachersByLanguage([lambda i=i: teachers[i] for i in range(3)], split)
    return oracle, run, ensembles


def a_batch(rng, languages, ensembles):
    return [
        (language, targets, student, [model.table[targets].numpy() for model in ensembles[OF_LANGUAGES[language]]])
        for language, targets, student, _ in random_batch(rng, languages)
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("settings", [{}, {"prefix": 2, "temperature": 2.5, "eps": 0.0}])
def test_training(kinds, strategy, settings):
    oracle, run, ensembles = make(kinds, strategy, **settings)
    rng = np.random.default_rng(5)
    for i, languages in enumerate([*BATCHES, ["ta"], ["ta", None]]):
        for models in ensembles:
            for model in models:
                model.seen.clear()
        check_batch(run, oracle, a_batch(rng, languages, ensembles), extra=i % 3)
        for number, models in enumerate(ensembles):
            # once, for its own sentences, and nothing for padding of others
            rows = sum(OF_LANGUAGES[language] == number for language in languages)
            assert [len(source) for model in models for source, _ in model.seen] == [rows] * len(models) * (rows > 0)
            for source, previous in (x for model in models for x in model.seen):
                assert source.ne(PAD).any(0).all()
                assert previous.ne(PAD).any(0).all()


def a_sample(run, ensembles, languages, extra=2):
    batch = a_batch(np.random.default_rng(1), languages, ensembles)
    run.set_logits(batch, extra)
    return to_sample(run.words, batch, extra)


def plain_probs(sample, ensembles, languages, temperature):
    """Sentence by sentence, float64: of all real tokens, in the order of rows."""
    found = []
    for tokens, language in zip(sample["target"], languages):
        models = ensembles[OF_LANGUAGES[language]]
        of_each = [(model.table.double()[tokens[tokens != PAD]] / temperature).softmax(1) for model in models]
        found.append(sum(of_each) / len(of_each))
    return torch.cat(found)


LANGUAGES = ["hi", "ta", "bn", None, "hi", "bn", "bn", "ta"]


def test_probabilities_and_their_words(kinds):
    _, run, ensembles = make(kinds, "word_level")
    sample = a_sample(run, ensembles, LANGUAGES)
    positions = Positions(sample["target"].ne(PAD))
    expected = plain_probs(sample, ensembles, LANGUAGES, 1.5)
    teacher = run.criterion.teacher
    probs = teacher.probs(sample, positions, 1.5)
    torch.testing.assert_close(probs.double(), expected, rtol=1e-5, atol=1e-7)
    assert not probs.is_inference()
    listed = top_probs(teacher.output(sample, positions), 4, 1.5, rows=3)
    torch.testing.assert_close(listed.probs.double(), expected.topk(4, dim=1).values, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(expected.gather(1, listed.words), expected.topk(4, dim=1).values)


@pytest.mark.parametrize("selected", [[], [0], [3, 4, 7], [11, 12, 20], range(5, 23)])
def test_some_tokens(kinds, selected):
    _, run, ensembles = make(kinds, "word_level")
    sample = a_sample(run, ensembles, LANGUAGES)
    expected = plain_probs(sample, ensembles, LANGUAGES, 1.0)[list(selected)]
    output = run.criterion.teacher.output(sample, Positions(sample["target"].ne(PAD)))
    some = of_tokens(output, torch.tensor(list(selected), dtype=torch.long))
    assert isinstance(some, PartedLogits)
    assert sum(some.sizes) == len(selected)
    if selected:
        listed = top_probs(some, VOCABULARY).dense()
        torch.testing.assert_close(listed.double(), expected, rtol=1e-5, atol=1e-7)


def test_batches_that_bring_their_parts_along(kinds):
    """As data loaders give them, also from another process."""
    _, run, ensembles = make(kinds, "word_level")
    sample = a_sample(run, ensembles, LANGUAGES)
    split = run.criterion.teacher.split
    bring = pickle.loads(pickle.dumps(BringsParts(dict, split)))
    brought = utils.apply_to_sample(lambda tensor: tensor.clone(), bring(sample))
    assert bring({}) == {}
    assert split(brought) == split(sample)
    del brought["net_input"]["src_tokens"]
    assert split(brought) == split(sample)  # it is not looked for again


def test_one_teacher_at_a_time(kinds):
    ensembles, teachers = teachers_of(kinds[1])
    _, run, _ = make(kinds, "word_level")
    loaded = []

    def load(number):
        loaded.append(number)
        return teachers[number]

    split = SplitByTeacher(OF_POOLS, run.task.languages.of_batch, PAD)
    several = TeachersByLanguage([partial(load, i) for i in range(3)], split, "+".join, keeps_all=False)
    assert loaded == [0, 1, 2]  # all are looked at
    assert several.identity == "0+1+2"
    for languages in (["hi", "hi"], ["hi", "ta"], [None, "bn"]):
        sample = a_sample(run, ensembles, languages)
        several.output(sample, Positions(sample["target"].ne(PAD)))
        assert len(several._loaded) == 1
    assert loaded == [0, 1, 2, 0, 1, 2]


def test_what_tells_assigned_teachers_from_others():
    found = Assignment(["a.pt", "b.pt"], [0, 1, 1], [("hi", 0)], 1)
    same = found.identity("source __src__*", ["A", "B"])
    assert same == found.identity("source __src__*", ["A", "B"])
    others = [
        found.identity("source __tgt__*", ["A", "B"]),  # other tags
        found.identity("source __src__*", ["B", "A"]),
        found._replace(named=[("ta", 0)]).identity("source __src__*", ["A", "B"]),
        found._replace(rest=None).identity("source __src__*", ["A", "B"]),
    ]
    assert len({same, *others}) == 5
