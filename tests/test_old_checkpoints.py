"""Checkpoints as older releases of fairseq laid them out, and settings that name what is not registered here."""

import re
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch
from commands import PLUGIN, run
from conftest import KD, load
from fairseq import meters as fairseq_meters
from test_bad_usage import assert_refused

from kd_ext import adapters as tool

# what 0.6.2 had of the settings of a small transformer
SETTINGS = [
    "arch",
    "task",
    "criterion",
    "optimizer",
    "lr_scheduler",
    "source_lang",
    "target_lang",
    "left_pad_source",
    "left_pad_target",
    "max_source_positions",
    "max_target_positions",
    "label_smoothing",
    "dropout",
    "attention_dropout",
    "encoder_embed_dim",
    "decoder_embed_dim",
    "encoder_ffn_embed_dim",
    "decoder_ffn_embed_dim",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "encoder_normalize_before",
    "decoder_normalize_before",
    "encoder_learned_pos",
    "decoder_learned_pos",
    "share_all_embeddings",
    "share_decoder_input_output_embed",
    "adaptive_softmax_cutoff",
    "seed",
    "max_epoch",
    "clip_norm",
]


def meter(kind, **state):
    """An object of a class as it was then."""
    made = getattr(fairseq_meters, kind).__new__(getattr(fairseq_meters, kind))
    made.__dict__.update(state)
    return made


def as_release(state, release):
    """A checkpoint of today in the layout of 0.6.2, 0.7.2, 0.8.0 or 0.9.0."""
    today = state["cfg"]["model"]
    args = Namespace(**{name: getattr(today, name) for name in SETTINGS if hasattr(today, name)})
    args.data, args.lr, args.min_lr = [today.data], [0.01], -1.0
    args.raw_text, args.remove_bpe, args.max_positions = False, None, 1024
    model = OrderedDict()
    for name, tensor in state["model"].items():
        if re.search(r"layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)$", name):
            continue  # copies that 0.12.2 alone has
        if release < "0.9" and re.search(r"\.[qkv]_proj\.", name):  # as one, up to 0.8
            if ".q_proj." in name:
                parts = [state["model"][name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"]
                model[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
            continue
        if release == "0.6.2" and name.startswith("encoder.layers"):
            for number, of_today in enumerate(("self_attn_layer_norm", "final_layer_norm")):
                name = name.replace(of_today, f"layer_norms.{number}")
        model[name] = tensor
    history = {"criterion_name": "LabelSmoothedCrossEntropyCriterion", "optimizer_name": "FairseqAdam"}
    history.update(lr_scheduler_state={"best": None}, num_updates=40)
    average = {"val": 1.0, "avg": 1.0, "sum": 2.0, "count": 2}
    train_meters = OrderedDict(
        train_loss=meter("AverageMeter", **average),
        wps=meter("TimeMeter", init=0, start=1.0, n=3),
        train_wall=meter("StopwatchMeter", sum=0, n=0, start_time=None),
    )
    extra = {"train_iterator": {"epoch": 5, "iterations_in_epoch": 0}, "val_loss": 4.0, "best": 4.0}
    return {
        "args": args,
        "model": model,
        "optimizer_history": [history],
        "last_optimizer_state": state["last_optimizer_state"],
        "extra_state": {**extra, "train_meters": train_meters},
    }


@pytest.fixture(params=["0.6.2", "0.7.2", "0.8.0", "0.9.0", "averaged"])
def old(request, teacher, tmp_path, monkeypatch):
    """The teacher's checkpoint as such a release would have written it, beside its dictionaries' folder."""
    state = as_release(load(teacher), request.param if request.param != "averaged" else "0.9.0")
    where = "fairseq.logging.meters" if request.param == "averaged" else "fairseq.meters"
    for kind in ("AverageMeter", "TimeMeter", "StopwatchMeter"):
        monkeypatch.setattr(getattr(fairseq_meters, kind), "__module__", where)
    path = tmp_path / "old" / "checkpoint_best.pt"
    path.parent.mkdir()
    torch.save(state, path, _use_new_zipfile_serialization=False)
    monkeypatch.undo()
    assert b"AverageMeter" in path.read_bytes()
    return path


def kl(output):
    return float(re.search(r"kd_kl=([\d.e-]+)", output)[1])


def test_as_teacher(train, teacher, old, tmp_path):
    """Of a student that has its weights, kd_kl is 0: what it says is what it always said."""
    begin = ["--finetune-from-model", teacher, "--max-update", 1, "--dropout", "0", "--lr", "1e-9"]
    result = train(tmp_path / "student", *KD, "--teacher-checkpoint-path", old, "--kd-strategy", "word_level", *begin)
    assert result.returncode == 0, result.output
    assert kl(result.output) == 0


def test_as_path(data, teacher, old, tmp_path):
    found = []
    for path in (teacher, old):
        flags = [data, "--path", path, *PLUGIN, "--gen-subset", "valid", "--cpu", "--beam", 2]
        result = run(tmp_path / "log", "fairseq-generate", *flags)
        assert result.returncode == 0, result.output
        found.append(re.findall(r"^[HDP]-.*", result.output, re.MULTILINE))
    assert len(found[0]) > 10
    assert found[0] == found[1]


def test_to_begin_with(train, teacher, old, tmp_path):
    flags = ["--max-update", 3, "--criterion", "label_smoothed_cross_entropy", "--finetune-from-model"]
    for name, path in (("from new", teacher), ("from old", old)):
        result = train(tmp_path / name, *flags, path)
        assert result.returncode == 0, result.output
    first, second = (load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("from new", "from old"))
    assert all(torch.equal(first[name], second[name]) for name in first if "_float_tensor" not in name)


def test_in_a_cache(data, old, tmp_path):
    flags = [data, "--teacher-checkpoint-path", old, "--teacher-cache-dir", tmp_path / "cache", "--max-tokens", 400]
    result = run(tmp_path / "log", "kd_ext.teacher_cache", *flags, "--cpu", "--num-workers", 0)
    assert result.returncode == 0, result.output


def test_as_the_base_of_adapters(train, old, tmp_path, capsys):
    sides = [x for side in ("encoder", "decoder") for x in (f"--{side}-add-adapters", f"--{side}-adapter-ids", "hi")]
    trained = [x for side in ("encoder", "decoder") for x in (f"--{side}-train-adapter", "hi")]
    flags = ["--finetune-from-model", old, "--load-checkpoint-liberally", "--max-update", 2, *sides, *trained]
    flags += ["--criterion", "label_smoothed_cross_entropy"]
    result = train(tmp_path / "hi", *flags, arch="transformer_adapter")
    assert result.returncode == 0, result.output
    tool.main(["export", str(tmp_path / "hi" / "checkpoint_last.pt"), "hi", str(tmp_path / "hi.adapter")])
    tool.main(["merge", str(old), str(tmp_path / "hi.adapter"), "--output", str(tmp_path / "merged.pt")])
    assert (tmp_path / "merged.pt").exists()


def in_layout(teacher, layout):
    """The teacher's checkpoint with its settings in one Namespace, as they were, or in groups, as they are."""
    state = load(teacher)
    if layout == "args":
        state = as_release(state, "0.9.0")
        state["extra_state"].pop("train_meters")
    return state


UNREGISTERED = ["criterion", "optimizer", "lr_scheduler", "bpe"]


@pytest.mark.parametrize("layout", ["args", "cfg"])
@pytest.mark.parametrize("kind", UNREGISTERED)
def test_names_that_are_not_registered(train, data, teacher, tmp_path, layout, kind):
    """A teacher needs no criterion and no optimizer of its own, nor does who translates."""
    state = in_layout(teacher, layout)
    if layout == "args":
        setattr(state["args"], kind, "of_a_fork")
    else:
        state["cfg"][kind] = {"_name": "of_a_fork", "its_setting": 1}
        setattr(state["cfg"]["model"], kind, "of_a_fork")
    path = tmp_path / "teacher.pt"
    torch.save(state, path)
    flags = [*KD, "--teacher-checkpoint-path", path, "--kd-strategy", "word_level", "--max-update", 1]
    result = train(tmp_path / "student", *flags)
    assert result.returncode == 0, result.output
    flags = [data, "--path", path, *PLUGIN, "--gen-subset", "valid", "--cpu", "--beam", 1]
    result = run(tmp_path / "log", "fairseq-generate", *flags)
    assert result.returncode == 0, result.output


@pytest.mark.parametrize("layout", ["args", "cfg"])
def test_settings_of_a_task_that_it_does_not_have(train, teacher, tmp_path, layout):
    """Every fork has some: they are left out, and named."""
    state = in_layout(teacher, layout)
    if layout == "args":
        state["args"].language_tags = "hi,ta"
    else:
        state["cfg"]["task"]["language_tags"] = "hi,ta"
    path = tmp_path / "teacher.pt"
    torch.save(state, path)
    flags = [*KD, "--teacher-checkpoint-path", path, "--kd-strategy", "word_level", "--max-update", 1]
    result = train(tmp_path / "student", *flags)
    assert result.returncode == 0, result.output
    if layout == "cfg":
        assert "language_tags" in result.output.split("loaded teacher")[0]


@pytest.mark.parametrize("layout", ["args", "cfg"])
def test_a_task_that_is_not_registered(train, teacher, tmp_path, layout):
    state = in_layout(teacher, layout)
    if layout == "args":
        state["args"].task = "translation_of_a_fork"
    else:
        state["cfg"]["task"]["_name"] = "translation_of_a_fork"
    path = tmp_path / "teacher.pt"
    torch.save(state, path)
    result = train(tmp_path / "student", *KD, "--teacher-checkpoint-path", path, "--max-update", 1)
    assert_refused(result, tmp_path / "student", "--teacher-checkpoint-path", "translation_of_a_fork", "not registered")


@pytest.mark.parametrize("layout", ["cfg", "args"])
def test_settings_and_weights_alone(layout, teacher, data, train, tmp_path):
    """A file without the optimizer's part teaches, translates and is a beginning; no run goes on from it."""
    whole = in_layout(teacher, layout)
    path = tmp_path / "run" / "checkpoint_last.pt"
    path.parent.mkdir()
    torch.save({layout: whole[layout], "model": whole["model"]}, path)
    flags = ["--gen-subset", "test", "--beam", "1", "--cpu", *PLUGIN]
    output = [run(tmp_path / "log", "fairseq-generate", data, "--path", x, *flags).output for x in (teacher, path)]
    translations = [re.findall(r"^H-.*", text, re.MULTILINE) for text in output]
    assert translations[0] == translations[1] != [], output[1][-1000:]
    taught = [*KD, "--teacher-checkpoint-path", path, "--finetune-from-model", path, "--max-update", "1"]
    result = train(tmp_path / "student", *taught, "--lr", "1e-9", "--dropout", "0")
    assert result.returncode == 0, result.output[-1000:]
    assert [abs(float(x)) < 1e-5 for x in re.findall(r"kd_kl=([\d.e-]+)", result.output)] == [True]
    result = train(path.parent, "--criterion", "label_smoothed_cross_entropy", "--max-update", "50")
    assert result.returncode != 0
    assert result.last_line.startswith(f"kd_ext: error: {path}: it has settings and weights alone")
