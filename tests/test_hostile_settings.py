"""Nothing of what a checkpoint's settings say is run, and they reach nothing outside of their file."""

import importlib
import os
import pickle
import subprocess
import sys
import tarfile
import time
import zipfile
from argparse import Namespace

import fairseq
import pytest
import torch
from commands import PLUGIN, run
from conftest import KD, load
from fairseq import checkpoint_utils, options, utils
from fuzz_settings import CODE, fuzz
from omegaconf import OmegaConf

from kd_ext.errors import ConfigError
from kd_ext.files import settings
from kd_ext.files.model_settings import check_model_settings


def with_setting(teacher, path, **changes):
    state = load(teacher)
    vars(state["cfg"]["model"]).update(changes)
    torch.save(state, path)
    return path


def expect_refusal(result, path, key, witness):
    assert result.returncode != 0
    assert not witness.exists()
    assert "Traceback" not in result.output
    assert f"{path}: its setting cfg.model.{key} " in result.last_line
    assert "refused, only literals and arithmetic on them" in result.last_line


@pytest.mark.parametrize("key", ["encoder_xformers_att_config", "adaptive_softmax_cutoff"])
def test_commands(teacher, data, distil, tmp_path, key):
    witness = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(witness)!r}).write_text('x') and None"
    path = with_setting(teacher, tmp_path / "evil.pt", **{key: code})
    for name, *flags in (["fairseq-generate"], ["fairseq-validate", "--max-tokens", 200]):
        result = run(tmp_path / "log", name, data, *PLUGIN, "--cpu", "--path", path, *flags)
        expect_refusal(result, path, key, witness)
    result = distil(tmp_path / "student", *KD, "--teacher-checkpoint-path", path, "--max-update", 1)
    expect_refusal(result, path, key, witness)


def test_from_pretrained(teacher, data, tmp_path):
    from fairseq.models.transformer import TransformerModel

    with_setting(teacher, tmp_path / "evil.pt", decoder_xformers_att_config=CODE[0].format(str(tmp_path / "ran")))
    with pytest.raises(ConfigError, match=r"evil\.pt: its setting cfg\.model\.decoder_xformers_att_config"):
        TransformerModel.from_pretrained(str(tmp_path), checkpoint_file="evil.pt", data_name_or_path=str(data))
    assert not (tmp_path / "ran").exists()


def test_every_module_that_evaluates(tmp_path):
    """Of fairseq's modules those with ``eval(`` in their source, imported before the plugin or after."""
    folder = os.path.dirname(fairseq.__file__)
    found = set()
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            if name.endswith(".py") and "examples" not in path and is_evaluating(path):
                found.add("fairseq." + os.path.relpath(path, folder)[:-3].replace(os.sep, "."))
    assert len(found) > 10
    for name in sorted(found):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        with pytest.raises(ConfigError, match="only literals"):
            module.eval(f"open({str(tmp_path / 'ran')!r}, 'w')")
        assert module.eval("[(512, 3)] * 2") == [(512, 3), (512, 3)]
    assert not (tmp_path / "ran").exists()
    assert eval("len('abc')") == 3


def is_evaluating(path):
    import re

    with open(path, encoding="utf-8") as file:
        return re.search(r"(?<![\w.])eval\(", file.read()) is not None


def test_what_fairseqs_own_command_line_passes():
    assert utils.eval_str_list("[1, 2]") == [1.0, 2.0]
    assert utils.eval_str_list("0.5", type=float) == [0.5]
    assert utils.eval_str_dict("{'a': 'b'}") == {"a": "b"}
    assert utils.eval_str_dict(None) is None
    assert utils.eval_bool("True") is True
    assert utils.eval_bool(None, default=True) is True
    parser = options.get_training_parser()
    flags = ["data", "--arch", "fconv", "--adam-betas", "(0.9, 0.98)", "--optimizer", "adam"]
    args = options.parse_args_and_arch(parser, flags)
    assert args.encoder_layers == "[(512, 3)] * 20"


def test_the_flag_is_named_where_it_is_from_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fairseq-train", "--adam-betas", "(0.9, beta)"])
    with pytest.raises(ConfigError, match=r"^--adam-betas '\(0.9, beta\)': refused, .* Name is neither$"):
        utils.eval_bool("(0.9, beta)")


def checked(cfg=None, args=None):
    settings.check("file.pt", {"cfg": cfg, "args": args, "model": {}})


REACHING = ["${env:HOME}", "${oc.env:HOME}", "x${model.a}", "${model.a}${model.b}", "${model}", "${.a}", "${..a.b}"]
REACHING += [
    "${model.again}",
    "${model.missing.further}",
    "${}",
    "${",
    "$${env:HOME}",
    "${now:%Y}",
    "${hydra:runtime.cwd}",
]


@pytest.mark.parametrize("text", REACHING)
@pytest.mark.parametrize("kind", [dict, Namespace, OmegaConf.create])
def test_references(text, kind):
    model = {"a": 1, "b": 2, "again": "${model.again}"}
    for name, value in (("x", text), ("deep", {"y": [text]})):
        inside = kind({**model, name: value}) if kind is not Namespace else Namespace(**{**model, name: value})
        message = rf"^file\.pt: refused, its setting cfg\.model\.({name}|again).* refers to what is not in the file$"
        if text == "${model.again}" and kind is Namespace:
            continue  # no reference is followed in there
        with pytest.raises(ConfigError, match=message):
            checked({"model": inside, "common": {"seed": 3}})


def test_references_inside():
    checked({"common": {"seed": 3}, "model": {"seed": "${common.seed}"}})
    checked({"common": {"seed": 3}, "task": Namespace(seed="${common.seed}")})
    checked(None, Namespace(batch_size_valid="${dataset.batch_size}"))


@pytest.mark.parametrize("value", [len, eval, torch.float16, torch.zeros(2), object(), Namespace, lambda: 1])
def test_what_is_no_plain_data(value):
    for cfg in ({"model": {"x": value}}, {"model": Namespace(x=[value])}, {"model": {"x": {"y": value}}}):
        with pytest.raises(ConfigError, match=r"^file\.pt: refused, its setting cfg\.model\.x[.y]* is a "):
            checked(cfg)


def test_names_that_python_would_call():
    odd = Namespace()
    vars(odd)["__deepcopy__"] = "x"
    with pytest.raises(ConfigError, match="has a setting '__deepcopy__'"):
        checked({"model": odd})


@pytest.mark.parametrize("name", ["encoder_layers", "decoder_layers", "decoder_recurrent_stacking"])
def test_layers_without_end(name):
    """They would be built, one by one, before anything is compared with the weights."""
    for cfg, args in (({"model": Namespace(**{name: 2**31})}, None), (None, Namespace(**{name: 1001}))):
        with pytest.raises(
            ConfigError, match=rf"its setting (cfg\.model|args)\.{name} is \d+, and no model is as deep"
        ):
            checked(cfg, args)
    checked({"model": {name: 1000}})


@pytest.mark.parametrize("name", ["bpe", "tokenizer", "scoring", "task", "arch", "criterion"])
def test_a_name_is_no_path(name):
    with pytest.raises(ConfigError, match=rf"its setting args\.{name} is '../../x', which is no name"):
        checked(None, Namespace(**{name: "../../x"}))


def archive(path, pickled, *parts, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in (("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little"), *parts):
            file.writestr(f"archive/{name}", content)
    return path


def refusal(path):
    with pytest.raises(ConfigError) as raised:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "weights_only" not in message
    return message[len(f"{path}: ") :]


class Calls:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return open, (self.witness, "w")


def test_what_unfolds_or_is_nested_without_end(tmp_path):
    """In a second, with the files' sums: a bomb is not unfolded to be told."""
    start = b"\x80\x02}X\x03\x00\x00\x00cfg}X\x05\x00\x00\x00model"
    lists = archive(tmp_path / "lists", start + b"]" * 10**4 + b"a" * 9999 + b"ss.")
    assert refusal(lists).startswith("refused, cfg.model is nested more than 50 deep")
    spaces = archive(
        tmp_path / "spaces",
        start + b"cargparse\nNamespace\n)\x81}X\x01\x00\x00\x00a" * 2000 + b"N" + b"sb" * 2000 + b"ss.",
    )
    assert "nested more than 50 deep" in refusal(spaces)
    laughs: list = []
    for _ in range(40):
        laughs = [laughs, laughs]  # 2^40 things
    path = archive(tmp_path / "laughs", pickle.dumps({"cfg": {"model": laughs}}, 2))
    assert "holds more than 300,000 things" in refusal(path)
    cycle = archive(tmp_path / "cycle", start + b"]q\x00h\x00ass.")
    assert "nested more than 50 deep" in refusal(cycle)
    zeros = ("data/0", bytes(2 * 10**8))
    bomb = archive(tmp_path / "bomb", pickle.dumps({}, 2), zeros, compression=zipfile.ZIP_DEFLATED)
    assert "an archive of" in refusal(bomb)
    assert "unfolds to 200,000,0" in refusal(bomb)
    packed = archive(
        tmp_path / "packed", pickle.dumps({}, 2), ("data/0", os.urandom(9999)), compression=zipfile.ZIP_DEFLATED
    )
    assert "unfolds" not in refusal(packed)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_bare_pickles(tmp_path, protocol):
    path = tmp_path / "bare.pt"
    for content in ({"model": {}}, {"model": Calls(str(tmp_path / "ran"))}):
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        said = refusal(path)
        assert said.startswith(
            "refused, it is a bare pickle" if protocol > 1 else "damaged, cut short, or not a checkp"
        )
    assert not (tmp_path / "ran").exists()


def test_tar_archives(tmp_path):
    (tmp_path / "pickle").write_bytes(pickle.dumps(Calls(str(tmp_path / "ran"))))
    with tarfile.open(tmp_path / "tar.pt", "w") as file:
        for name in ("storages", "tensors", "pickle"):
            file.add(tmp_path / "pickle", arcname=name)
    assert refusal(tmp_path / "tar.pt").startswith("refused, it is a tar archive")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe").startswith("no regular file")
    assert refusal(tmp_path).startswith("a folder; name a checkpoint of fairseq in it")
    assert refusal(os.devnull).startswith("no regular file")


def test_a_setting_that_names_a_pipe(teacher, data, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for value, message in (
        (str(tmp_path / "pipe"), "no regular file"),
        (7, "no path"),
        ("/dev/zero", "no regular file"),
    ):
        path = with_setting(teacher, tmp_path / "evil.pt", encoder_embed_path=value)
        result = run(tmp_path / "log", "fairseq-generate", data, *PLUGIN, "--cpu", "--path", path)
        assert result.returncode != 0
        assert message in result.last_line
        assert result.last_line.startswith("kd_ext: error: ")


def test_settings_that_make_no_model(teacher, data, tmp_path):
    for key, value in (("encoder_embed_dim", 0), ("decoder_layers", -1), ("encoder_layers", 3), ("arch", "nothing")):
        path = with_setting(teacher, tmp_path / "odd.pt", **{key: value, **({"_name": value} if key == "arch" else {})})
        result = run(tmp_path / "log", "fairseq-generate", data, *PLUGIN, "--cpu", "--path", path)
        said = (
            "its architecture 'nothing' is not registered" if key == "arch" else "no model can be made of its settings"
        )
        assert result.last_line.startswith(f"kd_ext: error: {path}: {said}")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("dropout", [1], "which is no number"),
        ("encoder_layers", "two", "which is no number"),
        ("share_all_embeddings", "no", "and not True or False"),
        ("encoder_normalize_before", [], "and not True or False"),
        ("encoder_embed_dim", {"x": 1}, "which is no number"),
        ("encoder_embed_dim", 10**7, "its weights have 48 at most"),
        ("decoder_ffn_embed_dim", 10**9, "its weights have 48 at most"),
        ("decoder_layers", 999, "its weights have 1 at most"),
        ("encoder_attention_heads", 3, "divisible"),
        ("activation_fn", 7, "not supported"),
    ],
)
def test_settings_of_a_teacher_that_make_no_model(teacher, data, distil, tmp_path, key, value, reason):
    """As for those who translate with it: before anything is built where a number is none, or has no end."""
    path = with_setting(teacher, tmp_path / "odd.pt", **{key: value})
    result = distil(tmp_path / "student", "--teacher-checkpoint-path", path, "--max-update", 1)
    translated = run(tmp_path / "log", "fairseq-generate", data, *PLUGIN, "--cpu", "--path", path)
    for each in (result, translated):
        assert each.returncode != 0
        assert "Traceback" not in each.output
        assert reason in each.last_line


def test_what_models_of_other_kinds_have_passes():
    """Settings that a class reads otherwise, or not at all, and those of its weights."""
    weights = {"encoder.layers.149.fc1.weight": torch.zeros(1, 9000), "version": torch.zeros(1)}
    for name, found in {
        "fconv": {"encoder_layers": "[(512, 3)] * 20", "decoder_attention": "True"},
        "transformer": {"encoder_layers": 150, "encoder_embed_dim": 9000, "unread_dim": 4096, "dropout": None},
        "lightconv": {"encoder_kernel_size_list": [3, 7], "dropout": "${model.attention_dropout}"},
        "unknown": {"dropout": "x", "encoder_layers": [1]},
    }.items():
        check_model_settings("model.pt", {"_name": name, **found}, weights)
        check_model_settings("model.pt", Namespace(arch=name, **found), weights)
    check_model_settings("model.pt", None, None)


def test_mutated_settings(tmp_path):
    fuzzer = fuzz(tmp_path, trials=120, seed=7)
    assert not fuzzer.failures
    assert fuzzer.counts["checkpoint", "refused"] > 20
    assert fuzzer.counts["checkpoint", "accepted"] > 5
    assert fuzzer.counts["adapter", "refused"] > 20
    assert fuzzer.counts["adapter", "accepted"] > 0


@pytest.mark.parametrize("code", CODE)
def test_the_fuzzers_code_is_harmful(tmp_path, code):
    """The oracle: Python itself runs it."""
    witness = tmp_path / "ran"
    command = (
        f"import os, sys, subprocess\ntry: eval({code.format(str(witness))!r}, {{'sys': sys}})\nexcept TypeError: pass"
    )
    subprocess.run([sys.executable, "-c", command], check=True)
    for _ in range(100):
        if witness.exists():
            break  # by a process that it has started
        time.sleep(0.05)
    assert witness.exists()
