"""python -m kd_ext.export, as typed: fairseq's own commands read what it writes; every wrong argument is one line."""

import math
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from commands import ENVIRONMENT, PLUGIN, run, run_as_typed
from conftest import load, with_adapters

from kd_ext.errors import ConfigError
from kd_ext.export import main
from kd_ext.exporting import fairseq_format
from kd_ext.exporting.comparison import compare

KINDS = ["compact", "untied", "adapted"]


@pytest.fixture
def export(tmp_path_factory):
    """Runs the command, forked."""
    return lambda *arguments: run(tmp_path_factory.mktemp("log") / "log", "kd_ext.export", *arguments)


def translations(output):
    found = dict(re.findall(r"^H-(\d+)\t\S+\t(.*)$", output, flags=re.M))
    assert len(found) == 20
    assert len(set(found.values())) > 8
    return found


@pytest.fixture(scope="module")
def exported(exportable, data, tmp_path_factory):
    """What the command, as typed, wrote for each kind."""
    found = {}
    for kind in KINDS:
        found[kind] = tmp_path_factory.mktemp(kind) / "out.pt"
        typed = ["python", "-m", "kd_ext.export", exportable[kind], found[kind], "--format", "fairseq"]
        result = run_as_typed(*typed)
        assert result.returncode == 0, result.output
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_plain_fairseq_translates_the_same(kind, exportable, exported, data, tmp_path):
    """Without the plugin, and without making torch load what it thinks unsafe."""
    flags = ["--cpu", "--beam", 3, "--max-len-b", 20, "--batch-size", 1]  # upstream's fused encoder fails on padding
    ours = run(tmp_path / "ours", "fairseq-generate", data, *PLUGIN, "--path", exportable[kind], *flags)
    theirs = run_as_typed("fairseq-generate", data, "--path", exported[kind], *flags)
    assert theirs.returncode == 0, theirs.output
    assert translations(theirs.output) == translations(ours.output)


def test_the_trained_adapter_is_what_is_exported(exportable, data, tmp_path, export):
    result = export(exportable["adapted"], tmp_path / "none.pt", "--format", "fairseq", "--activate-encoder-adapter",
                    "none", "--activate-decoder-adapter", "none")  # fmt: skip
    assert result.returncode == 0, result.output
    assert "the encoder's adapters left out" in result.output
    flags = ["--cpu", "--beam", 3, "--max-len-b", 20]
    without = run(tmp_path / "log", "fairseq-generate", data, *PLUGIN, "--path", tmp_path / "none.pt", *flags)
    switched = ["--activate-encoder-adapter", "none", "--activate-decoder-adapter", "none"]
    ours = run(tmp_path / "log2", "fairseq-generate", data, *PLUGIN, "--path", exportable["adapted"], *flags, *switched)
    assert translations(without.output) == translations(ours.output)


def test_the_file_is_plain_data_and_its_dictionaries_lie_beside_it(exported, data):
    """Loaded by torch alone, and by fairseq's own loader from its own folder, in a process without the plugin."""
    path = exported["compact"]
    state = torch.load(path) if hasattr(torch.serialization, "add_safe_globals") else load(path)
    assert "last_optimizer_state" not in state
    assert state["extra_state"].keys() == {"train_iterator"}
    assert not isinstance(state["cfg"]["model"], Namespace)
    for name in ("dict.src.txt", "dict.tgt.txt"):
        assert (path.parent / name).read_bytes() == (data / name).read_bytes()
    code = (
        "import sys; from fairseq.checkpoint_utils import load_model_ensemble_and_task as load;"
        "models, cfg, task = load([sys.argv[1]]); print(type(models[0]).__name__, len(task.target_dictionary));"
        "print([name for name in sys.modules if name.split('.')[0] == 'kd_ext'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    words = len((data / "dict.tgt.txt").read_text().splitlines()) + 4
    assert done.stdout.splitlines()[-2:] == [f"TransformerModel {words}", "[]"]


def test_what_it_says(exportable, tmp_path, export):
    result = export(exportable["compact"], tmp_path / "out.pt", "--format", "fairseq")
    for phrase in (
        "the encoder's layer written out 3 times",
        "the decoder's embeddings multiplied out",
        "dict.src.txt",
    ):
        assert phrase in result.output
    rows = re.findall(r"^(\S+) +([\d.]+) MB +([\d.]+) MB$", result.output, flags=re.M)
    assert [row[0] for row in rows] == [str(exportable["compact"]), str(tmp_path / "out.pt")]
    assert float(rows[1][1]) == pytest.approx(os.path.getsize(tmp_path / "out.pt") / 1e6, abs=0.005)


def test_an_export_can_be_exported_replaced_and_checked(exportable, tmp_path, export):
    once, twice = tmp_path / "once" / "out.pt", tmp_path / "twice" / "out.pt"
    for path in (once, twice):
        path.parent.mkdir()
    assert export(exportable["compact"], once, "--format", "fairseq").returncode == 0
    assert export(once, twice, "--format", "fairseq").returncode == 0
    first, second = load(once)["model"], load(twice)["model"]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert export(exportable["untied"], once, "--format", "fairseq").returncode == 0
    result = export("--check", exportable["compact"], twice)
    assert re.match(r"0 of \d+ translations differ", result.last_line), result.output
    assert float(re.search(r"by (\S+) at most", result.last_line)[1]) < 2e-5
    result = export("--check", exportable["compact"], exportable["untied"])
    assert int(result.last_line.split()[0]) > 8
    assert float(re.search(r"by (\S+) at most", result.last_line)[1]) > 0.1


def test_a_exportable_file_is_never_replaced(exportable, data, tmp_path, export):
    path = exportable["compact"]
    before = path.read_bytes()
    same = export(path, path, "--format", "fairseq")
    other = export(exportable["untied"], path, "--format", "fairseq")
    assert "this command reads it" in same.last_line
    assert "not what this command writes" in other.last_line
    (tmp_path / "dict.src.txt").write_text("w1 1\n")
    beside = export(path, tmp_path / "out.pt", "--format", "fairseq")
    assert "not the dictionary of" in beside.last_line
    assert [x.returncode for x in (same, other, beside)] == [1, 1, 1]
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["dict.src.txt"]


def test_what_cannot_be_exported_is_named_feature_by_feature(exportable, tmp_path, export):
    state = with_adapters(load(exportable["adapted"]), gated=True)
    vars(state["cfg"]["model"]).update(adapter_activation_fn="tanh", encoder_normalize_before=False)
    for name in ("weight", "bias"):
        del state["model"][f"encoder.layer_norm.{name}"]
    gated = exportable["adapted"].parent / "gated.pt"
    torch.save(state, gated)
    result = export(gated, tmp_path / "out.pt", "--format", "fairseq")
    assert result.returncode == 1
    line = result.last_line
    assert line.startswith("kd_ext: error: --activate-encoder-adapter hi:")
    for reason in ("--encoder-adapter-use-gating", "--adapter-activation-fn tanh", "no --encoder-normalize-before"):
        assert reason in line
    assert "'--activate-encoder-adapter none' leaves it out" in line
    assert os.listdir(tmp_path) == []


def test_other_dictionaries_are_told_by_their_fingerprint(exportable, data, tmp_path, export):
    words = (data / "dict.src.txt").read_text().splitlines()
    for name in ("dict.src.txt", "dict.tgt.txt"):
        (tmp_path / name).write_text("\n".join(reversed(words)) + "\n")
    result = export(exportable["compact"], tmp_path / "out.pt", "--format", "fairseq", "--data", tmp_path, "-s",
                    "src", "-t", "tgt")  # fmt: skip
    assert "is not the one that it was trained with" in result.last_line


def without_languages(path, output, recorded, data):
    """A checkpoint whose settings name no languages, as of a run without -s and -t."""
    state = load(path)
    state["cfg"]["task"].update(source_lang=None, target_lang=None, data=str(data))
    state["extra_state"].pop("trained_with", None)
    if recorded:
        state["extra_state"]["trained_with"] = {"languages": recorded}
    torch.save(state, output)
    return output


@pytest.mark.parametrize("recorded", [None, "src-tgt", "a-b-c"])
def test_dictionaries_beside_the_checkpoint_come_first(recorded, exportable, data, tmp_path, export):
    """Whoever says the languages: here the data does, or the checkpoint alone."""
    old, beside = tmp_path / "old", tmp_path / "with:colon"
    for folder in (old, beside):
        folder.mkdir()
    words = (data / "dict.src.txt").read_text().splitlines()
    for name in ("dict.src.txt", "dict.tgt.txt"):
        shutil.copy(data / name, beside)
        (old / name).write_text("\n".join(reversed(words)) + "\n")
    if recorded != "src-tgt":
        (old / "train.src-tgt.src.idx").write_text("")
    path = without_languages(exportable["compact"], beside / "model.pt", recorded, old)
    (tmp_path / "out").mkdir()
    result = export(path, tmp_path / "out" / "model.pt", "--format", "fairseq")
    assert result.returncode == 0, result.output
    assert f"dictionaries of {beside}\n" in result.output
    assert (tmp_path / "out" / "dict.src.txt").read_bytes() == (data / "dict.src.txt").read_bytes()


@pytest.mark.parametrize("content", [b"w1 one\n", b"w1 1\nw1 2\n", b"\xff\xfe 1\n"])
def test_a_damaged_dictionary_is_one_line(content, exportable, data, tmp_path, export):
    """Beside the checkpoint, and where one is to be written."""
    path = tmp_path / "model.pt"
    shutil.copy(exportable["compact"], path)
    (tmp_path / "dict.src.txt").write_bytes(content)
    shutil.copy(data / "dict.tgt.txt", tmp_path)
    languages = ["-s", "src", "-t", "tgt"]
    result = export(path, tmp_path / "out.pt", "--format", "fairseq", *languages)
    assert result.last_line.startswith(f"kd_ext: error: {tmp_path}/dict.src.txt: damaged, or not a dictionary")
    result = export(exportable["compact"], tmp_path / "out.pt", "--format", "fairseq", "--data", data)
    assert "is there, and not the dictionary of" in result.last_line
    assert not (tmp_path / "out.pt").exists()


def test_what_cannot_be_written_leaves_no_dictionaries(exportable, tmp_path, monkeypatch):
    def full(*arguments):
        raise ConfigError("no space left")

    monkeypatch.setattr(fairseq_format, "write_checkpoint", full)
    with pytest.raises(ConfigError, match="no space left"):
        main([str(exportable["compact"]), str(tmp_path / "out.pt"), "--format", "fairseq"])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_an_adapter_that_neither_has(side, exportable, export):
    path = exportable["compact"]
    result = export("--check", path, path, f"--activate-{side}-adapter", "nosuch")
    assert result.returncode == 1
    assert f"--activate-{side}-adapter nosuch: neither" in result.last_line
    assert f"has adapters in its {side}; leave it out" in result.last_line


def assert_of_no_use(export, path, said):
    """Neither compared nor exported; nothing is written beside it."""
    for arguments in (["--check", path, path], [path, path.parent / "out.pt", "--format", "fairseq"]):
        result = export(*arguments)
        assert result.returncode == 1
        assert f"{path}: {said}" in result.last_line
    assert os.listdir(path.parent) == [path.name]


def test_what_fairseq_cannot_run_is_refused(exportable, tmp_path, export):
    """Of swish it calls the class; an adapter of silu, the same function, can be no layer of its models."""
    state = load(exportable["adapted"])
    vars(state["cfg"]["model"]).update(activation_fn="swish", adapter_activation_fn="silu")
    path = tmp_path / "swish.pt"
    torch.save(state, path)
    assert_of_no_use(export, path, "--activation-fn swish: fairseq can build a model with it, and run none")


class Says:
    """A translator that says of each sentence what it is given: words, and how likely it finds them."""

    def __init__(self, said, scores, longest=4):
        self._said, self._scores, self.longest_translation = said, scores, longest

    def translate(self, sentences, longest):
        assert longest == 4
        return [self._said[int(sentence[0])] for sentence in sentences]

    def score(self, sentences, translations):
        return [[self._scores[int(s[0])]] * len(t) for s, t in zip(sentences, translations)]


@pytest.mark.parametrize(("ours", "theirs", "expected"), [(-1.0, -1.5, 0.5), (math.nan, -1.0, math.nan),
                                                          (-1.0, math.nan, math.nan), (-math.inf, -math.inf, 0.0),
                                                          (-1.0, -math.inf, math.inf)])  # fmt: skip
def test_scores_that_are_no_numbers_do_not_agree(ours, theirs, expected):
    sides = (Says([["w1"]] * 70, [score] * 70) for score in (ours, theirs))
    found = compare(*sides, [[str(i)] for i in range(70)], "").score
    assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_training_that_diverged_is_not_exported(value, exportable, tmp_path, export):
    state = load(exportable["untied"])
    state["model"]["decoder.layernorm_embedding.bias"][0] = value
    path = tmp_path / "diverged.pt"
    torch.save(state, path)
    assert_of_no_use(export, path, "its decoder.layernorm_embedding.bias has values that are not finite")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "fairseq"], "what to export is missing"),
        (["a.pt", "b.pt"], "--format is missing"),
        (["nowhere.pt", "b.pt", "--format", "fairseq"], "nowhere.pt: no such file"),
        (["a.pt", "nowhere/b.pt", "--format", "fairseq"], "no folder"),
        (
            ["a.pt", "b.pt", "--format", "fairseq", "--quantization", "int8"],
            "--quantization int8: --format fairseq writes float32",
        ),
        (["a.pt", "b.pt", "--format", "fairseq", "--int8-bits", "7"], "--int8-bits 7: of weights in int8"),
        (["a.pt", "b", "--format", "huggingface"], "a.pt: no such file"),
        (["--check", "a.pt", "b.pt", "--format", "fairseq"], "--format fairseq: not with --check"),
        (["--check", "a.pt", "nowhere.pt"], "a.pt: no such file"),
        (["STUDENT", "b.pt", "--format", "fairseq", "--data", "nowhere"], "--data nowhere: no such folder"),
        (["STUDENT", "b.pt", "--format", "fairseq", "--data", "."], "--data .: no dict.src.txt"),
        (["STUDENT", "b.pt", "--format", "fairseq", "--activate-encoder-adapter", "hi"], "has no adapters"),
        (["STUDENT", ".", "--format", "fairseq"], "no regular file"),
    ],
)
def test_bad_usage_is_one_line(arguments, message, exportable, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [exportable["compact"] if x == "STUDENT" else x for x in arguments]
    result = run(tmp_path / "log", "kd_ext.export", *arguments)
    assert result.returncode == 1
    assert result.last_line.startswith("kd_ext: error: ")
    assert message in result.last_line
    assert os.listdir(tmp_path) == ["log"]


@pytest.mark.parametrize("place", [0, 31, 32, 69])
def test_one_word_among_many_sentences(place):
    """Wherever it is: in the first of several batches, in the last, at their ends."""
    sentences = [[str(i)] for i in range(70)]
    same, scores = [["w", "x"] for _ in sentences], [-1.0] * 70
    others, other_scores = list(same), list(scores)
    others[place], other_scores[place] = ["w", "y"], -1.25
    found = compare(Says(same, scores), Says(others, other_scores, longest=9), sentences, "")
    assert (found.sentences, found.endless, found.differing, found.score) == (70, 0, 1, 0.25)
    assert found.longest == 4


def test_translations_that_end_in_one_alone_differ():
    long, short = ["w"] * 4, ["w"] * 2
    pairs = [(long, long), (long, short), (short, long), (short, short), (long, ["x"] * 4)]
    ours, theirs = zip(*pairs)
    sentences = [[str(i)] for i in range(len(pairs))]
    found = compare(*(Says(side, [-1.0] * 5) for side in (ours, theirs)), sentences, "")
    assert (found.endless, found.differing) == (2, 2)
