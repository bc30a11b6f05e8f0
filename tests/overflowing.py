"""fairseq-train with what upstream's overflow needs on a CPU, and with updates left out.

``python overflowing.py SKIP ...``: of the batches of a run, the first SKIP make no update.
"""

import sys

import torch
from fairseq.trainer import Trainer
from fairseq_cli.train import cli_main


def main() -> None:
    left = int(sys.argv.pop(1))
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self: self  # upstream says so of the norm of a gradient that overflows
    step = Trainer.train_step

    def train_step(self, samples, **kwargs):
        nonlocal left
        if left > 0:
            left -= 1
            return None
        return step(self, samples, **kwargs)

    Trainer.train_step = train_step
    cli_main()


if __name__ == "__main__":
    main()
