"""Data that is not mmap: what fairseq-preprocess --dataset-impl lazy, or raw, writes."""

import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from commands import PLUGIN, run
from conftest import KD, TRAINING
from fairseq.data import Dictionary, data_utils, indexed_dataset
from test_cli_teachers_by_language import PATH
from test_resume import assert_same_run
from test_sequence_distillation import COMMAND, FLAGS, both_sides, made_of

from kd_ext.errors import ConfigError
from kd_ext.exporting.sentences import sentences_for


def as_lazy(data, folder):
    """The same in the old format, which fairseq opens as "cached" unless it is told otherwise."""
    for index in data.glob("*.idx"):
        sentences = indexed_dataset.make_dataset(str(index.with_suffix("")), "mmap")
        builder = indexed_dataset.make_builder(str(folder / index.with_suffix(".bin").name), "lazy")
        for i in range(len(sentences)):
            builder.add_item(sentences[i])
        builder.finalize(str(folder / index.name))


def as_raw(data, folder):
    for split in ("train", "valid", "test"):
        for side in ("src", "tgt"):
            shutil.copy(data.parent / "raw" / f"{split}.{side}", folder / f"{split}.src-tgt.{side}")


@pytest.fixture(scope="module", params=[as_lazy, as_raw])
def foreign(request, data, tmp_path_factory):
    """Such data, and the flag that it needs."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    for name in ("dict.src.txt", "dict.tgt.txt"):
        shutil.copy(data / name, folder)
    request.param(data, folder)
    return folder, ["--dataset-impl", "raw"] if request.param is as_raw else []


def test_fairseq_trains_on_what_sequence_distillation_makes(foreign, data, teacher, tmp_path):
    """Without a flag: all sets are of one format."""
    folder, flags = foreign
    made_of(folder, teacher, tmp_path / "out", *flags, "--subset", "valid")
    made_of(data, teacher, tmp_path / "wanted", "--subset", "valid")
    for split in ("train", "valid", "test"):
        assert both_sides(tmp_path / "out", split) == both_sides(tmp_path / "wanted", split)
    training = [*TRAINING, "--arch", "transformer_tiny", "--criterion", "label_smoothed_cross_entropy"]
    training += ["--max-update", 1]
    result = run(tmp_path / "log", "fairseq-train", tmp_path / "out", *training, "--save-dir", tmp_path / "run")
    assert result.returncode == 0, result.output[-2000:]
    assert "valid on 'valid' subset" in result.output


def test_teachers_by_language(foreign, teacher, tmp_path):
    folder, flags = foreign
    path = f"hi={teacher},...={teacher}"
    filling = [
        *TRAINING,
        *KD,
        *flags,
        PATH,
        path,
        "--teacher-cache-top-k",
        8,
        "--teacher-cache-dir",
        tmp_path / "cache",
    ]
    result = run(tmp_path / "log", "kd_ext.teacher_cache", folder, *filling)
    assert result.returncode == 0, result.output[-2000:]
    assert "300/300" in result.output
    made_of(folder, path, tmp_path / "out", *flags, "--subset", "test")


def whole(made, data, folder):
    """Data that may be damaged, in one of two formats."""
    shutil.copytree(data, folder)
    if made is as_lazy:
        as_lazy(data, folder)
    return folder


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


FORMATS = pytest.mark.parametrize("made", [shutil.copytree, as_lazy])


@FORMATS
@pytest.mark.parametrize(
    ("ending", "keep"), [("bin", -1), ("bin", 0), ("idx", -1), ("idx", 30), ("idx", 3), ("idx", 0)]
)
def test_a_file_that_was_cut_off(made, ending, keep, data, tmp_path):
    path = whole(made, data, tmp_path / "data") / f"test.src-tgt.src.{ending}"
    prefix = str(path.with_suffix(""))
    words = Dictionary.load(str(data / "dict.src.txt"))
    assert len(data_utils.load_indexed_dataset(prefix, words)) == 20
    cut(path, keep)
    what = "cut off: it has .* bytes of" if ending == "bin" else "no whole index"
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))}: {what}.*preprocess again$"):
        data_utils.load_indexed_dataset(prefix, words, default="mmap")


@FORMATS
def test_a_file_that_is_longer(made, data, tmp_path, caplog):
    folder = whole(made, data, tmp_path / "data")
    shutil.copy(folder / "train.src-tgt.src.bin", folder / "test.src-tgt.src.bin")
    data_utils.load_indexed_dataset(str(folder / "test.src-tgt.src"), None)
    assert "test.src-tgt.src.bin: its index ends" in caplog.text


def test_an_index_in_another_order(data, tmp_path, caplog):
    """Or of some sentences, as other tools make them."""
    folder = whole(shutil.copytree, data, tmp_path / "data")
    prefix = str(folder / "test.src-tgt.src")
    made = indexed_dataset.make_dataset(prefix, "mmap")
    order, dtype = np.array([3, 19, 7, 0]), made._index.dtype
    sizes, pointers = made._index._sizes[order], made._index._pointers[order]
    wanted = [made[i] for i in order]
    with indexed_dataset.MMapIndexedDataset.Index.writer(f"{prefix}.idx.new", dtype) as writer:
        writer._get_pointers = lambda _: pointers
        writer.write(sizes)
    del made
    os.replace(f"{prefix}.idx.new", f"{prefix}.idx")
    found = data_utils.load_indexed_dataset(prefix, None)
    assert all(map(torch.equal, found, wanted))
    assert "its index ends" not in caplog.text
    cut(folder / "test.src-tgt.src.bin", -1)
    with pytest.raises(ConfigError, match="cut off"):
        data_utils.load_indexed_dataset(prefix, None)


@FORMATS
@pytest.mark.parametrize("asked", ["mmap", "lazy", "cached"])
def test_a_format_that_is_asked_for(made, asked, data, tmp_path):
    folder = whole(made, data, tmp_path / "data")
    prefix = str(folder / "test.src-tgt.src")
    wanted = indexed_dataset.make_dataset(str(data / "test.src-tgt.src"), "mmap")
    if (asked == "mmap") is (made is as_lazy):
        with pytest.raises(ConfigError, match=f"^--dataset-impl {asked}: .* is in another format"):
            data_utils.load_indexed_dataset(prefix, None, asked)
        return
    found = data_utils.load_indexed_dataset(prefix, None, asked)
    assert list(found.sizes) == list(wanted.sizes)
    for dataset in (found, pickle.loads(pickle.dumps(found))):  # as workers of another start method get it
        assert len(dataset) == 20
        assert all(torch.equal(dataset[i], wanted[i]) for i in (19, 3, *range(20)))
    assert getattr(found, "data_file", None) is None  # which workers would move under each other


@FORMATS
@pytest.mark.parametrize("has_an_empty_sentence", [False, True])
def test_a_set_without_a_sentence(made, has_an_empty_sentence, data, tmp_path):
    prefix = str(whole(made, data, tmp_path / "data") / "valid.src-tgt.tgt")
    builder = indexed_dataset.make_builder(f"{prefix}.bin", "lazy" if made is as_lazy else "mmap", vocab_size=99)
    if has_an_empty_sentence:
        builder.add_item(torch.tensor([], dtype=torch.int32))
    builder.finalize(f"{prefix}.idx")
    with pytest.raises(ConfigError, match=f"^{re.escape(prefix)}: a set without a sentence; .*--disable-validation"):
        data_utils.load_indexed_dataset(prefix, None)


def test_huffman_coded_data_is_another_format(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    prefix = tmp_path / "data" / "test.src-tgt.src"
    prefix.with_name("test.src-tgt.src.idx").write_bytes(b"HUFFIDX\x00\x00" + bytes(99))
    with pytest.raises(ConfigError, match=r"^--dataset-impl mmap: .* is in another format"):
        data_utils.load_indexed_dataset(str(prefix), None, "mmap")


TEACHER = "--teacher-checkpoint-path"
COMMANDS = {
    "fairseq-train": (TEACHER, [*TRAINING, *KD, "--arch", "transformer_tiny", "--kd-strategy", "word_level"]),
    "kd_ext.teacher_cache": (TEACHER, [*TRAINING, *KD, "--teacher-cache-top-k", "8"]),
    "fairseq-generate": ("--path", [*PLUGIN, "--gen-subset", "train"]),
    COMMAND: ("--path", FLAGS),
}
OUTPUTS = {"fairseq-train": "--save-dir", "kd_ext.teacher_cache": "--teacher-cache-dir", COMMAND: "--destdir"}


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_begun(command, data, teacher, tmp_path):
    """With data that was cut off, and with other sentences on one side than on the other."""
    flag, flags = COMMANDS[command]
    output = [OUTPUTS[command], tmp_path / "out"] if command in OUTPUTS else []
    folder = whole(shutil.copytree, data, tmp_path / "data")
    path = folder / "train.src-tgt.tgt.bin"
    cut(path, -1)
    result = run(tmp_path / "log", command, folder, flag, teacher, *flags, *output)
    assert f"kd_ext: error: {path}: cut off" in result.last_line
    assert "Traceback" not in result.output

    for ending in ("bin", "idx"):
        shutil.copy(data / f"valid.src-tgt.tgt.{ending}", folder / f"train.src-tgt.tgt.{ending}")
    result = run(tmp_path / "log", command, folder, flag, teacher, *flags, *output)
    assert result.last_line.startswith("kd_ext: error: ")
    assert re.search("other numbers of sentences on its two sides|same number of examples", result.last_line)
    assert "Traceback" not in result.output
    assert not [path for path in tmp_path.glob("out/*") if path.name != ".kd_ext.lock"]


def test_training_in_the_old_format(data, tmp_path):
    """As in the new one, and by several workers."""
    runs = {"mmap": (data, 0), "old": (whole(as_lazy, data, tmp_path / "data"), 0), "workers": (tmp_path / "data", 2)}
    training = [*TRAINING, "--arch", "transformer_tiny", "--criterion", "label_smoothed_cross_entropy"]
    training += ["--max-update", 12, "--no-epoch-checkpoints"]
    for name, (folder, workers) in runs.items():
        flags = ["--num-workers", workers, "--save-dir", tmp_path / name]
        result = run(tmp_path / "log", "fairseq-train", folder, *training, *flags)
        assert result.returncode == 0, result.output[-2000:]
    wanted, *others = (tmp_path / name / "checkpoint_last.pt" for name in runs)
    for other in others:
        assert_same_run(wanted, other)


def test_sentences_to_compare_exported_models_on(data, tmp_path):
    words = Dictionary.load(str(data / "dict.src.txt"))
    as_lazy(data, tmp_path)
    found, wanted = (sentences_for(str(folder), "src", "tgt", words, 7, 1000) for folder in (tmp_path, data))
    assert found.tokens == wanted.tokens


def test_text_beside_what_was_made_of_it_stays(data, teacher, tmp_path):
    """References to score with, say: neither read in place of the set nor lost."""
    shutil.copytree(data, tmp_path / "bin")
    for split in ("valid", "test"):
        (tmp_path / "bin" / f"{split}.src-tgt.tgt").write_bytes("Straße, of no dictionary\n".encode("latin1"))
    made_of(tmp_path / "bin", teacher, tmp_path / "out", "--dataset-impl", "mmap", "--subset", "train")
    for path in (tmp_path / "bin").iterdir():
        if path.name.split(".")[0] in ("dict", "valid", "test"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
