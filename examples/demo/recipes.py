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
# the language that gets an adapter: the one with the second most test sentences
ADAPTED = "de"
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

_PLAIN = ("--criterion", "label_smoothed_cross_entropy")
_DISTILLED = (
    *("--task", "translation_with_kd", "--criterion", "label_smoothed_cross_entropy_with_kd"),
    *("--teacher-checkpoint-path", f"{TEACHER}/{CHECKPOINT}", "--kd-strategy", "global_language_wise"),
    # of few enough tokens, about 30 batches, that their losses are of much the same model, and of all languages
    # together: alone a rare one would need many more batches to have as many
    *("--kd-rate", "0.5", "--kd-queue-size", "30000", "--kd-queue-window", "shared"),
)
# as many depths as the student has layers, one layer's parameters on each side
_COMPACT = (
    *("--encoder-recurrent-stacking", "2", "--decoder-recurrent-stacking", "1"),
    *("--encoder-factorized-embed-dim", "32", "--decoder-factorized-embed-dim", "32"),
)
_ADAPTER = (
    *("--encoder-add-adapters", "--encoder-adapter-ids", ADAPTED, "--encoder-train-adapter", ADAPTED),
    *("--decoder-add-adapters", "--decoder-adapter-ids", ADAPTED, "--decoder-train-adapter", ADAPTED),
    *("--adapter-activation-fn", "gelu", "--load-checkpoint-liberally"),
    *("--finetune-from-model", f"student-kd/{CHECKPOINT}", "--lr", "1e-3", "--warmup-updates", "50"),
)


@dataclass(frozen=True)
class Model:
    """One row of the table.

    Args:
        name: of the folder and the row
        updates: the option that says for how long it is trained
        arguments: of fairseq-train, beside those that all models share
        reads: the models that its training reads
        language: the only one that it is trained and tested on; None: all
    """

    name: str
    updates: str
    arguments: Tuple[str, ...]
    reads: Tuple[str, ...] = ()
    language: Optional[str] = None

    @property
    def data(self) -> str:
        """The folder of its binarized text."""
        return data_folder(self.language)


def data_folder(language: Optional[str]) -> str:
    """The folder of the binarized text of a language; None: of all."""
    return f"{DATA}-{language}" if language else DATA


MODELS = (
    Model(TEACHER, "teacher_updates", ("--arch", "transformer", *_TEACHER_SIZE, *_PLAIN)),
    Model("student", "student_updates", ("--arch", "transformer", *_STUDENT_SIZE, *_PLAIN)),
    Model("student-kd", "student_updates", ("--arch", "transformer", *_STUDENT_SIZE, *_DISTILLED), (TEACHER,)),
    Model(
        "compact-kd",
        "student_updates",
        ("--arch", "transformer_ext", *_STUDENT_SIZE, *_COMPACT, *_DISTILLED),
        (TEACHER,),
    ),
    Model(
        f"student-kd+{ADAPTED}",
        "adapter_updates",
        ("--arch", "transformer_adapter", *_STUDENT_SIZE, *_ADAPTER, *_PLAIN),
        ("student-kd",),
        ADAPTED,
    ),
)


def preprocess(language: Optional[str], folder: str) -> List[str]:
    """Binarize the pieces; one dictionary for both sides, as the embeddings are shared.

    Args:
        language: whose sentences to take, with the dictionary of all; None: all
        folder: to write to
    """
    command = ["fairseq-preprocess", "--source-lang", "src", "--target-lang", "en", "--joined-dictionary"]
    for name in ("train", "valid", "test"):
        command += [f"--{name}pref", f"pieces/{language}.{name}" if language else f"pieces/{name}"]
    if language:
        command += ["--srcdict", f"{DATA}/dict.src.txt"]
    return [*command, "--destdir", folder]


def train(model: Model, updates: int, folder: str) -> List[str]:
    """Train `model`; run again in the same folder, it goes on from the newest checkpoint."""
    return [
        *("fairseq-train", model.data, "--user-dir", str(USER_DIR), "--cpu", "--seed", "1", "--num-workers", "0"),
        *("--share-all-embeddings", "--dropout", "0.1"),
        *("--encoder-normalize-before", "--decoder-normalize-before"),
        *("--encoder-attention-heads", "4", "--decoder-attention-heads", "4"),
        *("--label-smoothing", "0.1", "--optimizer", "adam", "--lr", "3e-3", "--max-tokens", "2000"),
        *("--lr-scheduler", "inverse_sqrt", "--warmup-updates", "300", "--max-update", str(updates)),
        # a validation comes with every save, and --validate-after-updates would put off both
        *("--save-dir", folder, "--save-interval-updates", "100", "--keep-interval-updates", "1"),
        *("--no-epoch-checkpoints", "--max-tokens-valid", "8000"),
        *("--log-format", "json", "--log-interval", "10"),
        *model.arguments,  # last: they may say otherwise
    ]


def generate(model: Model) -> List[str]:
    """Translate the test set with `model`; nothing of its teacher is read."""
    return [
        *("fairseq-generate", model.data, "--user-dir", str(USER_DIR), "--cpu", "--gen-subset", "test"),
        *("--path", f"{model.name}/{CHECKPOINT}", "--beam", "5", "--max-tokens", "2000"),
        # twice the longest reference: a model that has hardly been trained goes on to fairseq's 200 otherwise
        *("--max-len-b", str(2 * MAX_PIECES), "--remove-bpe", "sentencepiece", "--log-format", "none"),
    ]


def update_of(line: str) -> int:
    """The number of updates that a line of fairseq-train's output tells of, or -1."""
    _, found, metrics = line.partition("| train_inner | ")
    return int(json.loads(metrics)["num_updates"]) if found else -1
