"""A distilled student in upstream's other commands: no teacher file, no special task."""

import re

import pytest
import torch
from commands import PLUGIN, run, run_as_typed
from conftest import load


@pytest.fixture(scope="module")
def orphan(student, data, tmp_path_factory):
    """The student's checkpoint, whose recorded teacher is nowhere to be found."""
    state = load(student)
    state["cfg"]["task"]["teacher_checkpoint_path"] = "/nowhere/teacher.pt"
    path = tmp_path_factory.mktemp("orphan") / "student.pt"
    torch.save(state, path)
    return path


def hypotheses(output):
    return re.findall(r"^H-\d+\t\S+\t.*$", output, flags=re.M)


def test_generate_with_the_plugin(data, orphan, tmp_path):
    result = run_as_typed("fairseq-generate", data, *PLUGIN, "--path", orphan, "--cpu", "--beam", 3)
    assert result.returncode == 0, result.output
    assert len(hypotheses(result.output)) == 20
    with_task = run(tmp_path / "log", "fairseq-generate", data, *PLUGIN, "--path", orphan, "--cpu", "--beam", 3,
                    "--task", "translation_with_kd")  # fmt: skip
    assert hypotheses(with_task.output) == hypotheses(result.output)


def test_generate_and_interactive_without_the_plugin(data, orphan):
    """Upstream alone, where torch lets it read a checkpoint at all: forced here as a user of torch < 2.6 has it."""
    forced = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    flags = ["--path", orphan, "--cpu", "--beam", 3, "--batch-size", 1]  # upstream's fused encoder fails on padding
    ours = run_as_typed("fairseq-generate", data, *PLUGIN, *flags)
    result = run_as_typed("fairseq-generate", data, *flags, **forced)
    assert result.returncode == 0, result.output
    words = lambda line: line.split("\t")[2]  # noqa: E731
    assert list(map(words, hypotheses(result.output))) == list(map(words, hypotheses(ours.output)))
    text = "__src__hi __tgt__en w1 w2 w3\n"
    result = run_as_typed("fairseq-interactive", data, *flags, stdin=text, **forced)
    assert result.returncode == 0, result.output
    assert len(hypotheses(result.output)) == 1


def test_interactive_with_the_plugin(data, orphan):
    text = "__src__hi __tgt__en w1 w2 w3\n__src__ta __tgt__en w4\n"
    flags = ["--path", orphan, "--cpu", "--buffer-size", 2, "--max-tokens", 100]
    result = run_as_typed("fairseq-interactive", data, *PLUGIN, *flags, stdin=text)
    assert result.returncode == 0, result.output
    assert len(hypotheses(result.output)) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "--input {0}: No such file or directory"),
        ("w1 \xe9\n".encode("latin-1"), "--input {0}: not in UTF-8 (byte 3: "),
        (b"w1 " * 2000, "Size of sample #0 is invalid"),
    ],
)
def test_files_that_interactive_cannot_translate(data, orphan, tmp_path, content, said):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    result = run(tmp_path / "log", "fairseq-interactive", data, *PLUGIN, "--path", orphan, "--cpu", "--input", path)
    assert result.returncode != 0
    assert result.last_line.startswith(f"kd_ext: error: {said.format(path)}")
    assert "Traceback" not in result.output


def test_validate_needs_no_teacher(data, orphan, student, tmp_path):
    """It reports upstream's loss: the one that the training run reported at its end."""
    reported = r"valid .*\| loss ([\d.]+) \| nll_loss ([\d.]+) \| ppl"
    flags = ["--path", orphan, "--cpu", "--max-tokens", 200, "--task", "translation_with_kd"]
    result = run_as_typed("fairseq-validate", data, *PLUGIN, *flags)
    assert result.returncode == 0, result.output
    at_the_end = re.findall(reported, (student.parent / "log").read_text())[-1]
    assert re.findall(reported, result.output) == [at_the_end]
