"""A made-up language pair, small enough to train on in seconds, and the commands that prepare it."""

import random
import subprocess
from pathlib import Path
from typing import List

from commands import script

LANGUAGES = ["hi", "ta", "bn"]
WORDS = [f"w{i}" for i in range(40)]


def sentence_pairs(count: int, seed: int, tagged: bool = True, languages: List[str] = LANGUAGES):
    """The target is the source reversed; the source begins with the tags of a language picked at random."""
    rng = random.Random(seed)
    for _ in range(count):
        words = [rng.choice(WORDS) for _ in range(rng.randint(2, 9))]
        tags = [f"__src__{rng.choice(languages)}", "__tgt__en"] if tagged else []
        yield " ".join(tags + words), " ".join(reversed(words))


def preprocess(folder: Path, tagged: bool = True, train: int = 300) -> Path:
    """Write and binarize the corpus; returns the folder for fairseq-train."""
    raw = folder / "raw"
    raw.mkdir(parents=True)
    for split, count, seed in (("train", train, 1), ("valid", 40, 2), ("test", 20, 3)):
        pairs = list(sentence_pairs(count, seed, tagged))
        for side, language in ((0, "src"), (1, "tgt")):
            (raw / f"{split}.{language}").write_text("".join(pair[side] + "\n" for pair in pairs))
    prefixes = [a for s in ("train", "valid", "test") for a in (f"--{s}pref", str(raw / s))]
    subprocess.run(
        [script("fairseq-preprocess"), "-s", "src", "-t", "tgt", "--joined-dictionary", *prefixes]
        + ["--destdir", str(folder / "bin"), "--workers", "1"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return folder / "bin"
