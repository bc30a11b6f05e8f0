"""What is no teacher is refused before there is any training, in one line that says what it is."""

import copy
from argparse import Namespace

import pytest
import torch
from commands import run
from conftest import KD, SIZES, TRAINING, load
from fairseq import models, tasks
from fairseq.models import ARCH_CONFIG_REGISTRY
from test_bad_usage import assert_refused
from test_teacher import net_input, student_task  # noqa: F401

from kd_ext.modules.positions import Positions
from kd_ext.teachers.load import Source, load_teacher

BASE = ["--criterion", "label_smoothed_cross_entropy", "--max-update", "2"]


def trained(folder, data, *flags, drop=()):
    flags = [*TRAINING, *flags, "--save-dir", folder]
    for flag in drop:
        flags.remove(flag)
    result = run(folder.parent / "log", "fairseq-train", data, *flags)
    assert result.returncode == 0, result.output
    return folder / "checkpoint_last.pt"


def refused(train, tmp_path, path, *parts, flags=()):
    result = train(tmp_path / "student", *KD, "--teacher-checkpoint-path", path, "--max-update", 1, *flags)
    assert_refused(result, tmp_path / "student", *parts)


def untrained(path, teacher, task, arch, data, **given):
    """A checkpoint of random weights; what else is in it is the teacher's."""
    args = Namespace(arch=arch, task=task, data=str(data), source_lang="src", target_lang="tgt", **given)
    ARCH_CONFIG_REGISTRY[arch](args)
    own = tasks.setup_task(Namespace(task="translation", data=str(data), source_lang="src", target_lang="tgt"))
    model = models.build_model(copy.copy(args), own)
    torch.save({**load(teacher), "cfg": None, "args": args, "model": model.state_dict()}, path)
    return path


SMALL = dict(encoder_layers=1, decoder_layers=1, encoder_embed_dim=8, decoder_embed_dim=8)
SMALL.update(encoder_attention_heads=2, decoder_attention_heads=2)


def test_not_autoregressive(data, train, teacher, tmp_path):
    path = untrained(tmp_path / "nat.pt", teacher, "translation_lev", "nonautoregressive_transformer", data, **SMALL)
    refused(train, tmp_path, path, path, "translation_lev", "not known")
    # taken for what it is not
    chosen = ["--teacher-model-overrides", "{'task': 'translation'}"]
    parts = path, "nonautoregressive_transformer", "autoregressive encoder-decoder"
    refused(train, tmp_path, path, *parts, flags=chosen)


def test_of_the_reverse_direction(data, train, tmp_path):
    path = trained(tmp_path / "reverse", data, *BASE, "--arch", "transformer", *SIZES, "-s", "tgt", "-t", "src")
    refused(train, tmp_path, path, path, "from tgt to src", "from src to tgt")


def test_weights_alone(train, teacher, tmp_path):
    torch.save(load(teacher)["model"], tmp_path / "model.pt")
    refused(train, tmp_path, tmp_path / "model.pt", "weights alone")


def test_a_shard(train, teacher, tmp_path):
    torch.save({**load(teacher), "shard_metadata": {"param_metadata": []}}, tmp_path / "checkpoint-shard0.pt")
    refused(train, tmp_path, tmp_path / "checkpoint-shard0.pt", "shard")


def test_a_language_model(data, train, teacher, tmp_path):
    """Its settings are a translation task's: nothing but its model tells."""
    sizes = dict(
        decoder_layers=1, decoder_embed_dim=8, decoder_attention_heads=2, tokens_per_sample=64, max_target_positions=64
    )
    path = untrained(tmp_path / "lm.pt", teacher, "translation", "transformer_lm", data, **sizes)
    refused(train, tmp_path, path, "transformer_lm", "no encoder and decoder")


@pytest.mark.parametrize("damage", ["missing", "not numbers"])
def test_weights_that_do_not_fit_or_are_damaged(train, teacher, tmp_path, damage):
    state = load(teacher)
    name = "decoder.layers.0.fc1.weight"
    if damage == "missing":
        del state["model"][name]
    else:
        state["model"][name].fill_(float("nan"))
    torch.save(state, tmp_path / "teacher.pt")
    refused(train, tmp_path, tmp_path / "teacher.pt", "do not fit" if damage == "missing" else "not numbers")


def test_lengths_of_both_sides_in_one_line(data, train, tmp_path):
    path = trained(tmp_path / "fconv", data, *BASE, "--arch", "fconv_iwslt_de_en", "--max-update", "1")
    refused(train, tmp_path, path, "--max-source-positions 1022 --max-target-positions 1022")


def test_ema(data, train, teacher, student_task, tmp_path):  # noqa: F811
    flags = [*BASE, "--arch", "transformer", *SIZES, "--store-ema", "--ema-decay", "0.5", "--ema-fp32"]
    path = trained(tmp_path / "ema", data, *flags)
    state = load(path)
    raw, averaged = state["model"], state["extra_state"]["ema"]
    assert any(not torch.equal(raw[name], averaged[name]) for name in averaged if name in raw)
    torch.save({**state, "model": {**raw, **averaged}}, tmp_path / "averaged.pt")

    def probs(source):
        batch = {"net_input": net_input(student_task)}
        return load_teacher(source, student_task).probs(batch, Positions(torch.ones(2, 4, dtype=torch.bool)))

    wanted = probs(Source(str(tmp_path / "averaged.pt"), f"{{'data': '{data}'}}"))
    assert torch.equal(probs(Source(str(path), ema=True)), wanted)
    assert not torch.equal(probs(Source(str(path))), wanted)
    flags = [*KD, "--teacher-checkpoint-path", path, "--max-update", 1]
    result = train(tmp_path / "student", *flags, "--teacher-ema")
    assert result.returncode == 0, result.output
    assert "EMA weights" in result.output
    refused(train, tmp_path / "none", teacher, "--teacher-ema", "--store-ema", flags=["--teacher-ema"])
