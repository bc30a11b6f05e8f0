"""fairseq-train with the plugin: the documented command lines, precisions, and upstream's options."""

import re
import shutil

import pytest
import torch
from commands import PLUGIN, ROOT, run, run_as_typed
from conftest import KD, SIZES, STRATEGIES, TRAINING, load, needs_half
from fairseq.data import Dictionary
from fairseq.tasks import translation, translation_lev
from test_resume import is_trained

from kd_ext.criterions.label_smoothed_cross_entropy_with_kd import LabelSmoothedCrossEntropyWithKDConfig

# the first column of the table of strategies
LINES = re.findall(r"^\| `(--kd-strategy [^`]*)` \|", (ROOT / "docs/distilling.md").read_text(), re.MULTILINE)


def logged(output, name):
    """The values of a metric in the lines of the training updates."""
    return [float(x) for x in re.findall(rf"train_inner .*? {name}=([-\d.e]+|nan)", output)]


def test_every_strategy_has_a_line():
    assert {line.split()[1] for line in LINES} == set(STRATEGIES)


@pytest.mark.parametrize("line", LINES)
def test_documented_command_lines(data, teacher, tmp_path, line):
    flags = [*TRAINING, "--arch", "transformer", *SIZES, *KD, "--teacher-checkpoint-path", teacher]
    result = run_as_typed("fairseq-train", data, *flags, "--save-dir", tmp_path, "--max-update", 20, *line.split())
    assert result.returncode == 0, result.output
    loss = logged(result.output, "nll_loss")
    assert len(loss) == 20
    assert loss[-1] < loss[0] - 0.5
    assert all(kl >= 0 for kl in logged(result.output, "kd_kl"))
    share = logged(result.output, "kd_selected")
    if "word" in line:
        assert set(share) == {1}
    else:
        assert 0.3 < sum(share) / len(share) < 0.7
        names = ["kd_gate_hi", "kd_gate_ta", "kd_gate_bn"] if "language" in line else ["kd_gate"]
        for name in names:
            assert len(logged(result.output, name)) == 20
    assert re.search(r"valid on 'valid' subset \| loss \d", result.output)
    assert "loaded teacher" in result.output
    assert "architecture transformer" in result.output
    assert "parameters" in result.output
    assert "teacher placed on cpu as torch.float32" in result.output


@needs_half
def test_half_precision_on_a_cpu(distil, tmp_path):
    """The one that upstream runs without CUDA: it takes --bf16 for a TPU, and --fp16 asks for a CUDA device."""
    flags = ["--memory-efficient-fp16", "--fp16-init-scale", "4", "--max-update", "12"]
    result = distil(tmp_path, *flags, strategy="global_language_wise")
    assert result.returncode == 0, result.output
    assert "teacher placed on cpu as torch.float16" in result.output
    loss = logged(result.output, "nll_loss")
    assert len(loss) == 12
    assert loss[-1] < loss[0]
    queues = load(tmp_path / "checkpoint_last.pt")["task_state"]["kd"]["queues"]
    assert {values.dtype for values in queues.values()} == {torch.float32}


@pytest.mark.parametrize("flags", [["--alpha", "0"], ["--alpha", "0.5"]])
def test_a_student_with_an_adaptive_softmax(distil, tmp_path, flags):
    result = distil(tmp_path, "--adaptive-softmax-cutoff", "10,20", *flags, "--max-update", "12")
    assert result.returncode == 0, result.output
    loss = logged(result.output, "nll_loss")
    assert loss[-1] < loss[0]
    assert "in its plain formulation, which takes more memory: " in result.output


def test_upstreams_options_together(distil, tmp_path):
    flags = ["--update-freq", "3", "--sentence-avg", "--ignore-prefix-size", "1", "--report-accuracy"]
    result = distil(tmp_path, *flags, "--max-update", "6", strategy="global_level")
    assert result.returncode == 0, result.output
    assert len(logged(result.output, "accuracy")) == 6
    assert "kd_gate" in result.output


def test_alpha_0_is_upstreams_run_and_needs_no_teacher(train, tmp_path):
    """Defect 6, its second half: nothing is paid for a teacher of weight 0. Equal as far as sums of floats are."""
    flags = ["--max-update", "8", "--dropout", "0.1", "--optimizer", "sgd", "--lr", "0.1"]
    plain = train(tmp_path / "plain", "--criterion", "label_smoothed_cross_entropy", *flags)
    ours = train(tmp_path / "ours", *KD, "--kd-strategy", "word_seq_level", "--alpha", "0", *flags)
    assert plain.returncode == ours.returncode == 0
    a, b = (load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("plain", "ours"))
    for name in filter(is_trained, a):
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5)


def test_alpha_defaults_to_one_half():
    """Defect 6, its first half."""
    assert LabelSmoothedCrossEntropyWithKDConfig().alpha == 0.5


def test_word_level_is_alpha_1(distil, tmp_path):
    models = []
    for name, strategy, flags in (("a", "word_level", []), ("b", "word_seq_level", ["--alpha", "1"])):
        assert distil(tmp_path / name, "--max-update", "5", *flags, strategy=strategy).returncode == 0
        models.append(load(tmp_path / name / "checkpoint_last.pt")["model"])
    for name in filter(is_trained, models[0]):
        assert torch.equal(models[0][name], models[1][name])


def test_eval_bleu_is_logged(distil, tmp_path):
    """Whose it is, is shown in test_teacher.py."""
    result = distil(tmp_path, "--eval-bleu", "--eval-bleu-args", '{"beam": 2}', "--max-update", "1")
    assert result.returncode == 0, result.output
    assert re.search(r"valid .* \| bleu [\d.]+ ", result.output)


def test_a_checkpoint_holds_nothing_of_the_teacher(student, teacher):
    state, teachers = load(student), load(teacher)
    assert state["model"].keys() == teachers["model"].keys()  # of the same architecture
    assert state["criterion"] is None
    assert state["task_state"]["kd"].keys() == {"strategy", "queues", "languages"}


def test_unused_flags_are_said(distil, tmp_path):
    unused = ["--alpha", "0.3", "--kd-queue-size", "7", "--kd-queue-window", "shared"]
    result = distil(tmp_path, "--max-update", "1", *unused, strategy="batch_level")
    assert "--alpha 0.3 has no effect with --kd-strategy batch_level" in result.output
    assert "--kd-queue-size 7 has no effect with --kd-strategy batch_level" in result.output
    assert "--kd-queue-window shared has no effect with --kd-strategy batch_level" in result.output


def test_a_run_that_was_begun_without_the_plugin(data, tmp_path):
    """fairseq alone cannot go on from its own checkpoints with torch >= 2.6; given --user-dir kd_ext, it can."""
    assert TRAINING[: len(PLUGIN)] == PLUGIN
    own = [
        "--arch",
        "transformer",
        *SIZES,
        "--save-dir",
        tmp_path / "run",
        "--criterion",
        "label_smoothed_cross_entropy",
    ]
    for flags, updates in ((TRAINING[len(PLUGIN) :], 3), (TRAINING, 6)):
        result = run(tmp_path / "log", "fairseq-train", data, *flags, *own, "--max-update", updates)
        assert result.returncode == 0, result.output
    assert len(logged(result.output, "loss")) == 3


@pytest.mark.parametrize("task", ["translation", "translation_with_kd"])
def test_data_of_several_files(data, tmp_path, task):
    """Each once, and the first as often as asked; of sets to validate with, too."""
    shutil.copytree(data, tmp_path / "bin")
    for name in "train", "valid":
        for path in list((tmp_path / "bin").glob(f"{name}.*")):
            shutil.copy(path, path.with_name(path.name.replace(f"{name}.", f"{name}1.")))
    command = [tmp_path / "bin", *TRAINING, "--arch", "transformer", *SIZES, "--task", task, "--max-epoch", "1"]
    command += ["--criterion", "label_smoothed_cross_entropy", "--combine-valid-subsets", "--no-save"]
    for flags, times in ([], 2), (["--upsample-primary", "3"], 4):
        result = run(tmp_path / "log", "fairseq-train", *command, *flags)
        assert result.returncode == 0, result.output
        size, updates = re.findall(r"train \| epoch 001 .*\| bsz ([\d.]+) \| num_updates (\d+)", result.output)[0]
        assert float(size) * int(updates) == pytest.approx(times * 300, rel=0.01)


def test_one_file_is_not_upsampled(data, tmp_path):
    command = [data, *TRAINING, "--arch", "transformer", *SIZES, "--max-update", "1", "--no-save"]
    command += ["--criterion", "label_smoothed_cross_entropy", "--upsample-primary", "3"]
    result = run(tmp_path / "log", "fairseq-train", *command)
    assert result.returncode == 0, result.output
    assert result.output.count(f"--upsample-primary 3: {data} has no train1, and the one train is taken as it is") == 1


def test_parts_of_data_by_position(data):
    """As a module of one's own may call it."""
    words = Dictionary.load(str(data / "dict.src.txt"))
    flags = [False, None, -1, True, False, 1024, 1024]
    dataset = translation.load_langpair_dataset(str(data), "valid", "src", words, "tgt", words, *flags)
    assert len(dataset) == 40
    assert translation_lev.load_langpair_dataset is translation.load_langpair_dataset
