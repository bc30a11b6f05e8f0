import os

os.environ.update(OMP_NUM_THREADS="1")  # before torch is imported

import pytest
import torch
from commands import PLUGIN, Result, run
from corpus import preprocess

import kd_ext  # noqa: F401  lets checkpoints of fairseq be read
from kd_ext.files.safe_loading import load
from kd_ext.modules.adapter import Adapter

SIZES = ["--encoder-layers", "1", "--decoder-layers", "1", "--encoder-attention-heads", "2"]
SIZES += ["--decoder-attention-heads", "2", "--encoder-embed-dim", "16", "--decoder-embed-dim", "16"]
SIZES += ["--encoder-ffn-embed-dim", "32", "--decoder-ffn-embed-dim", "32"]
TRAINING = [*PLUGIN, "--optimizer", "adam", "--lr", "0.01", "--max-tokens", "200", "--cpu", "--num-workers", "0"]
TRAINING += ["--no-progress-bar", "--log-interval", "1", "--label-smoothing", "0.1", "--max-epoch", "50"]
KD = ["--task", "translation_with_kd", "--criterion", "label_smoothed_cross_entropy_with_kd"]
STRATEGIES = {
    "word_seq_level": ["--alpha", "0.5"],
    "word_level": [],
    "batch_level": ["--kd-rate", "0.5"],
    "global_level": ["--kd-rate", "0.5", "--kd-queue-size", "700"],
    "global_language_wise": ["--kd-rate", "0.5", "--kd-queue-size", "300"],
}


def _half_on_cpu():
    try:
        return (torch.ones(1, 1).half() @ torch.ones(1, 1).half()).item() == 1
    except RuntimeError:
        return False


needs_half = pytest.mark.skipif(not _half_on_cpu(), reason="torch < 2.1 has no half precision on a CPU")


def strategy_flags(strategy):
    return ["--kd-strategy", strategy, *STRATEGIES[strategy]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The folder with ``bin`` (binarized) and ``raw`` (text) of the tagged corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    preprocess(folder)
    return folder


@pytest.fixture(scope="session")
def data(corpus):
    return corpus / "bin"


@pytest.fixture(scope="session")
def train(data):
    """Runs fairseq-train into a folder, forked; returns its exit status and what it printed."""

    def train(save_dir, *flags, arch="transformer") -> Result:
        save_dir.mkdir(parents=True, exist_ok=True)
        log = save_dir / "log"
        return run(log, "fairseq-train", *[data, *TRAINING, "--arch", arch, *SIZES, "--save-dir", save_dir, *flags])

    return train


@pytest.fixture(scope="session")
def teacher(train, tmp_path_factory, data):
    """The checkpoint of a teacher, trained by upstream's own task and criterion."""
    save_dir = tmp_path_factory.mktemp("teacher")
    result = train(save_dir, "--criterion", "label_smoothed_cross_entropy", "--max-update", "40")
    assert result.returncode == 0, result.output
    return save_dir / "checkpoint_last.pt"


@pytest.fixture(scope="session")
def distil(train, teacher):
    """Runs fairseq-train with the teacher, or with one that the flags name."""

    def distil(save_dir, *flags, strategy="word_seq_level", **kwargs) -> Result:
        named = [] if "--teacher-checkpoint-path" in flags else ["--teacher-checkpoint-path", teacher]
        return train(save_dir, *KD, *named, *strategy_flags(strategy), *flags, **kwargs)

    return distil


@pytest.fixture(scope="session")
def student(distil, tmp_path_factory):
    """The checkpoint of a student distilled with language-wise selection."""
    save_dir = tmp_path_factory.mktemp("student")
    result = distil(save_dir, "--max-update", "20", strategy="global_language_wise")
    assert result.returncode == 0, result.output
    return save_dir / "checkpoint_last.pt"


@pytest.fixture(scope="session")
def exportable(train, tmp_path_factory):
    """Checkpoints by name: a stacked and factorized one, an untied one, and one with adapters of random values."""
    folder = tmp_path_factory.mktemp("exportable")
    # enough for translations that differ from sentence to sentence
    learning = ["--criterion", "label_smoothed_cross_entropy", "--lr", "0.02", "--max-tokens", "1000", "--dropout", "0"]
    learning += ["--encoder-normalize-before", "--decoder-normalize-before", "--max-update", "120", "--max-epoch", "0"]
    learning += ["--disable-validation", "--save-interval", "1000"]

    def trained(name, *flags):
        result = train(folder / name, *flags, *learning, "--no-epoch-checkpoints", arch="transformer_ext")
        assert result.returncode == 0, result.output
        return folder / name / "checkpoint_last.pt"

    compact = ["--encoder-recurrent-stacking", "3", "--decoder-recurrent-stacking", "2"]
    compact += ["--encoder-factorized-embed-dim", "12", "--decoder-factorized-embed-dim", "12"]
    base = trained("base", "--share-all-embeddings")
    adapted = folder / "adapted.pt"
    torch.save(with_adapters(load(base)), adapted)
    return {
        "compact": trained("compact", *compact, "--share-all-embeddings"),
        "untied": trained("untied", *compact, "--layernorm-embedding", "--decoder-learned-pos"),
        "adapted": adapted,
    }


def with_adapters(state, gated=False):
    """A checkpoint of one layer a side, 16 wide, with adapters hi and ta on it, of which hi is the trained one."""
    generator = torch.Generator().manual_seed(1)
    for side in ("encoder", "decoder"):
        settings = {"add_adapters": True, "adapter_ids": "hi,ta", "train_adapter": "hi", "adapter_use_gating": gated}
        vars(state["cfg"]["model"]).update({f"{side}_{name}": value for name, value in settings.items()})
        for name in ("hi", "ta"):
            adapter = Adapter(16, 8, "relu", torch.nn.Identity(), gated)
            for part, tensor in adapter.state_dict().items():
                noise = torch.randn(tensor.shape, generator=generator) * 0.3
                state["model"][f"{side}.layers.0.adapters.{name}.{part}"] = tensor + noise
    return state


def pytest_runtest_logreport(report):
    """Say at once what failed, to a file: a run that is cut off says nothing at its end."""
    path = os.environ.get("KD_EXT_FAILURES")
    if path and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(path, "a") as file:
            file.write(f"{report.nodeid} ({report.when})\n{report.longreprtext[-1500:]}\n\n")
