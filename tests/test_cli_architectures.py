"""The commands as a user types them: adapters on a base, apart and merged, and distillation into every feature."""

import ast
import re

import pytest
import torch
from commands import PLUGIN, run
from conftest import KD, load, needs_half
from fairseq import options
from test_architectures import DEAD

from kd_ext import adapters as tool
from kd_ext.errors import ConfigError

IDS = "as,bn,gu,hi,kn,ml,mr,or,pa,ta,te"
CRITERION = ["--criterion", "label_smoothed_cross_entropy"]
FLAGS = ["--adapter-activation-fn", "gelu", "--load-checkpoint-liberally"]
RESET = ["--reset-optimizer", "--reset-lr-scheduler", "--reset-meters", "--reset-dataloader"]
SIDES = ("encoder", "decoder")


def adapter_flags(trained, ids=IDS):
    flags = []
    for side in SIDES:
        flags += [f"--{side}-add-adapters", f"--{side}-adapter-reduction-factor", "2", f"--{side}-adapter-ids", ids]
        flags += [f"--{side}-train-adapter", trained]
    return flags


def activate(name):
    return [flag for side in SIDES for flag in (f"--activate-{side}-adapter", name)]


def weights(path):
    return {n: t for n, t in load(path)["model"].items() if "_float" not in n}


@pytest.fixture(scope="module")
def adapted(train, teacher, tmp_path_factory):
    """Adapters of two languages, trained apart on one base of upstream's architecture, in two ways."""
    made = {}
    for name, start in (("hi", ["--finetune-from-model", teacher]), ("ta", ["--restore-file", teacher, *RESET])):
        folder = tmp_path_factory.mktemp(name)
        flags = [*CRITERION, *adapter_flags(name), *FLAGS, *start, "--max-update", "15"]
        result = train(folder, *flags, arch="transformer_adapter")
        assert result.returncode == 0, result.output
        made[name] = folder / "checkpoint_last.pt", result.output
    return made


@pytest.fixture(scope="module")
def merged(adapted, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    for name, (path, _) in adapted.items():
        tool.main(["export", str(path), name, str(folder / name)])
    tool.main(["merge", str(teacher), *(str(folder / name) for name in adapted), "--output", str(folder / "merged.pt")])
    return folder / "merged.pt"


@pytest.fixture
def generate(data, tmp_path):
    def generate(path, *flags):
        common = [*PLUGIN, "--cpu", "--path", path, "--max-tokens", "300", "--num-workers", "0", "--beam", "3"]
        result = run(tmp_path / "log", "fairseq-generate", data, *common, *flags)
        assert result.returncode == 0, result.output
        return sorted(re.findall(r"^[HP]-.*", result.output, flags=re.M))  # translations and their scores

    return generate


@pytest.mark.parametrize("name", ["hi", "ta"])
def test_one_adapter_trains_on_a_base_that_stays(adapted, teacher, name):
    path, output = adapted[name]
    after, base = weights(path), weights(teacher)
    assert all(torch.equal(after[n], t) for n, t in base.items() if n in after)
    assert {n for n in base if n not in after} == {n for n in base if re.search(r"(proj|fc\d)_(weight|bias)$", n)}
    up = {n: t.abs().sum() > 0 for n, t in after.items() if ".up.weight" in n}
    assert len(up) == 2 * len(IDS.split(","))
    assert {n for n, moved in up.items() if moved} == {f"{s}.layers.0.adapters.{name}.up.weight" for s in SIDES}
    trained = 2 * sum(t.numel() for n, t in after.items() if n.startswith(f"encoder.layers.0.adapters.{name}."))
    assert f"(num. trained: {trained:,})" in output
    assert "liberally: missing: encoder.layers.0.adapters.* (66), decoder.layers.0.adapters.* (66)\n" in output


def test_translating_apart_merged_and_without(adapted, merged, teacher, generate):
    base = generate(teacher)
    outputs = {name: generate(path) for name, (path, _) in adapted.items()}  # no flag: the one that was trained
    assert outputs["hi"] != base != outputs["ta"] != outputs["hi"]
    for name, expected in outputs.items():
        assert generate(merged, *activate(name)) == expected
    assert generate(adapted["hi"][0], *activate("none")) == base
    assert generate(merged) == base


@needs_half
def test_adapters_of_a_run_in_half_precision(train, teacher, generate, tmp_path):
    flags = [*CRITERION, *adapter_flags("hi"), *FLAGS, "--finetune-from-model", teacher, "--max-update", "5"]
    half = [*flags, "--memory-efficient-fp16", "--fp16-init-scale", "4"]
    result = train(tmp_path, *half, arch="transformer_adapter")
    assert result.returncode == 0, result.output
    tool.main(["export", str(tmp_path / "checkpoint_last.pt"), "hi", str(tmp_path / "hi")])
    tool.main(["merge", str(teacher), str(tmp_path / "hi"), "--output", str(tmp_path / "merged.pt")])
    assert generate(tmp_path / "merged.pt") == generate(teacher)
    assert generate(tmp_path / "merged.pt", *activate("hi")) != generate(teacher)


def test_interactive_and_validate_know_the_flags(merged, data, tmp_path):
    sentence = tmp_path / "sentence"
    sentence.write_text("__src__hi __tgt__en w1 w2 w3\n")
    common = [data, *PLUGIN, "--cpu", "--path", merged]
    scores, losses = set(), set()
    for name in ("hi", "none"):
        done = run(tmp_path / name, "fairseq-interactive", *common, "--input", sentence, *activate(name))
        scores.add(re.search(r"^H-0\t(\S+)", done.output, flags=re.M).group(1))
        flags = ["--max-tokens", "300", *activate(name), "--num-workers", "0"]
        done = run(tmp_path / name, "fairseq-validate", *common, *flags)
        losses.add(re.search(r"\| loss (\S+)", done.output).group(1))
    assert (len(scores), len(losses)) == (2, 2)


@pytest.mark.parametrize("parser", [options.get_generation_parser, options.get_interactive_generation_parser])
def test_the_flags_join_the_model_overrides(parser):
    given = ["data", "--path", "x", "--model-overrides", "{'dropout': 0.5}", "--activate-encoder-adapter", "hi"]
    args = options.parse_args_and_arch(parser(), given)
    assert ast.literal_eval(args.model_overrides) == {"dropout": 0.5, "activate_encoder_adapter": "hi"}
    assert options.parse_args_and_arch(parser(), given[:5]).model_overrides == "{'dropout': 0.5}"
    given[4] = "x"
    with pytest.raises(ConfigError, match="--model-overrides x: not a dictionary"):
        options.parse_args_and_arch(parser(), given)


def test_wrong_use_is_one_line(train, teacher, adapted, data, tmp_path):
    def line(result):
        assert result.returncode == 1
        assert "Traceback" not in result.output
        return result.last_line

    def translate(path, name):
        flags = [data, *PLUGIN, "--cpu", "--max-tokens", "300", "--path", path, *activate(name)]
        return line(run(tmp_path / "log", "fairseq-generate", *flags))

    expected = "kd_ext: error: --activate-encoder-adapter xx: unknown; the encoder has as, bn, gu,"
    assert translate(adapted["hi"][0], "xx").startswith(expected)
    assert "which has no adapters; use 'none'" in translate(teacher, "hi")
    flags = [*CRITERION, *adapter_flags("hi", ids="ta"), "--max-update", "1"]
    wrong = line(train(tmp_path, *flags, arch="transformer_adapter"))
    assert wrong == "kd_ext: error: --encoder-train-adapter hi: unknown; the encoder has ta"
    # fairseq's trainer raises this one as a plain Exception
    narrow = [f"--{side}-{size}" for side in SIDES for size in ("embed-dim", "ffn-embed-dim")]
    flags = [*CRITERION, *(x for flag in narrow for x in (flag, "8")), "--load-checkpoint-liberally"]
    misfit = line(train(tmp_path, *flags, "--finetune-from-model", teacher, arch="transformer_ext"))
    assert misfit.startswith("kd_ext: error: --load-checkpoint-liberally: no parameter of the checkpoint fits")


@pytest.mark.parametrize(
    ("start", "line"),
    [
        ([], "--encoder-train-adapter hi: there is no checkpoint to begin with, and what is frozen would stay at its "),
        (
            ["--restore-file", "none/checkpoint_best.pt", *RESET, "--load-checkpoint-liberally"],
            "--restore-file none/checkpoint_best.pt: no such file, and what --encoder-train-adapter hi freezes would ",
        ),
        (["--continue-once", "none.pt"], "--continue-once none.pt: no such file, and what --encoder-train-adapter hi "),
    ],
)
def test_without_a_base(train, tmp_path, start, line):
    """It would be random, and stay so."""
    result = train(tmp_path, *CRITERION, *adapter_flags("hi"), *start, "--max-update", "1", arch="transformer_adapter")
    assert result.returncode != 0
    assert result.last_line.startswith(f"kd_ext: error: {line}")
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("*.pt"))


def test_an_adapter_that_was_never_trained(adapted, data, tmp_path):
    """It is named all the same, on a checkpoint that trained another."""
    for name, warnings in (("hi", 0), ("ta", 2)):
        command = [data, *PLUGIN, "--path", adapted["hi"][0], "--cpu", *activate(name)]
        result = run(tmp_path / "log", "fairseq-generate", *command)
        assert result.returncode == 0, result.output
        assert result.output.count("it is as it began, and adds nothing") == warnings
    assert f"--activate-decoder-adapter ta: in {adapted['hi'][0]} it is as it began" in result.output


@pytest.mark.parametrize("what", ["no settings", "not a number"])
def test_a_base_of_which_nothing_can_be_told(train, teacher, tmp_path, what):
    state = load(teacher)
    if what == "no settings":
        torch.save({"model": state["model"]}, tmp_path / "base.pt")
        said = (
            "it has no settings of its model (args or cfg), so nothing tells whether what --encoder-train-adapter hi "
        )
    else:
        state["model"]["encoder.layers.0.fc1.weight"][0] = float("nan")
        torch.save(state, tmp_path / "base.pt")
        said = "its weights give what is not a number; name a checkpoint that was saved before"
    flags = [*CRITERION, *adapter_flags("hi"), *FLAGS, "--load-checkpoint-liberally", "--max-update", "1"]
    flags += ["--finetune-from-model", tmp_path / "base.pt", "--activation-fn", "gelu"]
    result = train(tmp_path / "run", *flags, arch="transformer_adapter")
    assert result.last_line.startswith(f"kd_ext: error: {tmp_path}/base.pt: {said}"), result.output[-1500:]
    assert "Traceback" not in result.output


def test_random_weights_are_trained_if_nothing_is_frozen(train, tmp_path):
    """A script names what its first run is yet to write; any other file that is not there is an error."""
    flags = [f"--{side}-{name}" for side in SIDES for name in ("add-adapters", "adapter-ids=hi")]
    command = [*CRITERION, *flags, "--max-update", "1"]
    start = ["--restore-file", tmp_path / "checkpoint_last.pt"]
    result = train(tmp_path, *command, *start, arch="transformer_adapter")
    assert result.returncode == 0, result.output
    assert f"{tmp_path}/checkpoint_last.pt: no such file; training begins from random weights" in result.output
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}
    for flag, name, remedy in (
        ("--restore-file", "checkpoint_best.pt", f"name {tmp_path}/checkpoint_best.pt, or leave"),
        ("--restore-file", tmp_path / "checkpoint9.pt", "name the checkpoint to begin with, or leave"),
        ("--restore-file", "none.pt", "name the checkpoint to begin with, or leave"),
    ):
        result = train(tmp_path, *command, flag, name, arch="transformer_adapter")
        assert result.returncode != 0
        assert result.last_line.startswith(f"kd_ext: error: {flag} {name}: no such file; {remedy}")
        assert "Traceback" not in result.output
        assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")} == before
    other = tmp_path / "other"
    result = train(other, *command, "--continue-once", "none.pt", arch="transformer_adapter")
    assert result.last_line.startswith("kd_ext: error: --continue-once none.pt: no such file; name the checkpoint to")
    assert not list(other.glob("*.pt"))


def test_another_adapter_in_the_same_folder(train, teacher, tmp_path):
    """It would go on from the optimizer's state of the first."""
    start = [*CRITERION, *FLAGS, "--finetune-from-model", teacher]
    assert train(tmp_path, *start, *adapter_flags("hi"), "--max-update", "2", arch="transformer_adapter")[0] == 0
    last = tmp_path / "checkpoint_last.pt"
    before = last.read_bytes()
    result = train(tmp_path, *start, *adapter_flags("ta"), "--max-update", "4", arch="transformer_adapter")
    assert result.returncode != 0
    expected = f"kd_ext: error: --encoder-train-adapter ta: {last} is of a run that trained hi; give another --save-dir"
    assert result.last_line.startswith(expected)
    assert last.read_bytes() == before
    anew = [*CRITERION, *FLAGS, *RESET, "--max-update", "3"]
    assert train(tmp_path, *anew, *adapter_flags("ta"), arch="transformer_adapter").returncode == 0
    assert load(last)["optimizer_history"][-1]["num_updates"] == 3
    assert train(tmp_path, *anew[:5], *adapter_flags("ta"), "--max-update", "4", arch="transformer_adapter")[0] == 0


def test_distillation_from_and_into_everything_at_once(train, distil, generate, tmp_path):
    compact = ["--share-all-embeddings"]
    for side in SIDES:
        compact += [f"--{side}-recurrent-stacking", "3", f"--{side}-factorized-embed-dim", "6"]
    everything = [*compact, *adapter_flags("hi", ids="hi,ta"), "--encoder-adapter-use-gating"]
    base = train(tmp_path / "base", *CRITERION, *compact, "--max-update", "10", arch="transformer_ext")
    assert base.returncode == 0, base.output
    everything += ["--finetune-from-model", tmp_path / "base" / "checkpoint_last.pt", "--load-checkpoint-liberally"]
    first = train(tmp_path / "teacher", *CRITERION, *everything, "--max-update", "10", arch="transformer_ext")
    assert first.returncode == 0, first.output
    teacher = tmp_path / "teacher" / "checkpoint_last.pt"
    outputs = {}
    for name, override in (("trained", "{}"), ("none", str({f"activate_{side}_adapter": "none" for side in SIDES}))):
        flags = ["--teacher-checkpoint-path", teacher, "--teacher-model-overrides", override, "--max-update", "10"]
        result = distil(tmp_path / name, *flags, *everything, "--dropout", "0", arch="transformer_recurrent_stacking")
        assert result.returncode == 0, result.output
        outputs[name] = re.findall(r"kd_kl=([\d.]+)", result.output)
    assert outputs["trained"] != outputs["none"]  # the teacher has adapters of its own
    student = tmp_path / "trained" / "checkpoint_last.pt"
    assert {n.split(".")[2] for n in weights(student) if ".layers." in n and ".adapters." not in n} == {"0"}
    assert {n.split(".")[2] for n in weights(student) if ".adapters." in n} == {"0", "1", "2"}
    assert generate(student) != generate(student, *activate("none"))
    resumed = distil(
        tmp_path / "trained", *flags[:2], "--max-update", "12", *everything, arch="transformer_recurrent_stacking"
    )
    assert resumed.returncode == 0, resumed.output
    assert "num_updates 12" in resumed.output


def test_a_stacked_student_on_disk(train, tmp_path):
    sizes = {}
    for depths in ("1", "6"):
        flags = [*CRITERION, "--encoder-recurrent-stacking", depths, "--decoder-recurrent-stacking", depths]
        result = train(tmp_path / depths, *flags, "--max-update", "2", "--store-ema", arch="transformer_ext")
        assert result.returncode == 0, result.output
        sizes[depths] = (tmp_path / depths / "checkpoint_last.pt").stat().st_size
        counted = re.search(r"num. shared model params: ([\d,]+) \(num. trained: ([\d,]+)\)", result.output)
        sizes[depths, "logged"] = counted.groups()
    assert sizes["1", "logged"] == sizes["6", "logged"]
    assert sizes["6"] < sizes["1"] + 3000  # with the optimizer's state and a moving average


@pytest.mark.parametrize("arch", ["transformer", "transformer_ext"])
@pytest.mark.parametrize("kept", [{"encoder": [0, 2], "decoder": [1]}, {"encoder": [1]}])
def test_a_student_that_begins_with_some_of_its_teachers_layers(train, tmp_path, arch, kept):
    """All of a side that is not named; and started again, it goes on."""
    deep = ["--encoder-layers", "3", "--decoder-layers", "2"]
    result = train(tmp_path / "teacher", *CRITERION, *deep, "--max-update", "3", arch=arch)
    assert result.returncode == 0, result.output
    teacher = tmp_path / "teacher/checkpoint_last.pt"
    flags = [*KD, "--teacher-checkpoint-path", teacher, "--finetune-from-model", teacher, *deep, "--lr", "0"]
    for side, layers in kept.items():
        flags += [f"--{side}-layers-to-keep", ",".join(map(str, layers))]
    theirs, layers = weights(teacher), {"encoder": [0, 1, 2], "decoder": [0, 1], **kept}
    for updates in "1", "2":
        result = train(tmp_path / "student", *flags, "--max-update", updates, arch=arch)
        assert result.returncode == 0, result.output
        found = weights(tmp_path / "student/checkpoint_last.pt")
        used = {name: weight for name, weight in found.items() if name.split(".")[-1] not in DEAD}
        for name, weight in used.items():
            origin = re.sub(
                r"^(encoder|decoder)\.layers\.(\d+)", lambda m: f"{m[1]}.layers.{layers[m[1]][int(m[2])]}", name
            )
            assert torch.equal(weight, theirs[origin]), name
        assert sum(name.endswith(".fc1.weight") for name in used) == sum(map(len, layers.values()))
