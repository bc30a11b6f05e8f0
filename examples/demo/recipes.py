"""The models of the demo, and the fairseq commands that prepare, train and translate."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Tuple

from pieces import MAX_PIECES

USER_DIR = Path(__file__).resolve().parents[2] / "kd_ext"

DATA = "data"
TEACHER = "teacher"
CHECKPOINT = "checkpoint_last.pt"

_TEACHER_SIZE = (
    *("--encoder-embed-dim", "192", "--encoder-ffn-embed-dim", "768", "--encoder-layers", "2"),
    *("--decoder-embed-dim", "192", "--decoder-ffn-embed-dim", "768", "--decoder-layers", "2"),
)
_STUDENT_SIZE = (
    *("--encoder-embed-dim", "96", "--encoder-ffn-embed-dim", "384", "--encoder-layers", "2"),
    *("--decoder-embed-dim", "96", "--decoder-ffn-embed-dim", "384", "--decoder-layers", "1"),
)
# The translation's speed is in the table. On two threads, a core busy with something else for a moment
# slows it tenfold or more: the threads wait for each other in every small product.
TRANSLATION_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}

# tokens that a language's queue remembers: few enough that their losses are of much the same model
_QUEUE_SIZE = "10000"


@dataclass(frozen=True)
class Model:
    """One row of the table.

    Args:
        name: of the folder and the row
        updates: the option that says for how long it is trained
        arguments: of fairseq-train, beside those that all models share
        teacher: the model that it learns from
    """

    name: str
    updates: str
    arguments: Tuple[str, ...]
    teacher: Optional[str] = None


MODELS = (
    Model(TEACHER, "teacher_updates", (*_TEACHER_SIZE, "--criterion", "label_smoothed_cross_entropy")),
    Model("student", "student_updates", (*_STUDENT_SIZE, "--criterion", "label_smoothed_cross_entropy")),
    Model(
        "student-kd",
        "student_updates",
        (
            *_STUDENT_SIZE,
            *("--task", "translation_with_kd", "--criterion", "label_smoothed_cross_entropy_with_kd"),
            *("--teacher-checkpoint-path", f"{TEACHER}/{CHECKPOINT}"),
            *("--kd-strategy", "global_language_wise", "--kd-rate", "0.5", "--kd-queue-size", _QUEUE_SIZE),
        ),
        teacher=TEACHER,
    ),
)


def preprocess(folder: str) -> List[str]:
    """Binarize the pieces; one dictionary for both sides, as the embeddings are shared."""
    command = ["fairseq-preprocess", "--source-lang", "src", "--target-lang", "en", "--joined-dictionary"]
    for name in ("train", "valid", "test"):
        command += [f"--{name}pref", f"pieces/{name}"]
    return [*command, "--destdir", folder]


def train(model: Model, updates: int, folder: str) -> List[str]:
    """Train `model`; run again in the same folder, it goes on from the newest checkpoint."""
    return [
        *("fairseq-train", DATA, "--user-dir", str(USER_DIR), "--cpu", "--seed", "1", "--num-workers", "0"),
        *("--arch", "transformer", "--share-all-embeddings", "--dropout", "0.1"),
        *("--encoder-normalize-before", "--decoder-normalize-before"),
        *("--encoder-attention-heads", "4", "--decoder-attention-heads", "4"),
        *model.arguments,
        *("--label-smoothing", "0.1", "--optimizer", "adam", "--lr", "3e-3", "--max-tokens", "2000"),
        *("--lr-scheduler", "inverse_sqrt", "--warmup-updates", "300", "--max-update", str(updates)),
        # a validation comes with every save, and --validate-after-updates would put off both
        *("--save-dir", folder, "--save-interval-updates", "100", "--keep-interval-updates", "1"),
        *("--no-epoch-checkpoints", "--max-tokens-valid", "8000"),
        *("--log-format", "json", "--log-interval", "10"),
    ]


def generate(model: Model) -> List[str]:
    """Translate the test set with `model`; nothing of its teacher is read."""
    return [
        *("fairseq-generate", DATA, "--user-dir", str(USER_DIR), "--cpu", "--gen-subset", "test"),
        *("--path", f"{model.name}/{CHECKPOINT}", "--beam", "5", "--max-tokens", "2000"),
        # twice the longest reference: a model that has hardly been trained goes on to fairseq's 200 otherwise
        *("--max-len-b", str(2 * MAX_PIECES), "--remove-bpe", "sentencepiece", "--log-format", "none"),
    ]


def update_of(line: str) -> int:
    """The number of updates that a line of fairseq-train's output tells of, or -1."""
    _, found, metrics = line.partition("| train_inner | ")
    return int(json.loads(metrics)["num_updates"]) if found else -1
