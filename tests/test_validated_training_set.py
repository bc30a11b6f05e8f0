"""A run that also validates on what it trains on trains as one that does not."""

import re

import pytest
from test_resume import assert_same_run
from test_sanity_validation import SANITY

DROPOUT = ["--dropout", "0.3", "--no-epoch-checkpoints"]
OFTEN = ["--validate-interval-updates", "5", "--save-interval-updates", "5", "--keep-interval-updates", "1"]

FLAGS = {"": [], "often": OFTEN, "first": [SANITY], "cache": ["--teacher-cache-top-k", "8"]}


@pytest.fixture(scope="module")
def plain(distil, tmp_path_factory):
    """The last checkpoint of each strategy's run that validates on other data: three epochs of 16 updates."""
    folder = tmp_path_factory.mktemp("plain")
    made = {}
    for strategy in ("word_level", "global_language_wise"):
        result = distil(folder / strategy, *DROPOUT, "--max-epoch", "3", strategy=strategy)
        assert result.returncode == 0, result.output[-2000:]
        assert "num_updates=48" in result.output.replace(" ", "") or "num_updates 48" in result.output
        made[strategy] = folder / strategy / "checkpoint_last.pt"
    return made


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("strategy", ["word_level", "global_language_wise"])
def test_epochs_and_weights(plain, distil, tmp_path, strategy, flags):
    """Also where it is stopped in mid-epoch and gone on with."""
    cache = ["--teacher-cache-dir", tmp_path / "cache"] if "--teacher-cache-top-k" in flags else []
    flags = [*DROPOUT, *flags, *cache, "--valid-subset", "train,valid", "--max-epoch", "3"]
    if cache:
        other = distil(tmp_path / "other", *flags, "--valid-subset", "valid", strategy=strategy)
        assert other.returncode == 0, other.output[-2000:]
    wanted = tmp_path / "other/checkpoint_last.pt" if cache else plain[strategy]
    for stop in (["--max-update", "22"], []):
        result = distil(tmp_path / "run", *flags, *stop, strategy=strategy)
        assert result.returncode == 0, result.output[-2000:]
    assert re.findall(r"epoch (\d+) \| valid on 'train' subset", result.output)[-1] == "003"
    assert_same_run(wanted, tmp_path / "run/checkpoint_last.pt")
