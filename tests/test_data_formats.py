"""Data that is not mmap: what fairseq-preprocess --dataset-impl lazy, or raw, writes."""

import shutil

import pytest
from commands import run
from conftest import KD, TRAINING
from fairseq.data import Dictionary, indexed_dataset
from test_cli_teachers_by_language import PATH
from test_sequence_distillation import both_sides, made_of

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
