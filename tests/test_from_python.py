"""Upstream's from_pretrained: students and adapter models as Python objects."""

import re

import pytest
import torch
from commands import PLUGIN, run
from conftest import load as read
from fairseq import file_utils
from fairseq.models.transformer import TransformerModel
from tiny_models import build

from kd_ext.errors import ConfigError
from kd_ext.models.transformer_ext import TransformerExtModel

ADAPTERS = [
    flag
    for side in ("encoder", "decoder")
    for flag in (f"--{side}-add-adapters", f"--{side}-adapter-ids", "hi,ta", f"--{side}-train-adapter", "hi")
]
LONGEST = 9


@pytest.fixture(scope="module")
def adapted(train, teacher, tmp_path_factory):
    """The teacher with adapters, of which one was trained until it makes a difference."""
    save_dir = tmp_path_factory.mktemp("adapted")
    flags = [*ADAPTERS, "--finetune-from-model", teacher, "--load-checkpoint-liberally", "--lr", "0.1"]
    flags += ["--criterion", "label_smoothed_cross_entropy", "--max-update", "8"]
    result = train(save_dir, *flags, arch="transformer_adapter")
    assert result.returncode == 0, result.output
    return save_dir / "checkpoint_last.pt"


def load(kind, checkpoint, data):
    return kind.from_pretrained(str(checkpoint.parent), checkpoint_file=checkpoint.name, data_name_or_path=str(data))


@pytest.fixture(scope="module")
def sentences(corpus):
    return (corpus / "raw" / "test.src").read_text().splitlines()


@pytest.fixture
def generated(data, tmp_path):
    """Runs fairseq-generate; returns the translations in the order of the sentences."""

    def generated(checkpoint, *flags):
        command = [data, *PLUGIN, "--path", checkpoint, "--cpu", "--beam", 5, "--max-len-b", LONGEST, *flags]
        result = run(tmp_path / "log", "fairseq-generate", *command)
        assert result.returncode == 0, result.output
        found = re.findall(r"^D-(\d+)\t\S+\t(.*)$", result.output, flags=re.M)
        return [text for _, text in sorted(found, key=lambda pair: int(pair[0]))]

    return generated


@pytest.mark.parametrize(
    ("name", "key"),
    [("sentencepiece", "sentencepiece_model"), ("subword_nmt", "bpe_codes"), ("gpt2", "gpt2_encoder_json")],
)
def test_nothing_is_fetched_from_an_address_in_a_checkpoint(student, data, tmp_path, monkeypatch, name, key):
    asked = []
    monkeypatch.setattr(file_utils, "cached_path", lambda path, *_, **__: asked.append(path) or path)
    state = read(student)
    state["cfg"]["bpe"] = {"_name": name, key: "http://localhost:1/file"}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=f"{key} .*http://localhost:1/file.*: its bpe '{name}' would be fetched"):
        load(TransformerModel, tmp_path / "x.pt", data)
    assert [path for path in asked if "localhost" in path] == []


@pytest.mark.parametrize("kind", [TransformerModel, TransformerExtModel])
def test_a_student_translates(kind, student, data, sentences, generated):
    model = load(kind, student, data)
    assert model.translate(sentences, max_len_b=LONGEST) == generated(student)


def test_adapters_are_switched(adapted, data, sentences, generated):
    hub = load(TransformerExtModel, adapted, data)
    trained = hub.translate(sentences, max_len_b=LONGEST)
    assert trained == generated(adapted)
    hub.models[0].activate_adapter()
    base = hub.translate(sentences, max_len_b=LONGEST)
    assert base == generated(adapted, "--activate-encoder-adapter", "none", "--activate-decoder-adapter", "none")
    hub.models[0].activate_adapter(decoder="hi")
    one_side = hub.translate(sentences, max_len_b=LONGEST)
    assert len({tuple(trained), tuple(base), tuple(one_side)}) == 3
    hub.models[0].activate_adapter(encoder="hi", decoder="hi")
    assert hub.translate(sentences, max_len_b=LONGEST) == trained


def test_an_unknown_adapter_changes_nothing(adapted, data, sentences):
    hub = load(TransformerExtModel, adapted, data)
    before = hub.translate(sentences[:3], max_len_b=LONGEST)
    with pytest.raises(ConfigError, match=r"activate_adapter\(decoder='xx'\): unknown; the decoder has hi, ta"):
        hub.models[0].activate_adapter(encoder=None, decoder="xx")
    assert hub.translate(sentences[:3], max_len_b=LONGEST) == before


def test_a_model_without_adapters_says_so():
    model = build()
    model.activate_adapter()
    with pytest.raises(ConfigError, match=r"activate_adapter\(encoder='hi'\): unknown; the encoder has none"):
        model.activate_adapter(encoder="hi")
