"""What the teacher's translations are made into: data, lists of what was taken and what failed, a table."""

import json
import os
from collections import Counter
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

from kd_ext.errors import ConfigError
from kd_ext.sequences.binarized import copy_rest, write_side
from kd_ext.sequences.choosing import Hypothesis, Taken
from kd_ext.sequences.work import TOO_LONG, Work
from kd_ext.sequences.work_files import MANIFEST, WorkFiles

FAILURES = {
    "empty": "no translation",
    "limit": "cut off at the length limit",
    "loop": "a loop of words",
    "ratio": "beyond --max-ratio",
    "words": "words that the data's dictionary does not have",
    TOO_LONG: "source too long for the teacher",
}
TRANSLATIONS, FAILED = "translations.tsv", "failures.tsv"
_SCORED = 10_000  # sentences, for BLEU and chrF


def check_sets(work: Work) -> None:
    """See that there is something to translate.

    Raises:
        ConfigError: there is not
    """
    if len(work.dataset) == 0:
        raise ConfigError(f"{work.folder}: --subset {work.options.subset} has no sentences; name another")


class _Line(NamedTuple):
    """One target of the result; `taken` is None for a reference."""

    id: int
    taken: Optional[Taken]
    reverse: Optional[float]


class Result:
    """Of a work that is done.

    Args:
        work: the data
        files: what became of each of its sentences
    """

    def __init__(self, work: Work, files: WorkFiles) -> None:
        self._work = work
        self._found: List[List[Tuple[Taken, Optional[float]]]] = [[] for _ in range(len(work.dataset))]
        for _, content in files.lines():
            for sentence in content:
                self._found[sentence["id"]] = [
                    (Taken(Hypothesis(tokens, score, failure == "limit"), choice, failure), reverse)
                    for choice, failure, score, tokens, reverse in sentence["taken"]
                ]
        self._least = self._least_reverse()
        self._dropped: Dict[str, int] = {"--min-score": 0, "--drop-worst": 0}
        self._lines = list(self._choose_lines())

    def _least_reverse(self) -> float:
        """Under which a reverse score is dropped."""
        share = self._work.options.drop_worst
        scores = np.sort([reverse for kept in self._found for _, reverse in kept if reverse is not None])
        worst = int(share * len(scores))
        return float(scores[worst]) if worst else -np.inf

    def _choose_lines(self) -> Iterator[_Line]:
        least = self._work.options.min_score
        for i, kept in enumerate(self._found):
            if not kept or kept[0][0].failure:
                yield _Line(i, None, None)
                continue
            for taken, reverse in kept:
                if least is not None and taken.hypothesis.score < least:
                    self._dropped["--min-score"] += 1
                elif reverse is not None and reverse < self._least:
                    self._dropped["--drop-worst"] += 1
                else:
                    yield _Line(i, taken, reverse)

    def check(self) -> None:
        """See that a translation is left: a set of references, or of nothing, is not what was asked for.

        Raises:
            ConfigError: there is none
        """
        if any(line.taken for line in self._lines):
            return
        scores = [taken.hypothesis.score for kept in self._found for taken, _ in kept if not taken.failure]
        if scores:
            options = self._work.options
            values = {"--min-score": options.min_score, "--drop-worst": options.drop_worst}
            flags = " ".join(f"{flag} {values[flag]}" for flag, count in self._dropped.items() if count)
            raise ConfigError(f"{flags}: every translation is dropped; the best score is {max(scores):.4f}")
        kinds = Counter(FAILURES[kind] for _, kind, _ in self._failures())
        said = ", ".join(f"{meaning} {count:,}" for meaning, count in kinds.most_common())
        raise ConfigError(
            f"--path {self._work.cfg.common_eval.path}: no translation of it can be used ({said}); give other flags of "
            "decoding, or another teacher"
        )

    def write(self, folder: str, manifest: Dict[str, Any]) -> None:
        """Make the folder with all of it, and with what tells it from others."""
        work = self._work
        if os.path.isdir(folder):  # of a start that was killed
            for name in os.listdir(folder):
                os.unlink(os.path.join(folder, name))
        os.makedirs(folder, exist_ok=True)
        try:
            copy_rest(work.task, work.folder, folder, work.options.subset)
            prefix = os.path.join(folder, f"{work.options.subset}.{work.source}-{work.target}")
            write_side(f"{prefix}.{work.source}", self._sources(), work.task.source_dictionary)
            write_side(f"{prefix}.{work.target}", self._targets(), work.task.target_dictionary)
            self._write_lists(folder)
            with open(os.path.join(folder, MANIFEST), "w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=1)
        except OSError as error:
            raise ConfigError(
                f"--destdir {work.options.destdir}: cannot be written: {error.strerror}; make room, and run the same "
                "command to go on"
            ) from error

    def _sources(self) -> Iterator[List[int]]:
        for line in self._lines:
            yield self._work.tokens_of("source", line.id)
        if self._work.options.with_references:
            for i in range(len(self._found)):
                yield self._work.tokens_of("source", i)

    def _targets(self) -> Iterator[List[int]]:
        for line in self._lines:
            yield line.taken.hypothesis.tokens if line.taken else self._work.tokens_of("target", line.id)
        if self._work.options.with_references:
            for i in range(len(self._found)):
                yield self._work.tokens_of("target", i)

    def _write_lists(self, folder: str) -> None:
        work = self._work
        with open(os.path.join(folder, TRANSLATIONS), "w", encoding="utf-8") as file:
            file.write("id\tscore\tratio\tchoice\treverse\ttext\n")
            for line in self._lines:
                if line.taken is None:
                    text = work.text(work.tokens_of("target", line.id))
                    file.write(f"{line.id}\t\t\treference\t\t{text}\n")
                    continue
                tokens, source = line.taken.hypothesis.tokens, work.tokens_of("source", line.id)
                reverse = "" if line.reverse is None else f"{line.reverse:.4f}"
                file.write(
                    f"{line.id}\t{line.taken.hypothesis.score:.4f}\t{len(tokens) / max(1, len(source)):.2f}\t"
                    f"{line.taken.choice}\t{reverse}\t{work.text(tokens)}\n"
                )
        with open(os.path.join(folder, FAILED), "w", encoding="utf-8") as file:
            file.write("id\tkind\ttext\n")
            for i, kind, taken in self._failures():
                file.write(f"{i}\t{kind}\t{work.text(taken.hypothesis.tokens) if taken else ''}\n")

    def _failures(self) -> Iterator[Tuple[int, str, Optional[Taken]]]:
        for i, kept in enumerate(self._found):
            if not kept:
                yield i, TOO_LONG, None
            elif kept[0][0].failure:
                yield i, kept[0][0].failure, kept[0][0]

    def table(self, seconds: float) -> str:
        """What a person looks at first."""
        taken = [line.taken.hypothesis.score for line in self._lines if line.taken]
        rows = [("sentences", f"{len(self._found):,}"), ("targets written", f"{self._written():,}")]
        kinds = [kind for _, kind, _ in self._failures()]
        for kind, meaning in FAILURES.items():
            if kind in kinds:
                rows.append((f"the reference instead: {meaning}", f"{kinds.count(kind):,}"))
        rows += [(f"dropped by {flag}", f"{count:,}") for flag, count in self._dropped.items() if count]
        rows.append(("mean score", f"{np.mean(taken):.4f}" if taken else "none"))
        rows += self._scores()
        rows.append(("seconds", f"{seconds:.0f} ({len(self._found) / max(seconds, 1e-9):.1f} sentences a second)"))
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])

    def _written(self) -> int:
        return len(self._lines) + (len(self._found) if self._work.options.with_references else 0)

    def _scores(self) -> List[Tuple[str, str]]:
        """Of what was taken, failures too, against the references."""
        import sacrebleu

        work, some = self._work, [i for i, kept in enumerate(self._found) if kept]
        some = some[:: -(-len(some) // _SCORED)] if some else []
        hypotheses = [work.text(self._found[i][0][0].hypothesis.tokens) for i in some]
        references = [[work.text(work.tokens_of("target", i)) for i in some]]
        if not some:
            return []
        of = "" if len(some) == len(self._found) else f", of {len(some):,} sentences"
        metrics: Any = (("BLEU", sacrebleu.corpus_bleu), ("chrF", sacrebleu.corpus_chrf))
        return [
            (f"{name} of the teacher against the references{of}", f"{metric(hypotheses, references).score:.1f}")
            for name, metric in metrics
        ]
