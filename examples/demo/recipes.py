"""The models of the demo, and the fairseq commands that prepare, train and translate."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from pieces import MAX_PIECES

USER_DIR = Path(__file__).resolve().parents[2] / "kd_ext"

DATA = "data"
# the teacher's translations of the training set
SEQUENCE = "data-sequence"
TEACHER = "teacher"
# the student that is exported
SERVED = "student-both"
QUANTIZATIONS = ("float32", "int8")
# the language that gets an adapter: the one with the second most test sentences
ADAPTED = "de"
CHECKPOINT = "checkpoint_last.pt"


def dimensions(width: int, encoder_layers: int, decoder_layers: int) -> Tuple[str, ...]:
    """A transformer's, its feed-forward layers four times as wide."""
    flags: List[str] = []
    for side, layers in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        flags += [f"--{side}-embed-dim", str(width), f"--{side}-ffn-embed-dim", str(4 * width)]
        flags += [f"--{side}-layers", str(layers)]
    return tuple(flags)


_TEACHER_SIZE = dimensions(192, 2, 2)
_STUDENT_SIZE = dimensions(96, 2, 1)
# Speed is in the table. On two threads, a core busy with something else for a moment slows translation tenfold or
# more: the threads wait for each other in every small product.
TRANSLATION_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}

CPU = ("--cpu",)
PLAIN = ("--criterion", "label_smoothed_cross_entropy")
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
    "--load-checkpoint-liberally",
    *("--finetune-from-model", f"student-both/{CHECKPOINT}", "--lr", "1e-3", "--warmup-updates", "50"),
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
        sequence: it learns from the teacher's translations in place of the references
        seed: of its training
    """

    name: str
    updates: str
    arguments: Tuple[str, ...]
    reads: Tuple[str, ...] = ()
    language: Optional[str] = None
    sequence: bool = False
    seed: int = 1

    @property
    def data(self) -> str:
        """The folder of its binarized text."""
        return data_folder(self.language)

    @property
    def training_data(self) -> str:
        """The folder of what it learns from."""
        return f"{SEQUENCE}/data" if self.sequence else self.data

    @property
    def after(self) -> Tuple[str, ...]:
        """The steps whose results its training reads."""
        return (SEQUENCE if self.sequence else self.data, *self.reads)


def data_folder(language: Optional[str]) -> str:
    """The folder of the binarized text of a language; None: of all."""
    return f"{DATA}-{language}" if language else DATA


STUDENT = ("--arch", "transformer", *_STUDENT_SIZE)
MODELS = (
    Model(TEACHER, "teacher_updates", ("--arch", "transformer", *_TEACHER_SIZE, *PLAIN)),
    Model("student", "student_updates", (*STUDENT, *PLAIN)),
    Model("student-word", "student_updates", (*STUDENT, *_DISTILLED), (TEACHER,)),
    Model("student-sequence", "student_updates", (*STUDENT, *PLAIN), sequence=True),
    Model(SERVED, "student_updates", (*STUDENT, *_DISTILLED), (TEACHER,), sequence=True),
    Model(
        "compact-both",
        "student_updates",
        ("--arch", "transformer_ext", *_STUDENT_SIZE, *_COMPACT, *_DISTILLED),
        (TEACHER,),
        sequence=True,
    ),
    Model(
        f"{SERVED}+{ADAPTED}",
        "adapter_updates",
        ("--arch", "transformer_adapter", *_STUDENT_SIZE, *_ADAPTER, *PLAIN),
        (SERVED,),
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


def train(model: Model, updates: int, folder: str, device: Sequence[str] = CPU) -> List[str]:
    """Train `model`; run again in the same folder, it goes on from the newest checkpoint."""
    return [
        *("fairseq-train", model.training_data, "--user-dir", str(USER_DIR), *device),
        *("--seed", str(model.seed), "--num-workers", "0"),
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


def translate_training_set(folder: str, beam: int, device: Sequence[str] = (*CPU, "--processes", "2")) -> List[str]:
    """Have the teacher translate the training set; its options are fairseq-generate's."""
    return [
        *("python", "-m", "kd_ext.sequence_distillation", DATA, "--path", f"{TEACHER}/{CHECKPOINT}", *device),
        *("--beam", str(beam), "--max-len-b", str(2 * MAX_PIECES), "--destdir", f"{folder}/data"),
        *("--post-process", "sentencepiece"),
    ]


def export(quantization: str, folder: str) -> List[str]:
    """Write the served student as CTranslate2 reads it."""
    return [
        *("python", "-m", "kd_ext.export", f"{SERVED}/{CHECKPOINT}", f"{folder}/model", "--format", "ctranslate2"),
        *("--quantization", quantization, "--data", DATA),
    ]


def measure_speeds(path: str, models: Optional[Dict[str, str]] = None) -> List[str]:
    """Translate some of the test set with each of `models`, by turns.

    Args:
        path: the JSON file to write
        models: their checkpoints or folders by their names; None: every one here that translates all languages
    """
    if models is None:
        models = {model.name: f"{model.name}/{CHECKPOINT}" for model in MODELS if model.language is None}
        models.update({served(kind): f"{exported(kind)}/model" for kind in QUANTIZATIONS})
    script = str(Path(__file__).resolve().parent / "speed.py")
    named = [f"{name}={model}" for name, model in models.items()]
    return ["python", script, DATA, "pieces/test.src", str(USER_DIR), path, *named]


def served(quantization: str) -> str:
    """The row of an exported student."""
    return f"{SERVED}, CTranslate2 {quantization}"


def exported(quantization: str) -> str:
    """The folder of its step."""
    return f"{SERVED}-{quantization}"


def generate(model: Model, device: Sequence[str] = CPU) -> List[str]:
    """Translate the test set with `model`; nothing of its teacher is read."""
    return [
        *("fairseq-generate", model.data, "--user-dir", str(USER_DIR), *device, "--gen-subset", "test"),
        *("--path", f"{model.name}/{CHECKPOINT}", "--beam", "5", "--max-tokens", "2000"),
        # twice the longest reference: a model that has hardly been trained goes on to fairseq's 200 otherwise
        *("--max-len-b", str(2 * MAX_PIECES), "--remove-bpe", "sentencepiece", "--log-format", "none"),
    ]


def update_of(line: str) -> int:
    """The number of updates that a line of fairseq-train's output tells of, or -1."""
    _, found, metrics = line.partition("| train_inner | ")
    return int(json.loads(metrics)["num_updates"]) if found else -1


def sentence_of(line: str) -> int:
    """The number of sentences that a progress bar's line tells of, or -1."""
    found = re.search(r"\| (\d+)/\d+ \[", line)
    return int(found[1]) if found else -1
