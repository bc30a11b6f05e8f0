"""(g) How much of a step is padding, and what leaving it out of the feed-forward parts could win, on paper.

After ``make demo``, or its steps up to the binarized text, ``python benchmarks/padding.py`` makes the batches that
fairseq would make for training, of the demo's sentences and of sentences of 8 to 60 words.
"""

import argparse
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

import numpy as np
import torch
from common import save
from fairseq.data import Dictionary, LanguagePairDataset, data_utils
from fairseq.data.data_utils import load_indexed_dataset

MAX_TOKENS = (2000, 4000, 8192)
MULTIPLES = (8, 1)
RANDOM_SENTENCES = 30_000
STUDENT, TEACHER, VOCABULARY = (256, 3), (512, 6), 32_000  # of steps.py


class Positions(NamedTuple):
    """Of all batches of an epoch: positions of either side with padding, and the real ones."""

    source: int
    real_source: int
    target: int
    real_target: int


def demo_lengths(data: Path) -> Tuple[np.ndarray, np.ndarray]:
    """Of source and target, with their ends of sentence."""
    sides = []
    for language in ("src", "en"):
        words = Dictionary.load(str(data / f"dict.{language}.txt"))
        text = load_indexed_dataset(str(data / f"train.src-en.{language}"), words)
        sides.append(np.array(text.sizes))  # its own are memory of the file, which is closed with it
    return sides[0], sides[1]


def random_lengths(same: bool) -> Tuple[np.ndarray, np.ndarray]:
    """8 to 60 words and an end of sentence; the target as long as the source, or 0.8 to 1.25 times as long."""
    rng = np.random.default_rng(0)
    source = rng.integers(8, 61, RANDOM_SENTENCES)
    target = source if same else np.clip((source * rng.uniform(0.8, 1.25, len(source))).round().astype(int), 8, 60)
    return source + 1, target + 1


class Lengths(torch.utils.data.Dataset):
    """Sentences of which only the lengths are known."""

    def __init__(self, sizes: np.ndarray) -> None:
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)


def batches(source: np.ndarray, target: np.ndarray, max_tokens: int, multiple: int) -> List[np.ndarray]:
    """As fairseq's translation task makes them for training."""
    words = Dictionary()
    dataset = LanguagePairDataset(Lengths(source), source, words, Lengths(target), target, words)
    with data_utils.numpy_seed(1):
        indices = dataset.ordered_indices()
    return dataset.batch_by_size(indices, max_tokens=max_tokens, required_batch_size_multiple=multiple)


def count(source: np.ndarray, target: np.ndarray, made: List[np.ndarray]) -> Positions:
    padded = [sum(len(batch) * int(side[batch].max()) for batch in made) for side in (source, target)]
    return Positions(padded[0], int(source.sum()), padded[1], int(target.sum()))


def products(positions: Positions, width: int, layers: int) -> Dict[str, float]:
    """Multiply-adds of one pass, attention's own products left out: they are few where sentences are short.

    A layer multiplies each position by matrices of 4 d x d in self-attention and 2 x d x 4d in its feed-forward part;
    cross-attention by 2 d x d at target and 2 d x d at source positions; the projection, d x V, real positions alone.
    """
    square = layers * width * width
    both, real = positions.source + positions.target, positions.real_source + positions.real_target
    return {
        "attention": square * (4 * both + 2 * both),
        "feed-forward": square * 8 * both,
        "feed-forward of padding": square * 8 * (both - real),
        "projection": VOCABULARY * width * positions.real_target,
    }


def won(positions: Positions) -> Dict[str, float]:
    """What padding in the feed-forward parts is of a layer, of the teacher's pass and of a whole step's products.

    A step is the teacher's pass, and the student's with twice as much again for its gradient.
    """
    student, teacher = products(positions, *STUDENT), products(positions, *TEACHER)
    whole = {name: teacher[name] + 3 * student[name] for name in student}
    total = sum(whole[name] for name in ("attention", "feed-forward", "projection"))
    of_layers = teacher["attention"] + teacher["feed-forward"]
    return {
        "of_a_layer": teacher["feed-forward of padding"] / of_layers,
        "of_the_teacher": teacher["feed-forward of padding"] / (of_layers + teacher["projection"]),
        "of_a_step": whole["feed-forward of padding"] / total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo-run"), help="its folder: %(default)s")
    texts = {
        "the demo's": demo_lengths(parser.parse_args().demo / "data"),
        "8 to 60 words, both sides alike": random_lengths(same=True),
        "8 to 60 words, target 0.8 to 1.25 of source": random_lengths(same=False),
    }
    rows = []
    for text, (source, target) in texts.items():
        for max_tokens in MAX_TOKENS:
            for multiple in MULTIPLES:
                made = batches(source, target, max_tokens, multiple)
                positions = count(source, target, made)
                row = {"text": text, "max_tokens": max_tokens, "multiple": multiple, "batches": len(made)}
                row["source"] = 1 - positions.real_source / positions.source
                row["target"] = 1 - positions.real_target / positions.target
                rows.append({**row, **won(positions)})
                print({name: round(x, 3) if isinstance(x, float) else x for name, x in rows[-1].items()}, flush=True)
    save("padding", rows, student=STUDENT, teacher=TEACHER, vocabulary=VOCABULARY)


if __name__ == "__main__":
    main()
