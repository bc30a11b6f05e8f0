"""(h) The speed of python -m kd_ext.sequence_distillation over fairseq-generate's, by beam and batch size.

``python benchmarks/sequence_distillation.py`` translates sentences of the demo's training set with the demo's teacher,
by both commands in turns, whole commands from start to end. The demo has to have made data and teacher (``make demo``).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import List

from common import HERE, THREADS, save
from fairseq.data import indexed_dataset
from tqdm import tqdm

MAX_TOKENS = [1000, 4000, 12000]
BEAMS = [1, 5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo-run"), help="its folder: %(default)s")
    parser.add_argument("--sentences", type=int, default=3000, help="%(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="%(default)s")
    options = parser.parse_args()
    teacher = options.demo.resolve() / "teacher" / "checkpoint_last.pt"
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        few(options.demo.resolve() / "data", data, options.sentences)
        runs = [(command, beam, size) for beam in BEAMS for size in MAX_TOKENS for command in ("generate", "sequence")]
        taken = {run: [] for run in runs}
        for _ in range(options.rounds):
            for run in tqdm(runs):
                taken[run].append(seconds(*run, data, teacher, Path(folder) / "out"))
    rows = [
        {"command": command, "beam": beam, "max_tokens": size, "sentences_per_second": options.sentences / min(times)}
        for (command, beam, size), times in taken.items()
    ]
    save("sequence_distillation", rows, sentences=options.sentences)
    for row in rows:
        print(row)


def few(data: Path, destination: Path, count: int) -> None:
    """Data whose training set is so many sentences of another's, from all over it."""
    destination.mkdir()
    for path in data.glob("dict.*"):
        shutil.copy(path, destination)
    for side in ("src", "en"):
        prefix = f"train.src-en.{side}"
        found = indexed_dataset.make_dataset(str(data / prefix), "mmap")
        builder = indexed_dataset.make_builder(str(destination / f"{prefix}.bin"), "mmap", 65_000)
        for i in range(count):
            builder.add_item(found[i * len(found) // count])
        builder.finalize(str(destination / f"{prefix}.idx"))


def seconds(command: str, beam: int, size: int, data: Path, teacher: Path, out: Path) -> float:
    flags: List[str] = [str(data), "--path", str(teacher), "--beam", str(beam), "--max-tokens", str(size), "--cpu"]
    if command == "generate":
        start = [str(Path(sys.executable).parent / "fairseq-generate"), "--user-dir", str(HERE.parent / "kd_ext")]
        flags += ["--gen-subset", "train"]
    else:
        start = [sys.executable, "-m", "kd_ext.sequence_distillation"]
        flags += ["--destdir", str(out)]
    began = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    subprocess.run([*start, *flags], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    taken = time.perf_counter() - began
    shutil.rmtree(out, ignore_errors=True)
    return taken


if __name__ == "__main__":
    main()
