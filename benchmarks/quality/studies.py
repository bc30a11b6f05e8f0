"""The studies: which students are compared, and what each is given beside what all have."""

from __future__ import annotations

import dataclasses
from typing import Dict, List, NamedTuple, Tuple

import recipes
from recipes import Model

_SELECTED = ("--kd-rate", "0.5")
_GLOBAL = (*_SELECTED, "--kd-queue-size", "30000")


class Study(NamedTuple):
    """Students that are compared.

    Attributes:
        question: in one line
        baseline: the one that the others are tested against
        variants: what is different about each, by its name
    """

    question: str
    baseline: str
    variants: Dict[str, Model]


def _taught(strategy: str, *flags: str, sequence: bool = False) -> Model:
    teacher = f"{recipes.TEACHER}/{recipes.CHECKPOINT}"
    arguments = (
        *recipes.STUDENT,
        *("--task", "translation_with_kd", "--criterion", "label_smoothed_cross_entropy_with_kd"),
        *("--teacher-checkpoint-path", teacher, "--kd-strategy", strategy),
    )
    return Model("", "student_updates", (*arguments, *flags), (recipes.TEACHER,), sequence=sequence)


def _alone(sequence: bool = False) -> Model:
    return Model("", "student_updates", (*recipes.STUDENT, *recipes.PLAIN), sequence=sequence)


STUDIES = {
    "languages": Study(
        "Six languages, two of them with 88 % of the tokens: what distils best into one student?",
        "alone",
        {
            "alone": _alone(),
            "word, alpha 0.5": _taught("word_seq_level", "--alpha", "0.5"),
            "word, alpha 1": _taught("word_level"),
            "batch, rate 0.5": _taught("batch_level", *_SELECTED),
            "global, rate 0.5": _taught("global_level", *_GLOBAL),
            "language-wise, each": _taught("global_language_wise", *_SELECTED, "--kd-queue-size", "1000000"),
            "language-wise, shared": _taught("global_language_wise", *_GLOBAL, "--kd-queue-window", "shared"),
            "sequence": _alone(sequence=True),
            "sequence and word": _taught("word_seq_level", "--alpha", "0.5", sequence=True),
        },
    ),
    "ablations": Study(
        "What do rate, window and temperature do?",
        "word, alpha 0.5",
        {
            "word, alpha 0.5": _taught("word_seq_level", "--alpha", "0.5"),
            **{
                f"global, rate {rate}": _taught("global_level", "--kd-rate", rate, "--kd-queue-size", "30000")
                for rate in ("0.25", "0.5", "0.75", "1")
            },
            # about 1,000 target tokens a batch
            **{
                f"global, window of {batches} batches": _taught(
                    "global_level", *_SELECTED, "--kd-queue-size", str(1000 * batches)
                )
                for batches in (1, 3, 10, 100)
            },
            "word, temperature 2": _taught("word_seq_level", "--alpha", "0.5", "--kd-temperature", "2"),
        },
    ),
}


def model_of(variant: str, model: Model, seed: int) -> Model:
    """One run of a variant."""
    name = "".join(c if c.isalnum() or c == "." else "-" for c in variant).replace("--", "-")
    return dataclasses.replace(model, name=f"{name}-seed{seed}", seed=seed)


def runs(study: Study, seeds: List[int]) -> List[Tuple[str, Model]]:
    """All, each seed of every variant before the next seed."""
    return [(variant, model_of(variant, model, seed)) for seed in seeds for variant, model in study.variants.items()]
