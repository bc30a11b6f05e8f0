"""--format ctranslate2: its own converter takes what is exported, and translates as fairseq does."""

import json
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import ROOT, run_as_typed
from conftest import load
from fairseq.sequence_generator import SequenceGenerator
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import OmegaConf
from test_exported_weights import student_of
from tiny_models import adapters, both, dictionary, settings

from kd_ext import export
from kd_ext.errors import ConfigError
from kd_ext.export import main
from kd_ext.exporting import folders, seven_bits, translators
from kd_ext.exporting.comparison import Comparison
from kd_ext.exporting.ctranslate2_format import write_folder
from kd_ext.exporting.refusals import check_ctranslate2
from kd_ext.exporting.sentences import random_sentences
from kd_ext.exporting.student import Student
from kd_ext.exporting.translators import CTranslate2Translator, FairseqTranslator

ctranslate2 = pytest.importorskip("ctranslate2")


def run_here(capsys, *arguments):
    """The command in this process; what it printed."""
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.fixture
def no_padding_before_the_softmax(monkeypatch):
    """fairseq's search, but for where it forbids padding: CTranslate2's words are likelier by what padding would have.

    In tiny vocabularies that is enough for another order of hypotheses.
    """

    class Generator(SequenceGenerator):
        def __init__(self, models, words, **kwargs):
            super().__init__(models, words, **kwargs)
            forward = self.model.forward_decoder

            def forward_decoder(*arguments):
                scores, attention = forward(*arguments)
                return scores - torch.log1p(-scores[:, [words.pad()]].exp()), attention

            self.model.forward_decoder = forward_decoder

    monkeypatch.setattr(translators, "SequenceGenerator", Generator)


@pytest.mark.usefixtures("no_padding_before_the_softmax")
@pytest.mark.parametrize("kind", ["compact", "untied", "adapted"])
def test_all_translations_are_the_same(kind, exportable, tmp_path, capsys):
    output = run_here(capsys, exportable[kind], tmp_path / "out", "--format", "ctranslate2")
    last = output.splitlines()[-1]
    differing, translated = re.match(r"(\d+) of (\d+) translations differ", last).groups()
    assert (differing, int(translated) > 15) == ("0", True), output
    assert "20 sentences of" in last
    assert float(last.split("by ")[1].split()[0]) < 1e-4
    again = run_here(capsys, "--check", tmp_path / "out", exportable[kind])
    assert again.splitlines()[-1].startswith(f"0 of {translated} translations differ")
    assert os.listdir(tmp_path) == ["out"]


def test_as_typed(exportable, tmp_path):
    flags = ["--format", "ctranslate2", "--quantization", "int8"]
    result = run_as_typed("python", "-m", "kd_ext.export", exportable["compact"], tmp_path / "out", *flags)
    assert result.returncode == 0, result.output
    assert re.match(r"\d+ of \d+ translations differ", result.last_line)
    assert "weights in int8, of 7 bits" in result.output
    assert ctranslate2.contains_model(str(tmp_path / "out"))


def test_ctranslate2s_own_command_takes_an_exported_checkpoint(exportable, tmp_path, capsys):
    """Nothing but its converter: the same bytes, and the mark in the settings."""
    from ctranslate2.converters import FairseqConverter

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    run_here(capsys, exportable["compact"], tmp_path / "model.pt", "--format", "fairseq")
    run_here(capsys, exportable["compact"], ours, "--format", "ctranslate2")
    FairseqConverter(str(tmp_path / "model.pt"), str(tmp_path)).convert(str(theirs))
    assert sorted(os.listdir(ours)) == sorted(os.listdir(theirs))
    for name in ("model.bin", "shared_vocabulary.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    mark = {"exported_by": "kd_ext.export"}
    config = json.loads((theirs / "config.json").read_text())
    assert json.loads((ours / "config.json").read_text()) == {**config, **mark}


def test_stacked_layers_are_stored_once(exportable, tmp_path, capsys):
    run_here(capsys, exportable["compact"], tmp_path / "out", "--format", "ctranslate2")
    weights = load(exportable["compact"])["model"]
    layers = sum(x.numel() for name, x in weights.items() if ".layers." in name)
    table = weights["encoder.embed_tokens.weight"].size(0) * 16
    positions = 2 * 1024 * 16
    assert os.path.getsize(tmp_path / "out" / "model.bin") < 4 * (layers + table + positions) + 10_000


def test_weights_of_seven_bits():
    weights = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    weights[2] = 0
    numbers, scale = seven_bits.quantized_rows(weights)
    assert numbers.dtype == np.int8
    assert np.abs(numbers).max(axis=1).tolist() == [63, 63, 0, 63, 63]
    for row, (whole, s) in enumerate(zip(numbers, scale)):
        assert np.abs(whole / s - weights[row]).max() <= np.abs(weights[row]).max() / 126 + 1e-7


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [("int8", 7), ("int8", 8), ("int8_float16", 7), ("int8_bfloat16", 7), ("int16", None), ("float16", None)],
)
def test_quantizations(quantization, bits, exportable, tmp_path, capsys):
    """Each is read, is smaller, and says nearly the same."""
    run_here(capsys, exportable["compact"], tmp_path / "whole", "--format", "ctranslate2")
    flags = ["--quantization", quantization, *(["--int8-bits", bits] if bits else [])]
    output = run_here(capsys, exportable["compact"], tmp_path / "out", "--format", "ctranslate2", *flags)
    sizes = [os.path.getsize(tmp_path / name / "model.bin") for name in ("out", "whole")]
    assert sizes[0] < sizes[1]
    assert float(output.splitlines()[-1].split("by ")[1].split()[0]) < 0.5


def test_an_older_folder_is_replaced_and_no_other(exportable, tmp_path, capsys):
    out = tmp_path / "out"
    run_here(capsys, exportable["compact"], out, "--format", "ctranslate2")
    before = (out / "model.bin").read_bytes()
    run_here(capsys, exportable["untied"], out, "--format", "ctranslate2")
    assert (out / "model.bin").read_bytes() != before
    (out / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match=r"with mine.txt in it"):
        main([str(exportable["compact"]), str(out), "--format", "ctranslate2"])
    assert (out / "mine.txt").read_text() == "kept"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("config", [None, "{}", "[1]", "[" * 100_000, '{"add_source_eos": true}'])
def test_somebody_elses_model_is_not_replaced(config, tmp_path):
    """A fastText model, one of CTranslate2's that another command wrote: the files have the same names."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.bin").write_text("kept")
    if config is not None:
        (out / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=r"out: is there, with (config\.json|model\.bin) in it"):
        main(["nowhere.pt", str(out), "--format", "ctranslate2"])  # before it looks for that
    assert (out / "model.bin").read_text() == "kept"


def test_output_as_typed(tmp_path, monkeypatch):
    """A slash at the end is for folders, and nothing is not the folder one is in."""
    (tmp_path / "file").write_text("kept")
    monkeypatch.chdir(tmp_path)
    for typed, reason in (("file/", "no folder"), ("", "OUTPUT '': empty"), ("out/", "nowhere.pt: no such file")):
        with pytest.raises(ConfigError, match=reason):
            main(["nowhere.pt", typed, "--format", "ctranslate2"])
    assert os.listdir(tmp_path) == ["file"]


def test_the_older_folder_is_put_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.bin").write_text("kept")
    rename = os.rename

    def refused(source, target):
        if source.endswith(".tmp"):
            raise OSError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
        with folders.folder_written_whole(str(tmp_path / "out")) as part:
            os.mkdir(part)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.bin").read_text() == "kept"


@pytest.mark.parametrize("name", ["config.json", "shared_vocabulary.json"])
def test_a_name_that_anyone_uses_is_not_replaced(name, exportable, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"mine": 1}')
    with pytest.raises(ConfigError, match=f"with {name} in it"):
        main([str(exportable["compact"]), str(tmp_path / "out"), "--format", "ctranslate2"])
    assert (tmp_path / "out" / name).read_text() == '{"mine": 1}'


@pytest.mark.usefixtures("no_padding_before_the_softmax")
def test_a_model_with_few_positions(exportable, tmp_path, capsys):
    """As many words as fairseq-generate gives, and no more than there are positions."""
    path = few_positions(exportable["compact"], tmp_path / "short.pt")
    main([str(path), str(tmp_path / "out"), "--format", "ctranslate2", "--data", str(folder_of(exportable))])
    lines = capsys.readouterr().out.splitlines()
    assert "it has 7 positions: give CTranslate2 max_decoding_length=6 or less" in lines
    differing, translated, endless = re.match(
        r"(\d+) of (\d+) translations differ \((\d+) reach 6 words in both", lines[-1]
    ).groups()
    assert differing == "0"
    assert int(translated) + int(endless) == 20
    assert 0 < int(endless) < 20
    with pytest.raises(ConfigError, match="cannot translate with up to 200 words"):
        main(["--check", str(tmp_path / "out"), str(tmp_path / "out")])


def few_positions(path, output):
    """A checkpoint of a student with 7 positions for what it says."""
    state = load(path)
    state["cfg"]["task"]["max_target_positions"] = state["cfg"]["model"].max_target_positions = 7
    torch.save(state, output)
    return output


def folder_of(exportable):
    return load(exportable["compact"])["cfg"]["task"]["data"]


def test_models_of_other_words_are_not_compared(exportable, tmp_path, capsys):
    run_here(capsys, exportable["compact"], tmp_path / "out", "--format", "ctranslate2")
    path = tmp_path / "out" / "shared_vocabulary.json"
    words = json.loads(path.read_text())
    path.write_text(json.dumps(words[:4] + words[:3:-1]))
    with pytest.raises(ConfigError, match="their source dictionaries are not the same words"):
        main(["--check", str(exportable["compact"]), str(tmp_path / "out")])


def test_what_ctranslate2_lacks_is_named_feature_by_feature(exportable, tmp_path):
    state = load(exportable["compact"])
    vars(state["cfg"]["model"]).update(
        encoder_attention_heads=4, activation_fn="tanh", no_token_positional_embeddings=True, quant_noise_pq=0.1
    )
    for name in list(state["model"]):
        if "embed_positions" in name:
            del state["model"][name]
    for side in ("encoder", "decoder"):
        state["model"][f"{side}.quant_noise.weight"] = torch.eye(16)
    vars(state["cfg"]["model"]).update(encoder_recurrent_stacking=0, decoder_recurrent_stacking=0, encoder_layers=1,
                                       decoder_layers=1, quant_noise_pq_block_size=2)  # fmt: skip
    torch.save(state, exportable["compact"].parent / "odd.pt")
    with pytest.raises(ConfigError) as error:
        main([str(exportable["compact"].parent / "odd.pt"), str(tmp_path / "out"), "--format", "ctranslate2"])
    for reason in (
        "--decoder-attention-heads 2",
        "--activation-fn tanh",
        "--no-token-positional-embeddings",
        "noise-pq",
    ):
        assert reason in str(error.value)
    assert os.listdir(tmp_path) == []


def test_ctranslate2_missing_is_one_line(exportable, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(ConfigError, match=r"--format ctranslate2: CTranslate2 is not installed .*pip install"):
        main([str(exportable["compact"]), str(tmp_path / "out"), "--format", "ctranslate2"])
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(exportable, tmp_path, monkeypatch):
    from ctranslate2.specs.model_spec import ModelSpec

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ModelSpec, "_serialize", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        main([str(exportable["compact"]), str(tmp_path / "out"), "--format", "ctranslate2"])
    assert os.listdir(tmp_path) == []


def random_student(folder, args):
    model, extensions = student_of(args, torch.float32)
    for language in ("src", "tgt"):
        dictionary().save(str(folder / f"dict.{language}.txt"))
    cfg = OmegaConf.structured(TranslationConfig(data=str(folder), source_lang="src", target_lang="tgt"))
    return Student("student.pt", model, args, extensions, TranslationTask.setup_task(cfg), 1, str(folder))


@pytest.fixture
def padding_is_likely(tmp_path):
    """A folder, out, of a model whose likeliest word is padding."""
    student = random_student(tmp_path, settings())
    decoder = student.model.decoder
    with torch.no_grad():
        decoder.output_projection.weight[1] = 30 * decoder.layers[-1].final_layer_norm.bias
    write_folder(student, str(tmp_path / "out"), "float32", 7)
    sentence = ["w5", "w7", "w9"]
    bare = ctranslate2.Translator(str(tmp_path / "out")).translate_batch([sentence], max_decoding_length=9)
    assert "<blank>" in bare[0].hypotheses[0]
    return SimpleNamespace(folder=tmp_path / "out", student=student, sentence=sentence)


def test_padding_is_never_said(padding_is_likely):
    translator = CTranslate2Translator(str(padding_is_likely.folder))
    (found,) = translator.translate([padding_is_likely.sentence], 9)
    assert len(found) == 9
    assert "<blank>" not in found


def test_the_service_of_the_docs(padding_is_likely, monkeypatch, capsys):
    pieces = SimpleNamespace(encode=lambda text, out_type: padding_is_likely.sentence, decode=" ".join)
    processor = SimpleNamespace(SentencePieceProcessor=lambda model_file: pieces)
    monkeypatch.setitem(sys.modules, "sentencepiece", processor)
    monkeypatch.chdir(padding_is_likely.folder.parent)
    page = (ROOT / "docs/deploying.md").read_text()
    exec(re.search(r"^```python\n(import ctranslate2.*?)^```$", page, re.DOTALL | re.MULTILINE)[1], {})
    said = capsys.readouterr().out
    assert "w" in said
    assert "<blank>" not in said


def test_vocabularies_of_older_and_of_other_releases(padding_is_likely):
    """Text, one word a line; and that of both sides comes first, as for CTranslate2, whatever lies beside it."""
    folder = padding_is_likely.folder
    expected = (dictionary().symbols,) * 2
    (folder / "source_vocabulary.json").write_text("{")
    assert CTranslate2Translator(str(folder)).vocabularies == expected
    path = folder / "shared_vocabulary.json"
    words = json.loads(path.read_text())
    path.unlink()
    (folder / "source_vocabulary.json").unlink()
    for side in ("source", "target"):
        (folder / f"{side}_vocabulary.txt").write_text("".join(f"{word}\n" for word in words))
    assert CTranslate2Translator(str(folder)).vocabularies == expected
    for side in ("source", "target"):  # a model of somebody else's, without a word for padding
        (folder / f"{side}_vocabulary.txt").write_text("".join(f"{word}\n" for word in ["<s>", "a", *words[2:]]))
    assert len(CTranslate2Translator(str(folder)).translate([["w5"]], 9)[0]) == 9


@pytest.mark.parametrize("flag", ["--data", "--source-lang", "--target-lang", "--activate-encoder-adapter"])
def test_folders_have_no_use_for_what_is_said_of_checkpoints(flag, padding_is_likely):
    out = str(padding_is_likely.folder)
    with pytest.raises(ConfigError, match=rf"^{flag} x: for a checkpoint, and neither .* leave it out$"):
        main(["--check", out, out, flag, "x"])


@pytest.mark.parametrize("quantization", ["float32", "int8"])
def test_scores_beyond_rounding(quantization, exportable, tmp_path, capsys, monkeypatch):
    """Of int8 they are to be expected; of float32 they mean that the folder is wrong."""
    monkeypatch.setattr(export, "compare", lambda *given: Comparison(20, 0, 1, 0.01, 200))
    arguments = [exportable["compact"], tmp_path / "out", "--format", "ctranslate2", "--quantization", quantization]
    if quantization == "int8":
        assert "1 of 20 translations differ" in run_here(capsys, *arguments).splitlines()[-1]
        return
    with pytest.raises(ConfigError, match=r"another model, do not use it: 1 of 20 translations differ.* by 0\.01 at"):
        run_here(capsys, *arguments)


VARIANTS = {
    "post-norm": {},
    "pre-norm, gelu": {"activation_fn": "gelu", **both(normalize_before=True)},
    "gelu_fast, no scale": {"activation_fn": "gelu_fast", "no_scale_embedding": True},
    "learned positions, normed embeddings": {"layernorm_embedding": True, **both(learned_pos=True)},
    "an output dimension": {"decoder_output_dim": 12},
    "untied factors": both(factorized_embed_dim=6),
    "untied factors and an output dimension": {"decoder_output_dim": 12, **both(factorized_embed_dim=6)},
    "stacked and tied": {"share_all_embeddings": True, **both(recurrent_stacking=3)},
    "adapters": {"activate_encoder_adapter": "hi", "activate_decoder_adapter": "ta", **adapters(),
                 **both(normalize_before=True)},
    "a wider encoder": {"encoder_embed_dim": 32},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_of_random_models(variant, tmp_path):
    """Whatever the converter is given: a vocabulary, a scale or a projection that it took wrongly would show."""
    args = settings(layers=2, **{"encoder_embed_dim": 16, **VARIANTS[variant]})
    student = random_student(tmp_path, args)
    check_ctranslate2(student)
    write_folder(student, str(tmp_path / "out"), "float32", 7)
    sources, targets = (random_sentences(dictionary().symbols, 50, n).tokens for n in (9, 7))
    ours = FairseqTranslator(student.model, student.task).score(sources, targets)
    theirs = CTranslate2Translator(str(tmp_path / "out")).score(sources, targets)
    assert [len(x) for x in ours] == [len(x) + 1 for x in targets]
    for a, b in zip(ours, theirs):
        assert a == pytest.approx(b, abs=1e-4)
