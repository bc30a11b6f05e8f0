"""``--torch-compile``: the numbers, names and messages of a run without it.

torch's own compiler takes a minute to build the kernels of even these models: one test has it. The others let torch
trace and specialize the layers as it would, and run what it traced as it is.
"""

import re
import shutil
from collections import Counter

import pytest
import torch
from commands import PLUGIN, ROOT, run, run_as_typed
from conftest import KD, SIZES, TRAINING, load
from test_bad_usage import assert_refused
from test_cli_inference import hypotheses
from test_cli_train import logged
from test_configs import SHORT, TINY
from test_resume import is_trained
from tiny_models import batch, both, build, logits

from kd_ext.errors import ConfigError
from kd_ext.modules import compiled_layers
from kd_ext.upstream import torch_compile

OWN = TRAINING[len(PLUGIN) :]  # without --user-dir

HAS_COMPILER = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 3)
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="torch < 2.3")
COMPILE = ["--torch-compile"]
ADAPTERS = ["add-adapters", "adapter-ids=hi,ta"]
# of messages by which torch's compiler makes itself heard, and of its modules' names
FLOOD = (
    "torch._dynamo",
    "torch._inductor",
    "torch._functorch",
    "recompil",
    "Graph break",
    "graph break",
    "Unsupported",
)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A user folder that is the plugin, with a compiler that traces alone, and says after each update how often."""
    folder = tmp_path_factory.mktemp("traced") / "traced_layers"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "import functools\n"
        "import torch\n"
        "import kd_ext\n"
        "from fairseq.trainer import Trainer\n"
        "torch.compile = functools.partial(torch.compile, backend='eager')\n"
        "step = Trainer.train_step\n"
        "def train_step(self, *args, **kwargs):\n"
        "    from torch._dynamo.utils import counters\n"
        "    logged = step(self, *args, **kwargs)\n"
        "    print('traced', counters['stats']['unique_graphs'], 'broken', sum(counters['graph_break'].values()))\n"
        "    return logged\n"
        "Trainer.train_step = train_step\n"
    )
    return ["--user-dir", folder]


def graphs(output):
    """After each update how often layers have been traced so far."""
    return [int(count) for count in re.findall(r"^traced (\d+) broken 0$", output, re.MULTILINE)]


def assert_alike(a, b, names=("nll_loss", "loss", "kd_loss", "gnorm")):
    """All losses of two runs, which print three decimals."""
    for name in names:
        losses = logged(a.output, name)
        assert losses, name
        assert logged(b.output, name) == pytest.approx(losses, abs=2.1e-3), name


@needs_compiler
def test_training_as_typed(data, teacher, tmp_path):
    """By torch's own compiler: the same losses, one line about compiling, and no other."""
    flags = [*TRAINING, "--arch", "transformer", *SIZES, *KD, "--teacher-checkpoint-path", teacher, "--dropout", "0"]
    flags += ["--max-update", 40, "--no-epoch-checkpoints", "--disable-validation"]
    runs = [
        run_as_typed("fairseq-train", data, *flags, *more, "--save-dir", tmp_path / name, limit=900)
        for name, more in (("a", []), ("b", COMPILE))
    ]
    for result in runs:
        assert result.returncode == 0, result.output
    assert_alike(*runs)
    plain, said = ([line for line in result.output.splitlines() if "compil" in line] for result in runs)
    said = [line for line in said if line not in plain and "'torch_compile': True" not in line]
    assert len(said) == 1, said
    assert re.search(r"--torch-compile: compiling took \d+ seconds$", said[0])
    assert not any(word in runs[1].output for word in FLOOD)
    informing = [[line for line in result.output.splitlines() if "| INFO |" in line] for result in runs]
    assert len(informing[1]) == len(informing[0]) + 1
    others = [Counter(line for line in result.output.splitlines() if "| INFO |" not in line) for result in runs]
    more = others[1] - others[0]
    # what torch says of a machine: an early Python 3.13, a build for GPUs where there is none
    of_machine = re.compile(r"Guards may run slower on Python|No CUDA runtime is found|^ +warnings\.warn\($")
    assert not [line for line in more if not of_machine.search(line)]
    plain, compiled = (load(tmp_path / name / "checkpoint_last.pt") for name in "ab")
    assert list(plain["model"]) == list(compiled["model"])
    for name, tensor in plain["model"].items():
        assert tensor.shape == compiled["model"][name].shape


@pytest.fixture(scope="module")
def typed(data, teacher, traced):
    """Runs training with the compiler that traces, or without one; dropout is off and all losses are printed."""

    def typed(save_dir, *flags, updates, arch="transformer"):
        save_dir.mkdir(parents=True, exist_ok=True)
        given = [
            data,
            *traced,
            *TRAINING[len(PLUGIN) :],
            "--arch",
            arch,
            *SIZES,
            *KD,
            "--teacher-checkpoint-path",
            teacher,
        ]
        given += ["--dropout", "0", "--no-epoch-checkpoints", "--save-dir", save_dir, "--max-update", updates, *flags]
        result = run(save_dir / f"log{updates}", "fairseq-train", *given)
        assert result.returncode == 0, result.output
        return result

    return typed


@needs_compiler
@pytest.mark.parametrize(
    ("arch", "flags"),
    [
        ("transformer", ["--kd-strategy", "batch_level", "--kd-rate", "0.5"]),
        ("transformer", ["--encoder-normalize-before", "--decoder-normalize-before"]),
        ("transformer_ext", ["--encoder-recurrent-stacking", "3", "--decoder-recurrent-stacking", "3"]),
        ("transformer_ext", [f"--{side}-{flag}" for side in ("encoder", "decoder") for flag in ADAPTERS]),
    ],
)
def test_losses_and_names(typed, tmp_path, arch, flags):
    plain = typed(tmp_path / "plain", *flags, updates=12, arch=arch)
    compiled = typed(tmp_path / "compiled", *flags, *COMPILE, updates=12, arch=arch)
    assert_alike(plain, compiled)
    assert not graphs(plain.output)[-1]
    assert graphs(compiled.output)[-1]
    a, b = (load(tmp_path / name / "checkpoint_last.pt") for name in ("plain", "compiled"))
    assert list(a["model"]) == list(b["model"])
    for name in filter(is_trained, a["model"]):
        torch.testing.assert_close(a["model"][name], b["model"][name], rtol=0, atol=5e-3)


@needs_compiler
def test_resumed_runs_with_it_and_without(typed, tmp_path):
    """Stopped in mid-epoch, a run goes on as if it had not been, with the flag or without, whichever it began with."""
    whole = typed(tmp_path / "whole", updates=20)
    for first in ([], COMPILE):
        typed(tmp_path / f"first{len(first)}", *first, updates=10)
        for then in (COMPILE, [])[: 1 + len(first)]:
            save_dir = tmp_path / f"first{len(first)}-then{len(then)}"
            shutil.copytree(tmp_path / f"first{len(first)}", save_dir)
            resumed = typed(save_dir, *then, updates=20)
            assert "Loaded checkpoint" in resumed.output
            assert (graphs(resumed.output)[-1] > 0) == bool(then)
            for name in ("nll_loss", "kd_loss"):
                expected = logged(whole.output, name)[10:]
                assert len(expected) == 10
                assert logged(resumed.output, name) == pytest.approx(expected, abs=2.1e-3)


@needs_compiler
def test_versions_of_a_layer(typed, tmp_path):
    """Over three epochs of batches of all lengths: at most 3 of each of the 4 kinds of layer, none in the last."""
    compiled = typed(tmp_path, *COMPILE, "--disable-validation", "--dropout", "0.1", updates=48)
    found = graphs(compiled.output)
    assert len(found) == 48
    assert 4 <= found[-1] <= 12  # 9 with torch 2.13, all in the first four updates
    assert found[-1] == found[31]


@needs_compiler
def test_translations(data, student, traced):
    """Of generate and interactive: those without it, and scores to the digits printed; validate's loss."""
    at = ["--path", student, "--cpu"]
    outputs = [run_as_typed("fairseq-generate", data, *traced, *at, "--beam", 3, *more) for more in ([], COMPILE)]
    found = [hypotheses(result.output) for result in outputs]
    assert len(found[0]) == 20
    for before, after in zip(*found):
        (index, score, words), (same, near, too) = before.split("\t"), after.split("\t")
        assert (index, words) == (same, too)
        assert float(near) == pytest.approx(float(score), abs=1e-4)
    text = "__src__hi __tgt__en w1 w2 w3\n__src__ta __tgt__en w4\n"
    lines = [
        [line.split("\t")[2] for line in hypotheses(result.output)]
        for result in (
            run_as_typed("fairseq-interactive", data, *traced, *at, *more, stdin=text) for more in ([], COMPILE)
        )
    ]
    assert len(lines[0]) == 2
    assert lines[0] == lines[1]
    losses = [
        re.findall(r"valid .*\| nll_loss ([\d.]+)", result.output)
        for result in (
            run_as_typed("fairseq-validate", data, *traced, *at, "--max-tokens", 200, *more) for more in ([], COMPILE)
        )
    ]
    assert losses[0] == losses[1] != []


@needs_compiler
def test_under_hydra(data, teacher, tmp_path, traced):
    settings = [f"common.user_dir={traced[1]}", f"task.data={data}", f"checkpoint.save_dir={tmp_path / 'out'}"]
    settings += [f"task.teacher_checkpoint_path={teacher}", "checkpoint.no_save=true", *SHORT, *TINY]
    recipe = ["--config-dir", ROOT / "configs", "--config-name", "word_level", *settings]
    for more, is_traced in (([], False), (["+torch_compile=true"], True)):
        result = run(tmp_path / "log", "fairseq-hydra-train", *recipe, *more)
        assert result.returncode == 0, result.output
        assert (graphs(result.output)[-1] > 0) == is_traced


def test_an_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.2.2+cpu")
    torch_compile._require_compiler.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"--torch-compile: torch 2\.2\.2\+cpu is too old; torch >= 2\.3"):
            torch_compile._require_compiler()
    finally:
        torch_compile._require_compiler.cache_clear()


@pytest.mark.skipif(HAS_COMPILER, reason="torch >= 2.3")
def test_the_old_torch_that_is_here(distil, tmp_path):
    result = distil(tmp_path, *COMPILE, "--max-update", "1")
    assert_refused(result, tmp_path, "--torch-compile: torch", "torch >= 2.3")


@needs_compiler
def test_no_compiler(data, teacher, tmp_path):
    """As on a machine without one of C++."""
    flags = [*TRAINING, "--arch", "transformer", *SIZES, *KD, "--teacher-checkpoint-path", teacher, "--max-update", 1]
    missing = {"PATH": "/nowhere", "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = run_as_typed("fairseq-train", data, *flags, *COMPILE, "--save-dir", tmp_path, **missing)
    assert_refused(result, tmp_path, "--torch-compile: torch cannot compile here", "leave it out")


@needs_compiler
def test_checkpointed_activations(distil, tmp_path):
    result = distil(tmp_path, *COMPILE, "--checkpoint-activations", "--max-update", "1")
    assert_refused(result, tmp_path, "--torch-compile: not with --checkpoint-activations")


@needs_compiler
def test_a_model_without_layers(data, tmp_path, traced):
    small = ["--encoder-embed-dim", 16, "--decoder-embed-dim", 16, "--decoder-out-embed-dim", 16]
    small += ["--encoder-layers", "[(16, 3)]", "--decoder-layers", "[(16, 3)]", "--max-update", 1]
    small += ["--criterion", "label_smoothed_cross_entropy", "--save-dir", tmp_path / "fconv"]
    result = run(tmp_path / "log", "fairseq-train", data, *traced, *OWN, "--arch", "fconv", *small, *COMPILE)
    assert_refused(result, tmp_path / "fconv", "--torch-compile: a FConvModel has no layers", "leave it out")


@needs_compiler
def test_layers_of_another_kind(data, tmp_path, traced):
    """An LSTM's are cells."""
    lstm = [
        data,
        *traced,
        *TRAINING[len(PLUGIN) :],
        "--arch",
        "lstm",
        "--criterion",
        "label_smoothed_cross_entropy",
        "--dropout",
        0,
    ]
    lstm += ["--max-update", 5, "--no-save", "--encoder-embed-dim", 16, "--decoder-embed-dim", 16]
    lstm += ["--decoder-hidden-size", 16, "--encoder-hidden-size", 16, "--decoder-out-embed-dim", 16]
    runs = [run(tmp_path / "log", "fairseq-train", *lstm, *more) for more in ([], COMPILE)]
    assert [result.returncode for result in runs] == [0, 0], runs[1].output
    assert_alike(*runs, names=("nll_loss", "loss"))
    assert graphs(runs[1].output)[-1] > 0


@needs_compiler
def test_layers_of_a_kind_are_compiled_together(monkeypatch):
    """However many there are, and whatever sizes are those of the model by chance."""
    from torch._dynamo.utils import counters

    compiling, counts = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compiling(*args, **kwargs, backend="eager"))
    torch_compile._no_states()
    for layers in (2, 5):
        torch._dynamo.reset()
        model = build("transformer", **both(layers=layers)).train()
        compiled_layers.compile_layers(model)
        before = counters["stats"]["unique_graphs"]
        width = model.encoder.layers[0].embed_dim
        for sentences, length in ((width, 5), (3, width), (4, 6)):
            tokens = torch.full((sentences, length), 5)
            logits(model, tokens, tokens)
        counts.append(counters["stats"]["unique_graphs"] - before)
    assert counts[1] == counts[0] <= 3


@needs_compiler
@pytest.mark.parametrize("pre_norm", [False, True])
def test_what_a_compiled_model_is(pre_norm, monkeypatch):
    """Its parameters and names stay; full passes give the same logits; decoding step by step compiles nothing."""
    from torch._dynamo.utils import counters

    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compiling(*args, **kwargs, backend="eager"))
    model = build("transformer_ext", **both(normalize_before=pre_norm)).eval()
    source, previous = batch()
    with torch.no_grad():
        expected, names = logits(model, source, previous), list(model.state_dict())
        assert compiled_layers.compile_layers(model) == 4
        assert list(model.state_dict()) == names
        assert all(layer._compiled_call_impl is not None for layer in model.encoder.layers)
        before = counters["stats"]["unique_graphs"]
        torch.testing.assert_close(logits(model, source, previous), expected, rtol=1e-5, atol=1e-5)
        after = counters["stats"]["unique_graphs"]
        assert after > before
        encoded, state, steps = model.encoder(source, source.ne(1).sum(1)), {}, []
        for t in range(1, previous.size(1) + 1):
            steps.append(model.decoder(previous[:, :t], encoder_out=encoded, incremental_state=state)[0])
        assert counters["stats"]["unique_graphs"] == after
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-5, atol=1e-5)
