"""``--bf16`` and ``--memory-efficient-bf16`` on a CPU, where fairseq's command line takes them for a TPU."""

import re

import pytest
import torch
from commands import PLUGIN, ROOT, run, run_as_typed
from conftest import KD, SIZES, TRAINING, load
from fairseq import checkpoint_utils, options
from test_cli_inference import hypotheses
from test_cli_train import logged
from test_configs import SHORT, TINY
from test_resume import assert_same_run, is_trained

FLAGS = ["--bf16", "--memory-efficient-bf16"]
PLACED = "teacher placed on cpu as torch.{}"


@pytest.mark.parametrize("flag", FLAGS)
def test_training_as_typed(data, teacher, tmp_path, flag):
    flags = [*TRAINING, "--arch", "transformer", *SIZES, *KD, "--teacher-checkpoint-path", teacher]
    result = run_as_typed("fairseq-train", data, *flags, flag, "--save-dir", tmp_path, "--max-update", 30)
    assert result.returncode == 0, result.output
    assert PLACED.format("bfloat16") in result.output
    for name in ("nll_loss", "kd_kl"):
        losses = logged(result.output, name)
        assert len(losses) == 30
        assert losses[-1] < losses[0] - 0.5, name
    for name, tensor in load(tmp_path / "checkpoint_last.pt")["model"].items():
        if is_trained(name):  # saved in float32
            assert torch.equal(tensor, tensor.bfloat16().float()), name


@pytest.mark.parametrize("flag", FLAGS)
def test_first_losses_are_those_of_float32(distil, tmp_path, flag):
    flags = ["--dropout", "0", "--max-update", "5"]
    results = [distil(tmp_path / str(len(more)), *flags, *more, strategy="word_level") for more in ([], [flag])]
    for name, bits in (("nll_loss", 0.15), ("kd_loss", 0.15)):  # 8 significant bits
        of_float32, of_bf16 = (logged(result.output, name) for result in results)
        assert len(of_bf16) == 5
        assert of_bf16 == pytest.approx(of_float32, abs=bits)
        assert of_bf16 != of_float32


@pytest.mark.parametrize("flag", FLAGS)
def test_stopped_and_resumed(distil, tmp_path, flag):
    """Bit for bit where the weights exist in bfloat16 alone.

    With ``--bf16`` fairseq trains a copy of them in float32, which it does not save: the resumed run begins with the
    same bfloat16 weights, so with the same losses, and goes on from them.
    """
    flags = [flag, "--dropout", "0.1", "--no-epoch-checkpoints", "--max-update"]
    whole = distil(tmp_path / "whole", *flags, 20, strategy="global_language_wise")
    assert distil(tmp_path / "parts", *flags, 10, strategy="global_language_wise").returncode == 0
    resumed = distil(tmp_path / "parts", *flags, 20, strategy="global_language_wise")
    assert resumed.returncode == 0, resumed.output
    assert "Loaded checkpoint" in resumed.output
    paths = [tmp_path / name / "checkpoint_last.pt" for name in ("whole", "parts")]
    for name in ("nll_loss", "kd_loss", "kd_gate_hi"):
        expected, found = logged(whole.output, name)[10:], logged(resumed.output, name)
        assert len(found) == 10
        assert found[0] == expected[0]
        assert found == (expected if flag == "--memory-efficient-bf16" else pytest.approx(expected, abs=0.15))
    if flag == "--memory-efficient-bf16":
        assert_same_run(*paths)
    queues = [load(path)["task_state"]["kd"]["queues"] for path in paths]
    sizes = [{name: values.numel() for name, values in state.items()} for state in queues]
    assert sizes[0] == sizes[1]
    assert {values.dtype for state in queues for values in state.values()} == {torch.float32}


def test_an_upstream_criterion_too(train, tmp_path):
    result = train(tmp_path, "--bf16", "--criterion", "label_smoothed_cross_entropy", "--max-update", "30")
    assert result.returncode == 0, result.output
    losses = logged(result.output, "nll_loss")
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("student", [[], ["--bf16"]])
def test_a_teacher_in_a_dtype_of_its_own(distil, tmp_path, dtype, student):
    result = distil(tmp_path, "--teacher-dtype", dtype, *student, "--max-update", "12", strategy="word_level")
    assert result.returncode == 0, result.output
    assert PLACED.format(dtype) in result.output
    losses = logged(result.output, "nll_loss")
    assert losses[-1] < losses[0]


def test_clipping_averages_and_several_batches_an_update(distil, tmp_path):
    flags = ["--bf16", "--clip-norm", "0.1", "--store-ema", "--update-freq", "2", "--max-update", "24"]
    result = distil(tmp_path, *flags, strategy="global_level")
    assert result.returncode == 0, result.output
    losses = logged(result.output, "nll_loss")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("tpu", [False, True])
def test_a_tpu_when_it_is_asked_for(flag, tpu):
    arguments = ["data", flag, "--arch", "transformer", *(["--tpu"] if tpu else [])]
    args = options.parse_args_and_arch(options.get_training_parser(), arguments)
    assert args.tpu is tpu
    assert args.bf16 is True


def test_a_tpu_as_typed(train, tmp_path):
    """fairseq asks for torch_xla, which is not there."""
    on_tpu = train(tmp_path, "--bf16", "--tpu", "--criterion", "label_smoothed_cross_entropy", "--max-update", "1")
    assert on_tpu.returncode != 0
    assert "xla" in on_tpu.output


@pytest.fixture(scope="module")
def telling(tmp_path_factory):
    """A user folder that is the plugin, and says of every model that a command loads in which dtype it is used."""
    folder = tmp_path_factory.mktemp("telling") / "telling_dtypes"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "import kd_ext\n"
        "from fairseq.models.transformer import TransformerEncoderBase\n"
        "forward = TransformerEncoderBase.forward_scriptable\n"
        "def tell(self, *args, **kwargs):\n"
        "    print('used in', {p.dtype for p in self.parameters()})\n"
        "    return forward(self, *args, **kwargs)\n"
        "TransformerEncoderBase.forward_scriptable = tell\n"
    )
    return ["--user-dir", folder]


COMMANDS = {
    "fairseq-generate": (["--beam", 3], None),
    "fairseq-validate": (["--max-tokens", 200], None),
    "fairseq-interactive": (["--buffer-size", 2, "--max-tokens", 100], "__src__hi __tgt__en w1 w2 w3\n"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", [None, *FLAGS])
def test_commands_that_use_a_model(data, student, telling, command, flag):
    flags, text = COMMANDS[command]
    flags = [*flags, *([flag] if flag else [])]
    result = run_as_typed(command, data, *telling, "--path", student, "--cpu", *flags, stdin=text)
    assert result.returncode == 0, result.output
    assert set(re.findall(r"used in (.*)", result.output)) == {f"{{torch.{'bfloat16' if flag else 'float32'}}}"}
    if command == "fairseq-generate":
        assert len(hypotheses(result.output)) == 20


def test_what_validation_reports(data, student, tmp_path):
    """Near to what it reports in float32, and not the same."""
    losses = []
    for flag in ([], ["--bf16"]):
        given = [data, *PLUGIN, "--path", student, "--cpu", "--max-tokens", 200, *flag]
        result = run(tmp_path / "log", "fairseq-validate", *given)
        found = re.findall(r"valid .*\| loss ([\d.]+) \| nll_loss ([\d.]+)", result.output)[-1]
        losses.append([float(loss) for loss in found])
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
    assert losses[1] != losses[0]


def test_overrides_of_a_user_stay(student):
    """``--bf16`` reaches the model by ``--model-overrides``, beside what is given there."""
    given = ["data", "--path", str(student), "--bf16", "--cpu", "--model-overrides", "{'dropout': 0.3}"]
    args = options.parse_args_and_arch(options.get_generation_parser(), given)
    overrides = {"data": str(student.parent), **eval(args.model_overrides)}
    assert overrides["dropout"] == 0.3
    assert overrides["bf16"] is True
    assert args.tpu is False


def test_under_hydra(data, teacher, tmp_path):
    settings = [f"common.user_dir={ROOT / 'kd_ext'}", f"task.data={data}", f"checkpoint.save_dir={tmp_path / 'out'}"]
    settings += [f"task.teacher_checkpoint_path={teacher}", "common.bf16=true", *SHORT, *TINY]
    recipe = ["--config-dir", ROOT / "configs", "--config-name", "word_level"]
    result = run(tmp_path / "log", "fairseq-hydra-train", *recipe, *settings)
    assert result.returncode == 0, result.output
    assert PLACED.format("bfloat16") in result.output
    path = tmp_path / "out" / "checkpoint_last.pt"
    assert load(path)["cfg"]["common"]["bf16"] is True
    (model,), _ = checkpoint_utils.load_model_ensemble([str(path)], {"data": str(data)})
    assert sum(p.numel() for p in model.parameters()) > 0
