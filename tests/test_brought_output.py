"""What a cache has of a batch comes with the batch, from where batches are made."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq import utils

from kd_ext.files.cache_files import CacheFiles, create
from kd_ext.modules.positions import Positions, true_first
from kd_ext.modules.teacher import Teacher
from kd_ext.teachers.cached import BringsOutput, CachedTeacher, _of_sentences, _Sentences

PAD, K, V = 1, 3, 20
TARGETS = [[5, 6, 2], [7, 2], [8, 9, 10, 2]]
LENGTHS = np.array([3, 2, 4])


def collate(ids):
    longest = max(len(TARGETS[i]) for i in ids)
    target = torch.tensor([TARGETS[i] + [PAD] * (longest - len(TARGETS[i])) for i in ids])
    return {"id": torch.tensor(ids), "net_input": {"src_tokens": target.flip(1)}, "target": target}


@pytest.fixture
def files(tmp_path):
    """Of the first two sentences, not of the third."""
    manifest = {"top_k": K, "vocabulary": V, "teacher": "t", "format": "f"}
    create(str(tmp_path / "cache"), manifest, LENGTHS)
    files = CacheFiles(str(tmp_path / "cache"), manifest, LENGTHS, writable=True)
    rng = np.random.default_rng(0)
    key = _Sentences.of(collate([0, 1]), PAD).key
    files.write(*key, rng.integers(0, V, (5, K)), rng.random((5, K)).astype(np.float32))
    return files


def brings(files):
    made = BringsOutput(collate, PAD)
    made.files = files
    return made


@pytest.mark.parametrize("ids", [[0], [1, 0]])
@pytest.mark.parametrize("half", [None, torch.float16, torch.bfloat16])
def test_as_the_files_have_it(files, ids, half):
    sample = brings(files)(ids)
    if half is not None:  # as a trainer does in that precision
        sample = utils.apply_to_sample(lambda x: x.to(half) if x.dtype == torch.float32 else x, sample)
    teacher = CachedTeacher.__new__(CachedTeacher)
    teacher._vocabulary, teacher._pad, teacher._opened = V, PAD, files
    real = sample["target"].ne(PAD)
    found = teacher.output(sample, Positions(real, lambda: int(real.sum())))
    expected = files.read(*_Sentences.of(collate(ids), PAD).key)
    assert expected.sound.all()
    assert torch.equal(found.words, torch.from_numpy(expected.words))
    assert torch.equal(found.probs, torch.from_numpy(expected.probs))  # to the last bit
    # without a prefix of one token each, as if nothing had been brought
    real[:, :1] = False
    rest = teacher.output(sample, Positions(real, lambda: int(real.sum())))
    plain = teacher.output(collate(ids), Positions(real))
    assert torch.equal(rest.words, plain.words)
    assert torch.equal(rest.probs, plain.probs)


def test_a_batch_with_something_missing_is_left_alone(files):
    assert brings(files)([0, 2]).keys() == collate([0, 2]).keys()
    assert brings(None)([0]).keys() == collate([0]).keys()


def test_a_changed_text_is_left_to_be_refused(files, monkeypatch):
    monkeypatch.setitem(globals(), "TARGETS", [[5, 6, 2], [11, 2], [8, 9, 10, 2]])
    assert brings(files)([1]).keys() == collate([1]).keys()


def test_another_process_opens_the_files(files):
    """It is given their name, not what is in them."""
    copied = pickle.loads(pickle.dumps(brings(files)))
    assert len(pickle.dumps(brings(files))) < 2000
    for name, tensor in brings(files)([0, 1]).items():
        if name.startswith("teacher"):
            assert torch.equal(copied([0, 1])[name], tensor)


def test_an_empty_batch():
    made = BringsOutput(lambda sentences: {}, PAD)
    made.files = SimpleNamespace()
    assert made([]) == {}


def test_positions():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    values = torch.arange(12.0).view(2, 3, 2)
    for positions in (Positions(mask), Positions(mask, lambda: 3)):
        assert positions.count() == 3
        assert torch.equal(positions.take(values), values[mask])
    order = true_first(mask.flatten())
    assert order.tolist() == [0, 2, 5, 1, 3, 4]


def test_positions_that_a_teacher_asked_for_first():
    """In inference mode; then a student, whose gradient has to go through them."""
    positions = Positions(torch.tensor([[True, False, True]]))
    with torch.inference_mode():
        positions.take(torch.ones(1, 3, 2))
    x = torch.ones(1, 3, 2, requires_grad=True)
    positions.take(x).sum().backward()
    assert x.grad.sum(2).tolist() == [[2, 0, 2]]


def test_a_changed_source_is_left_to_be_refused(files):
    """Of the same length, its target as it was."""

    def other_source(ids):
        sample = collate(ids)
        source = sample["net_input"]["src_tokens"]
        return {**sample, "net_input": {"src_tokens": torch.where(source == 7, torch.full_like(source, 11), source)}}

    assert brings(files)([1]).keys() != collate([1]).keys()
    made = BringsOutput(other_source, PAD)
    made.files = files
    assert made([1]).keys() == collate([1]).keys()
    assert not files.read(*_Sentences.of(other_source([1]), PAD).key).sound.any()


def test_a_cache_is_of_sources_of_these_lengths():
    source, target = np.array([3, 4, 5]), np.array([6, 7, 8])
    found = _of_sentences(source, target)
    assert found["sentences"] == 3
    for other in ((np.array([3, 4, 6]), target), (source, np.array([6, 7, 9])), (target, source)):
        assert _of_sentences(*other)["lengths_of_sentences"] != found["lengths_of_sentences"]


class Projected(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(V, 8)
        self.layer = torch.nn.Linear(8, V)

    def forward(self, src_tokens, prev_output_tokens):
        return self.layer(self.embed(prev_output_tokens))

    def get_normalized_probs(self, net_output, log_probs):
        return net_output.log_softmax(-1)


def test_automatic_mixed_precision_rounds_nothing_of_a_cache(files):
    """The teacher is asked in the precision that the files are said to be of."""
    torch.manual_seed(0)
    model = Projected()
    sample = collate([2, 0])
    sample["net_input"]["prev_output_tokens"] = sample["target"]
    real = sample["target"].ne(PAD)
    expected = model.double()(None, sample["target"]).softmax(-1)[real].topk(K, dim=1).values
    teacher = CachedTeacher.__new__(CachedTeacher)
    teacher._vocabulary, teacher._pad, teacher._opened, teacher._top_k, teacher._temperature = V, PAD, files, K, 1.0
    teacher._teacher, teacher._place = Teacher([model.float()]), (torch.device("cpu"), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = teacher.output(sample, Positions(real))
    torch.testing.assert_close(found.probs[:4].double(), expected[:4], rtol=1e-5, atol=1e-7)  # of what was missing


def test_a_checksum_of_nothing_is_of_something(tmp_path, monkeypatch):
    """0 says that nothing is there yet, and one sentence in 2^32 would have it."""
    monkeypatch.setattr("kd_ext.files.cache_files.zlib.crc32", lambda *_: 0)
    manifest, lengths, one = {"top_k": 1, "vocabulary": 9}, np.array([2, 1]), np.array([1])
    create(str(tmp_path / "cache"), manifest, lengths)
    kept = CacheFiles(str(tmp_path / "cache"), manifest, lengths, writable=True)
    kept.write(one, lengths[one], [7], np.array([[3]]), np.array([[0.5]], dtype=np.float32))
    assert kept.there(np.arange(2)).tolist() == [False, True]
    assert kept.read(one, lengths[one], [7]).sound.all()
