"""What students learn from beside the text: the teacher's translations of it, and what a cache has of the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import List

import recipes
from running import Commands
from steps import Step
from studies import Cache, Size

# of the teacher's translations
BEAM = 3


def sequence(commands: Commands, size: Size) -> Step:
    """The teacher's translations of the training set."""
    device = (*size.device, "--processes", str(size.at_once))
    command = recipes.translate_training_set(recipes.SEQUENCE, BEAM, device)
    total = sum(1 for _ in (commands.out / "pieces" / "train.src").open(encoding="utf-8"))

    def work(folder: Path) -> None:
        commands.run(
            recipes.SEQUENCE,
            recipes.translate_training_set(folder.name, BEAM, device),
            total,
            recipes.sentence_of,
            recipes.TRANSLATION_ENVIRONMENT,
        )

    return Step(recipes.SEQUENCE, {"command": command}, work, (recipes.DATA, recipes.TEACHER), resumes=True)


def cache(commands: Commands, size: Size, described: Cache) -> Step:
    """The most probable words of a teacher."""

    def command(folder: str) -> List[str]:
        return [
            *("python", "-m", "kd_ext.teacher_cache", recipes.DATA, *size.device, "--max-tokens", "4000"),
            *("--teacher-checkpoint-path", f"{described.teacher}/{recipes.CHECKPOINT}"),
            *("--teacher-cache-dir", f"{folder}/cache", "--teacher-cache-top-k", str(described.words)),
            *("--processes", str(size.at_once)),
        ]

    def work(folder: Path) -> None:
        commands.run(described.name, command(folder.name), environment=size.environment)

    settings = {"command": command(described.name)}
    return Step(described.name, settings, work, (recipes.DATA, described.teacher), resumes=True)
