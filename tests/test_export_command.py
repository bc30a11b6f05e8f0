"""python -m kd_ext.export, as typed: fairseq's own commands read what it writes; every wrong argument is one line."""

import os
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from commands import ENVIRONMENT, PLUGIN, run, run_as_typed
from conftest import load, with_adapters

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
        (["STUDENT", "b.pt", "--format", "fairseq", "--data", "."], "--data .: no dict.SRC.txt"),
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
