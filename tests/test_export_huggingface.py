"""--format huggingface: its classes compute and translate as fairseq does, and what they cannot hold is refused."""

import importlib.util
import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from commands import ROOT, run_as_typed
from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import OmegaConf
from test_exported_weights import student_of
from tiny_models import adapters, batch, both, dictionary, logits, settings

from kd_ext.errors import ConfigError
from kd_ext.export import main
from kd_ext.exporting import huggingface_format
from kd_ext.exporting.huggingface_format import POST_NORM, PRE_NORM, write_folder
from kd_ext.exporting.huggingface_translator import HuggingFaceTranslator, require_transformers
from kd_ext.exporting.refusals import check_huggingface
from kd_ext.exporting.student import Student

PRE = both(normalize_before=True)


def student(folder, args, source=30, target=30, dtype=torch.float32):
    """A random model as a student, its dictionaries of so many words in the folder."""
    for language, size in (("src", source), ("tgt", target)):
        dictionary(size).save(str(folder / f"dict.{language}.txt"))
    task = TranslationTask.setup_task(
        OmegaConf.structured(TranslationConfig(data=str(folder), source_lang="src", target_lang="tgt"))
    )
    if source == target:
        model, extensions = student_of(args, dtype)
    else:
        torch.manual_seed(1)
        model = task.build_model(args).to(dtype).eval()
        extensions = student_of(settings())[1]
    return Student("student.pt", model, args, extensions, task, 1, str(folder))


VARIANTS = {
    "plain": {},
    "the decoder's tables tied": {"share_decoder_input_output_embed": True},
    "all tables tied, stacked": {"share_all_embeddings": True, **both(recurrent_stacking=3)},
    "factorized": both(factorized_embed_dim=6),
    "factorized and tied": {"share_all_embeddings": True, **both(factorized_embed_dim=6)},
    "an output dimension": {"decoder_output_dim": 12},
    "gelu, no scale": {"activation_fn": "gelu", "no_scale_embedding": True},
    "gelu_fast": {"activation_fn": "gelu_fast", "encoder_ffn_embed_dim": 40, "encoder_attention_heads": 4},
    "tanh, few positions": {"activation_fn": "tanh", "max_source_positions": 8, "max_target_positions": 12},
}


def needs_transformers():
    """Without importing it, which the command does in its own way."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")


def assert_same_logits(given, folder):
    """Padding on the left, as fairseq has it, and a target of another length."""
    needs_transformers()
    transformers = require_transformers()
    check_huggingface(given)
    write_folder(given, str(folder))
    found = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    theirs = found.from_pretrained(str(folder)).eval()
    src, prev = batch(words=min(len(given.task.source_dictionary), len(given.task.target_dictionary)))
    with torch.no_grad():
        expected = logits(given.model, src, prev)
        mask = src.ne(1).long()
        output = theirs(input_ids=src, attention_mask=mask, decoder_input_ids=prev, use_cache=False).logits
    assert expected.abs().max() > 1
    assert (expected - output).abs().max() < 2e-5
    return found.__name__


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_random_models(variant, pre_norm, tmp_path):
    args = settings(layers=2, **{**VARIANTS[variant], **(PRE if pre_norm else {})})
    name = assert_same_logits(student(tmp_path, args), tmp_path / "out")
    assert name == (PRE_NORM if pre_norm else POST_NORM)


def test_logits_with_adapters_as_layers(tmp_path):
    args = settings(activate_encoder_adapter="hi", activate_decoder_adapter="ta", **PRE, **adapters())
    assert assert_same_logits(student(tmp_path, args), tmp_path / "out") == PRE_NORM


@pytest.mark.parametrize(("flags", "sizes"), [({}, (30, 41)), ({}, (41, 30)), (PRE, (30, 41))])
def test_logits_of_two_vocabularies(flags, sizes, tmp_path):
    assert_same_logits(student(tmp_path, settings(**flags), *sizes), tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"encoder_normalize_before": True}, "--encoder-normalize-before True and --decoder-normalize-before False"),
        ({"encoder_embed_dim": 32}, "--encoder-embed-dim 32 and --decoder-embed-dim 16"),
        ({"decoder_learned_pos": True}, "--decoder-learned-pos: both classes have sinusoidal positions"),
        ({"layernorm_embedding": True}, "--layernorm-embedding: neither class"),
        ({"no_token_positional_embeddings": True}, "--no-token-positional-embeddings: both"),
        ({"no_cross_attention": True}, "--no-cross-attention: their decoders"),
        ({"cross_self_attention": True}, "--cross-self-attention: their decoders"),
        ({"quant_noise_pq": 0.1}, "--quant-noise-pq 0.1: neither"),
        ({"adaptive_softmax_cutoff": [10]}, "--adaptive-softmax-cutoff"),
        ({"activation_fn": "swish"}, "--activation-fn swish: of upstream's they have relu, gelu"),
        ({"no_decoder_final_norm": True, **PRE}, "--no-decoder-final-norm: M2M100's"),
    ],
)
def test_what_neither_class_has_is_refused(flags, reason, tmp_path):
    given = student(tmp_path, settings())
    vars(given.settings).update(flags)
    with pytest.raises(ConfigError, match=r"--format huggingface: student\.pt cannot be exported so") as error:
        check_huggingface(given)
    assert reason in str(error.value)
    assert ";" not in str(error.value), "nothing else"


def test_a_larger_source_dictionary_is_refused_pre_norm(tmp_path):
    given = student(tmp_path, settings(**PRE), 41, 30)
    with pytest.raises(ConfigError, match=r"more words in the source dictionary \(41\) than in the target's \(30\)"):
        check_huggingface(given)


def test_a_weight_without_a_name_is_refused(tmp_path):
    """What nobody thought of must not be lost without a word."""
    given = student(tmp_path, settings(layernorm_embedding=True))
    with pytest.raises(ConfigError, match=r"has no place for encoder\.layernorm_embedding\.weight"):
        write_folder(given, str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["dict.src.txt", "dict.tgt.txt"]


@pytest.fixture(scope="module")
def students(exportable, train, tmp_path_factory):
    """Trained ones by class: M2M100's have adapters or are stacked and factorized, FSMT's is plain."""
    folder = tmp_path_factory.mktemp("post-norm")
    flags = ["--lr", "0.02", "--max-tokens", "1000", "--dropout", "0", "--max-update", "120", "--max-epoch", "0"]
    flags += ["--criterion", "label_smoothed_cross_entropy", "--disable-validation", "--no-epoch-checkpoints"]
    result = train(folder, *flags, "--save-interval", "1000", arch="transformer_ext")
    assert result.returncode == 0, result.output
    return {"post-norm": folder / "checkpoint_last.pt", **exportable}


CLASSES = {"post-norm": POST_NORM, "compact": PRE_NORM, "adapted": PRE_NORM}


@pytest.mark.parametrize("kind", CLASSES)
def test_all_translations_are_the_same(kind, students, tmp_path, capsys):
    needs_transformers()
    out = tmp_path / "out"
    main([str(students[kind]), str(out), "--format", "huggingface"])
    output = capsys.readouterr().out
    assert f"as {CLASSES[kind]}" in output
    last = output.splitlines()[-1]
    differing, translated = re.match(r"(\d+) of (\d+) translations differ", last).groups()
    assert (differing, int(translated) > 15) == ("0", True), output
    assert "20 sentences of" in last
    assert float(last.split("by ")[1].split()[0]) < 2e-5
    main(["--check", str(out), str(students[kind])])
    assert capsys.readouterr().out.startswith(f"0 of {translated} translations differ")
    assert os.listdir(tmp_path) == ["out"]


def test_as_typed_without_transformers(exportable, data, tmp_path):
    """Nothing of the library is needed to write; and what is written says what it is."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("transformers", "safetensors"):
        (hidden / f"{name}.py").write_text("raise ImportError('hidden')")
    typed = ["python", "-m", "kd_ext.export", exportable["compact"], tmp_path / "out", "--format", "huggingface"]
    result = run_as_typed(*typed, PYTHONPATH=str(hidden))
    assert result.returncode == 0, result.output
    assert result.last_line.startswith("not compared: transformers is not installed")
    assert f"as {PRE_NORM}" in result.output
    for name in ("dict.src.txt", "dict.tgt.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (data / name).read_bytes()
    names = ["config.json", "dict.src.txt", "dict.tgt.txt", "generation_config.json", "pytorch_model.bin"]
    assert sorted(os.listdir(tmp_path / "out")) == names
    weights = torch.load(tmp_path / "out" / "pytorch_model.bin")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert weights["model.shared.weight"].shape == (config["vocab_size"], config["d_model"])
    assert config["vocab_size"] == len(Dictionary.load(str(data / "dict.tgt.txt")))
    assert "model.encoder.layer_norm.weight" in weights
    pointers = {weights[f"model.encoder.layers.{i}.fc1.weight"].data_ptr() for i in range(3)}
    assert len(pointers) == 1, "torch writes what is one storage once"


def test_only_an_older_folder_is_replaced(exportable, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    out = tmp_path / "out"
    main([str(exportable["compact"]), str(out), "--format", "huggingface"])
    before = (out / "config.json").read_text()
    main([str(exportable["adapted"]), str(out), "--format", "huggingface"])
    assert (out / "config.json").read_text() != before
    (out / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match=r"with mine\.txt in it"):
        main([str(exportable["compact"]), str(out), "--format", "huggingface"])
    others = tmp_path / "others"
    others.mkdir()
    (others / "dict.src.txt").write_text("kept 1\n")
    with pytest.raises(ConfigError, match=r"with dict.src.txt in it"):
        main([str(exportable["compact"]), str(others), "--format", "huggingface"])
    assert (out / "mine.txt").read_text() == "kept"
    assert (others / "dict.src.txt").read_text() == "kept 1\n"
    (out / "mine.txt").unlink()
    # as the library saves a model that was tuned, here in this very folder
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "transformers_version": "5.0.0"}))
    with pytest.raises(ConfigError, match=r"with config.json in it"):
        main([str(exportable["compact"]), str(out), "--format", "huggingface"])
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"transformers is not installed.*pip install transformers"):
        main(["--check", str(out), str(exportable["compact"])])


def test_a_folder_that_the_library_saved_is_not_replaced(exportable, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [PRE_NORM]}))
    (tmp_path / "model.safetensors").write_bytes(b"kept")
    with pytest.raises(ConfigError, match=r"with config.json in it"):
        main([str(exportable["compact"]), str(tmp_path), "--format", "huggingface"])
    assert (tmp_path / "model.safetensors").read_bytes() == b"kept"


ARCHITECTURE = f'"architectures": ["{PRE_NORM}"]'


@pytest.mark.parametrize(
    "config",
    ["[" * 100_000, "[1]", f'{{{ARCHITECTURE}, "langs": 5}}', f'{{{ARCHITECTURE}, "langs": ["src", "tgt"]}}'],
)
def test_a_config_that_somebody_brought(config, tmp_path):
    """Of a class that is exported, or of whatever: the folder is refused, in one line, and kept."""
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "dict.src.txt").write_text("kept 1\n")
    with pytest.raises(ConfigError, match=r"with config.json in it"):
        main(["nowhere.pt", str(tmp_path), "--format", "huggingface"])
    assert (tmp_path / "dict.src.txt").read_text() == "kept 1\n"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("{", r"config\.json: damaged, or not JSON"),
        ("[" * 100_000, r"config\.json: damaged, or not JSON \(maximum recursion"),
        ("[1]", r"config\.json: has no names and values"),
        (f'{{{ARCHITECTURE}, "langs": 5}}', r'config\.json: "langs" 5: not two languages'),
        (f"{{{ARCHITECTURE}}}", r'config\.json: "langs" None: not two languages'),
        (f'{{{ARCHITECTURE}, "langs": ["src", "tgt"]}}', r"dict\.src\.txt: cannot be read: No such file"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_line(config, reason, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(**{POST_NORM: Library, PRE_NORM: Library}))
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=reason):
        main(["--check", str(tmp_path), str(tmp_path)])


class Library:
    """A class of transformers, as far as it is asked for."""

    from_pretrained = None


def test_a_dictionary_that_the_user_put_there_is_kept(tmp_path):
    out = tmp_path / "out"
    write_folder(student(tmp_path, settings()), str(out))
    huggingface_format.check_folder(str(out))
    (out / "dict.mine.txt").write_text("kept 1\n")
    with pytest.raises(ConfigError, match=r"with dict\.mine\.txt in it"):
        huggingface_format.check_folder(str(out))


def test_the_config_may_leave_out_what_the_library_knows(tmp_path, capsys):
    needs_transformers()
    out = tmp_path / "out"
    write_folder(student(tmp_path, settings()), str(out))
    config = json.loads((out / "config.json").read_text())
    del config["max_position_embeddings"]
    (out / "config.json").write_text(json.dumps(config))
    assert HuggingFaceTranslator(str(out)).longest == 1024


def test_the_words_of_the_docs(tmp_path, monkeypatch, capsys):
    """The dictionary of a project may have words that take the place of earlier ones."""
    (tmp_path / "out").mkdir()
    for language in ("src", "tgt"):
        (tmp_path / "out" / f"dict.{language}.txt").write_text("w5 9\nw7 8 #fairseq:overwrite\nw9 7\n")
    expected = Dictionary.load(str(tmp_path / "out" / "dict.tgt.txt"))
    # says what it is given
    model = SimpleNamespace(eval=lambda: SimpleNamespace(generate=lambda ids: ids))
    loader = SimpleNamespace(from_pretrained=lambda folder: model)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoModelForSeq2SeqLM=loader))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/deploying.md").read_text()
    found = {}
    exec(re.search(r"^```python\n(import torch.*?)^```$", page, re.DOTALL | re.MULTILINE)[1], found)
    assert found["target"] == expected.symbols
    assert capsys.readouterr().out == "['w5', 'w7', 'w9']\n"


def test_as_many_words_as_there_are_positions(tmp_path):
    given = student(tmp_path, settings(max_target_positions=30))
    write_folder(given, str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_length"] == 29 + 2
    write_folder(student(tmp_path, settings()), str(tmp_path / "more"))
    assert json.loads((tmp_path / "more" / "generation_config.json").read_text())["max_length"] == 200 + 2


def test_a_disk_that_fills_up_leaves_nothing(exportable, tmp_path, monkeypatch):
    def full(path, weights):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_format, "_write_weights", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        main([str(exportable["compact"]), str(tmp_path / "out"), "--format", "huggingface"])
    assert os.listdir(tmp_path) == []


def test_the_command_names_what_no_class_has(exportable, tmp_path):
    with pytest.raises(ConfigError) as error:
        main([str(exportable["untied"]), str(tmp_path / "out"), "--format", "huggingface"])
    assert "--layernorm-embedding" in str(error.value)
    assert "--decoder-learned-pos" in str(error.value)
    assert os.listdir(tmp_path) == []
