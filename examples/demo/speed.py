"""How fast models translate, on one core, by turns in one process; run by the demo.

``python speed.py DATA PIECES USER_DIR OUTPUT NAME=PATH ...``: each PATH is a checkpoint of fairseq, or a folder of
CTranslate2. Writes, of each NAME, the sentences a second with batches of 1 and of 32.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Dict, List

from pieces import MAX_PIECES
from served import Served

# sentences in a batch, and how many are translated each time
SIZES = {1: 60, 32: 640}
ROUNDS = 3
BEAM = 5
_Translate = Callable[[List[str], int], Any]


def main() -> None:
    data, pieces, user_dir, output, *models = sys.argv[1:]
    lines = Path(pieces).read_text(encoding="utf-8").splitlines()
    translators: Dict[str, _Translate] = {}
    for model in models:
        name, _, path = model.rpartition("=")
        translators[name] = Served(Path(path)) if os.path.isdir(path) else of_fairseq(path, data, user_dir)
    speeds: Dict[str, Dict[int, float]] = {name: {} for name in translators}
    for size, count in SIZES.items():
        some = lines[:: max(1, len(lines) // count)][:count]
        taken: Dict[str, List[float]] = {name: [] for name in translators}
        for _ in range(ROUNDS):
            for name, translate in translators.items():
                start = time.perf_counter()
                translate(some, size)
                taken[name].append(time.perf_counter() - start)
        for name in translators:
            speeds[name][size] = len(some) / statistics.median(taken[name])
    Path(output).write_text(json.dumps(speeds), encoding="utf-8")


def of_fairseq(path: str, data: str, user_dir: str) -> _Translate:
    """fairseq's generator with a checkpoint, as fairseq-generate has it."""
    import torch
    from fairseq import checkpoint_utils, utils
    from fairseq.data import data_utils
    from fairseq.dataclass.configs import FairseqConfig

    utils.import_user_module(Namespace(user_dir=user_dir))
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides={"data": data})
    model.eval().prepare_for_inference_(FairseqConfig())
    generator = task.build_generator([model], Namespace(beam=BEAM, max_len_b=2 * MAX_PIECES))
    words = task.source_dictionary

    def translate(lines: List[str], size: int) -> None:
        sentences = [words.encode_line(line, add_if_not_exist=False).long() for line in lines]
        sentences.sort(key=len)
        for start in range(0, len(sentences), size):
            batch = sentences[start : start + size]
            tokens = data_utils.collate_tokens(batch, words.pad(), left_pad=True)
            lengths = torch.tensor([len(sentence) for sentence in batch])
            generator.generate([model], {"net_input": {"src_tokens": tokens, "src_lengths": lengths}})

    return translate


if __name__ == "__main__":
    main()
