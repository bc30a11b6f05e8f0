"""fairseq-train whose ``--ddp-backend pytorch_ddp`` takes a model on a CPU.

fairseq 0.12.2 names the wrapper the number of a GPU, which torch refuses for a model on a CPU. All else is the same.
"""

from fairseq.models import distributed_fairseq_model
from fairseq_cli import train
from torch.nn.parallel import DistributedDataParallel


def _wrap(**arguments):
    return DistributedDataParallel(**{**arguments, "device_ids": None, "output_device": None})


def main() -> None:
    distributed_fairseq_model.DistributedDataParallel = _wrap
    train.cli_main()


if __name__ == "__main__":
    main()
