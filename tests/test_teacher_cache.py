"""A kept teacher: training from files is training with the teacher, and wrong or damaged files are refused."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import ENVIRONMENT, PLUGIN, Forked, Result, launcher, run, script
from conftest import KD, SIZES, STRATEGIES, TRAINING, load, strategy_flags
from stubs import Run, random_batch
from test_bad_usage import assert_refused
from test_damaged_files import flip, swap, truncate
from test_resume import assert_same_run, is_trained

from kd_ext.errors import ConfigError
from kd_ext.files.cache_files import CacheFiles, create, read_manifest

V = 48  # words of the corpus
LENGTHS = np.array([3, 1, 4, 2])


@pytest.fixture(scope="session")
def fill(data, teacher):
    """Runs ``python -m kd_ext.teacher_cache``, forked."""

    def fill(folder, *flags) -> Result:
        known = [data, *TRAINING, *KD, "--teacher-checkpoint-path", teacher, "--teacher-cache-dir", folder]
        return run(folder.with_suffix(".log"), "kd_ext.teacher_cache", *known, *flags)

    return fill


@pytest.fixture(scope="session")
def cache(fill, tmp_path_factory):
    """A complete cache of the 8 most probable words."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    result = fill(folder, "--teacher-cache-top-k", 8)
    assert result.returncode == 0, result.output
    return folder


def cached(folder, *flags, strategy="word_seq_level"):
    return [*KD, *strategy_flags(strategy), "--teacher-cache-dir", folder, *flags]


def assert_close_weights(first, second, tolerance):
    first, second = load(first)["model"], load(second)["model"]
    for name in filter(is_trained, first):
        torch.testing.assert_close(first[name], second[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_words_are_the_teacher(distil, tmp_path, strategy, temperature):
    """K = V. Sums of a matrix product in another order differ in the last bits: SGD does not amplify them."""
    flags = ["--optimizer", "sgd", "--lr", "0.2", "--max-update", 24, "--kd-temperature", temperature]
    whole = [*flags, "--save-dir", tmp_path / "whole"]
    assert distil(tmp_path / "whole", *whole, strategy=strategy).returncode == 0
    kept = ["--teacher-cache-dir", tmp_path / "cache", "--teacher-cache-top-k", V]
    result = distil(tmp_path / "kept", *flags, *kept, strategy=strategy)
    assert result.returncode == 0, result.output[-2000:]
    assert_close_weights(tmp_path / "whole/checkpoint_last.pt", tmp_path / "kept/checkpoint_last.pt", 1e-5)


@pytest.mark.parametrize("strategy", ["word_level", "global_language_wise"])
def test_whether_it_was_there_makes_no_difference(distil, train, tmp_path, strategy):
    """Filled while training, then read without a teacher: the same weights, bit for bit."""
    flags = ["--dropout", "0.1", "--max-update", 40, "--teacher-cache-top-k", 4]
    folder = tmp_path / "cache"
    filling = distil(tmp_path / "a", *flags, "--teacher-cache-dir", folder, strategy=strategy)
    assert filling.returncode == 0, filling.output[-2000:]
    assert "300 sentences, of which 0 are there" in filling.output
    assert filling.output.count("the teacher is not needed any more") == 1
    reading = train(tmp_path / "b", *cached(folder, *flags, strategy=strategy))
    assert reading.returncode == 0, reading.output[-2000:]
    assert "loaded teacher" not in reading.output
    assert_same_run(tmp_path / "a/checkpoint_last.pt", tmp_path / "b/checkpoint_last.pt")


def test_a_run_that_fills_it_can_be_stopped(distil, tmp_path):
    flags = ["--dropout", "0.1", "--teacher-cache-top-k", 4]
    for name, updates in (("whole", [20]), ("parts", [10, 20])):
        for count in updates:  # 16 an epoch: the first stop leaves the cache half full
            kept = ["--teacher-cache-dir", tmp_path / f"{name}.cache", "--max-update", count]
            result = distil(tmp_path / name, *flags, *kept)
            assert result.returncode == 0, result.output[-2000:]
    assert "of which 0 are there" not in result.output
    assert_same_run(tmp_path / "whole/checkpoint_last.pt", tmp_path / "parts/checkpoint_last.pt")


def test_filled_beforehand(cache, fill, train, data, teacher, tmp_path):
    """By two processes as by one, and again where it is full; then two students learn without the teacher."""
    command = [
        sys.executable,
        "-m",
        "kd_ext.teacher_cache",
        data,
        "--teacher-checkpoint-path",
        teacher,
        "--max-tokens",
        200,
    ]
    command += ["--teacher-cache-dir", tmp_path / "two", "--teacher-cache-top-k", 8, "--processes", 2, "--cpu"]
    result = as_typed(*command)
    assert result.returncode == 0, result.output[-2000:]
    assert "300/300" in result.output
    assert result.last_line.endswith("two: 300 sentences are there")  # not that locks were left behind
    for name in ("words", "probs"):
        first, second = np.load(cache / f"{name}.npy"), np.load(tmp_path / f"two/{name}.npy")
        assert np.array_equal(first, second)
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert fill(cache).returncode == 0
    assert before == {path.name: path.read_bytes() for path in cache.iterdir()}
    for arch in ("transformer", "transformer_recurrent_stacking"):
        result = train(tmp_path / arch, *cached(cache, "--max-update", 3), arch=arch)
        assert result.returncode == 0, result.output[-2000:]
        assert "loaded teacher" not in result.output


def test_filled_in_parts(fill, cache, tmp_path, data, teacher):
    """Killed at any moment, and started again."""
    folder = tmp_path / "cache"
    command = [data, *TRAINING, *KD, "--teacher-checkpoint-path", teacher, "--teacher-cache-dir", folder]
    command += ["--teacher-cache-top-k", 8]
    for kill in range(3):
        process = Forked(tmp_path / f"{kill}.log", "kd_ext.teacher_cache", *command, "--max-tokens", 20)
        process.kill_when(
            # the manifest is written last: what is there before it can be empty
            lambda kill=kill: (folder / "manifest.json").exists() and sums(folder).astype(bool).sum() > 40 * kill
        )
        assert 0 < sums(folder).astype(bool).sum() < 300
    assert fill(folder).returncode == 0
    assert sums(folder).all()
    np.testing.assert_allclose(np.load(folder / "probs.npy"), np.load(cache / "probs.npy"), rtol=1e-4, atol=1e-7)


def sums(folder):
    return np.load(folder / "sums.npy")


def as_typed(*command) -> Result:
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([str(part) for part in command], env=ENVIRONMENT, timeout=300, **output)
    return Result(done.returncode, done.stdout)


def test_two_workers(teacher, cache, data, tmp_path):
    """They fill one cache, with what one process finds."""
    command = [data, *TRAINING, "--arch", "transformer", *SIZES, *cached(tmp_path / "cache"), "--max-epoch", 1]
    command += ["--teacher-cache-top-k", 8, "--teacher-checkpoint-path", teacher, "--save-dir", tmp_path]
    command += ["--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp"]
    result = as_typed(*launcher(2), script("fairseq-train"), *command)
    assert result.returncode == 0, result.output[-2000:]
    assert sums(tmp_path / "cache").all()
    first, second = np.load(tmp_path / "cache/probs.npy"), np.load(cache / "probs.npy")
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-7)


def test_parts_of_the_data(cache, teacher, data, tmp_path):
    """One a epoch, as fairseq reads A:B: each has a cache of its own."""
    shutil.copytree(data, tmp_path / "b")
    for path in list((tmp_path / "b").glob("valid.*")):
        shutil.copy(path, tmp_path / "b" / path.name.replace("valid", "train"))
    command = [f"{data}:{tmp_path / 'b'}", *TRAINING, "--arch", "transformer", *SIZES, "--max-epoch", 2, "--no-save"]
    with_teacher = ["--teacher-checkpoint-path", teacher, "--teacher-cache-top-k", 8]
    result = run(tmp_path / "log", "fairseq-train", *command, *cached(tmp_path / "cache", *with_teacher))
    assert result.returncode == 0, result.output[-2000:]
    assert "of which 0 are there" in result.output
    assert len(sums(tmp_path / "cache/0")) == 300
    assert len(sums(tmp_path / "cache/1")) == 40
    assert sums(tmp_path / "cache/0").all()
    assert sums(tmp_path / "cache/1").all()
    result = run(tmp_path / "log", "fairseq-train", *command, *cached(tmp_path / "cache"))
    assert result.returncode == 0, result.output[-2000:]
    assert "loaded teacher" not in result.output
    # now, and not at the beginning of the second epoch: a part of another teacher, of another K, and none
    manifest = tmp_path / "cache/1/manifest.json"
    whole = manifest.read_text()
    for key, value, said in (("teacher", "x", "other teacher"), ("top_k", 4, "use 4"), ("vocabulary", 50, "other voc")):
        manifest.write_text(json.dumps({**json.loads(whole), key: value}))
        result = run(tmp_path / "log", "fairseq-train", *command, *cached(tmp_path / "cache"))
        assert_refused(result, tmp_path, tmp_path / "cache/1", said)
    shutil.rmtree(tmp_path / "cache/1")
    result = run(tmp_path / "log", "fairseq-train", *command, *cached(tmp_path / "cache"))
    assert_refused(result, tmp_path, tmp_path / "cache/1", "there is no cache yet", "--teacher-checkpoint-path")
    one_epoch = [*command, "--max-epoch", 1]  # fairseq asks for the second part, and does not use it
    result = run(tmp_path / "log", "fairseq-train", *one_epoch, *cached(tmp_path / "cache", *with_teacher))
    assert result.returncode == 0, result.output[-2000:]
    assert not (tmp_path / "cache/1").exists()


def test_one_precision(distil, train, teacher, fill, tmp_path):
    """A cache is filled in that in which it was begun; only to fill it, a run must have that one."""
    folder, path = tmp_path / "cache", ["--teacher-checkpoint-path", teacher]
    begun = distil(tmp_path / "begun", "--teacher-cache-dir", folder, "--bf16", "--max-update", 3)
    assert begun.returncode == 0, begun.output[-2000:]
    assert "teacher placed on cpu as torch.bfloat16" in begun.output
    assert read_manifest(str(folder))["teacher_dtype"] == "bfloat16"
    other = distil(tmp_path / "other", "--teacher-cache-dir", folder)
    said = ["--teacher-dtype is missing", "would run, is float32", "give --teacher-dtype bfloat16"]
    assert_refused(other, tmp_path / "other", *said)
    named = distil(tmp_path / "other", "--teacher-cache-dir", folder, "--teacher-dtype", "float32")
    assert_refused(named, tmp_path / "other", "--teacher-dtype float32", folder, "use bfloat16")
    filling = fill(folder)
    assert filling.last_line.startswith("kd_ext: error: --teacher-dtype is missing"), filling.output[-2000:]
    filling = fill(folder, "--teacher-dtype", "bfloat16")
    assert filling.returncode == 0, filling.output[-2000:]
    full = sums(folder)
    assert full.all()
    # who reads says no precision, or the right one
    assert train(tmp_path / "reads", *cached(folder, *path, "--max-update", 1)).returncode == 0
    named = train(tmp_path / "other", *cached(folder, *path, "--teacher-dtype", "float16"))
    assert_refused(named, tmp_path / "other", "--teacher-dtype float16", folder, "use bfloat16")
    # of an earlier version
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["teacher_dtype"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    np.save(folder / "sums.npy", np.where(np.arange(len(full)) < 250, full, 0).astype(np.uint32))
    filling = fill(folder, "--teacher-dtype", "float32")
    assert filling.returncode == 0, filling.output[-2000:]
    assert sums(folder).all()


class TestRefused:
    def test_flags(self, distil, teacher, train, cache, fill, tmp_path):
        cases = {
            "--teacher-cache-top-k 16": ["--teacher-cache-top-k 16", "use 8"],
            "--kd-temperature 2": ["--kd-temperature 2.0", "use 1.0"],
            "--teacher-cache-top-k 49": ["--teacher-cache-top-k 49", "from 1 to 48"],
            "--teacher-cache-top-k 0": ["--teacher-cache-top-k 0", "from 1 to 48"],
            "--teacher-ema --teacher-dtype float32 --teacher-user-dir no --teacher-model-overrides {'x':1}": [
                *("--teacher-model-overrides {'x':1}, --teacher-user-dir no, --teacher-ema, --teacher-dtype float32",),
                "there is no teacher to load",
                "--teacher-checkpoint-path",
            ],
        }
        for flags, parts in cases.items():
            assert_refused(train(tmp_path, *cached(cache, *flags.split())), tmp_path, *parts)
        without = distil(tmp_path, "--teacher-cache-top-k", 8)
        assert_refused(without, tmp_path, "--teacher-cache-top-k 8", "--teacher-cache-dir")
        other = ["--criterion", "label_smoothed_cross_entropy", "--task", "translation_with_kd"]
        assert_refused(train(tmp_path, *other, "--teacher-cache-dir", cache), tmp_path, "--teacher-cache-dir", cache)

    def test_no_cache_and_no_teacher(self, train, tmp_path):
        result = train(tmp_path, *cached(tmp_path / "none"))
        assert_refused(result, tmp_path, "--teacher-cache-dir", "there is no cache", "--teacher-checkpoint-path")

    def test_an_incomplete_one_without_a_teacher(self, cache, train, tmp_path):
        shutil.copytree(cache, tmp_path / "cache")
        part = np.load(tmp_path / "cache/sums.npy", mmap_mode="r+")
        part[:7] = 0
        part.flush()
        result = train(tmp_path, *cached(tmp_path / "cache"))
        assert_refused(result, tmp_path, "7 of 300 sentences are not there", "--teacher-checkpoint-path")

    def test_another_teacher(self, student, train, cache, tmp_path):
        result = train(tmp_path, *cached(cache, "--teacher-checkpoint-path", student))
        assert_refused(result, tmp_path, "--teacher-checkpoint-path", student, "other teacher")

    def test_other_data(self, data, cache, tmp_path):
        shutil.copytree(data, tmp_path / "bin")
        for path in list((tmp_path / "bin").glob("valid.*")):
            shutil.copy(path, tmp_path / "bin" / path.name.replace("valid", "train"))
        command = [tmp_path / "bin", *TRAINING, "--arch", "transformer", *SIZES, "--save-dir", tmp_path, *cached(cache)]
        result = run(tmp_path / "log", "fairseq-train", *command)
        assert_refused(result, tmp_path, "--teacher-cache-dir", cache, "other sentences")

    def test_another_dictionary(self, cache, data, tmp_path):
        shutil.copytree(data, tmp_path / "bin")
        for name in ("dict.src.txt", "dict.tgt.txt"):
            lines = (tmp_path / "bin" / name).read_text().splitlines()
            lines[3], lines[4] = lines[4], lines[3]
            (tmp_path / "bin" / name).write_text("\n".join(lines) + "\n")
        command = [tmp_path / "bin", *TRAINING, "--arch", "transformer", *SIZES, "--save-dir", tmp_path, *cached(cache)]
        result = run(tmp_path / "log", "fairseq-train", *command)
        assert_refused(result, tmp_path, "--teacher-cache-dir", cache, "dictionary")

    def test_a_folder_of_something_else(self, distil, tmp_path):
        (tmp_path / "x").mkdir()
        (tmp_path / "x/notes").write_text("not a cache")
        result = distil(tmp_path, "--teacher-cache-dir", tmp_path / "x")
        assert_refused(result, tmp_path, "--teacher-cache-dir", tmp_path / "x", "no teacher cache")
        assert [path.name for path in (tmp_path / "x").iterdir()] == ["notes"]

    def test_the_folder_of_the_run(self, distil, tmp_path):
        result = distil(tmp_path / "run", "--teacher-cache-dir", tmp_path / "run")
        assert_refused(result, tmp_path / "run", f"--teacher-cache-dir {tmp_path}/run: it is a run's --save-dir")

    def test_cut_short(self, cache, train, tmp_path):
        for name in ("words", "probs", "sums"):
            folder = tmp_path / name
            shutil.copytree(cache, folder)
            os.truncate(folder / f"{name}.npy", (folder / f"{name}.npy").stat().st_size - 1)
            result = train(tmp_path, *cached(folder))
            assert_refused(result, tmp_path, "--teacher-cache-dir", folder / f"{name}.npy", "cut short")

    def test_a_damaged_sentence_is_found_and_mended(self, cache, train, fill, tmp_path):
        folder = tmp_path / "cache"
        shutil.copytree(cache, folder)
        probs = np.load(folder / "probs.npy", mmap_mode="r+")
        probs[17, 3] += 2**-20
        probs.flush()
        result = train(tmp_path, *cached(folder))
        assert result.returncode != 0
        assert result.last_line.startswith("kd_ext: error: --teacher-cache-dir"), result.output[-2000:]
        assert "is damaged" in result.last_line
        assert "kd_ext.teacher_cache" in result.last_line
        assert fill(folder).returncode == 0
        assert np.array_equal(np.load(folder / "probs.npy"), np.load(cache / "probs.npy"))

    def test_filling_flags(self, fill, data, tmp_path):
        assert_refused(fill(tmp_path / "x", "--processes", 0), tmp_path, "--processes 0")
        assert_refused(fill(tmp_path / "x", "--kd-temperature", 0), tmp_path, "--kd-temperature 0")
        other_task = run(tmp_path / "log", "kd_ext.teacher_cache", data, *PLUGIN, "--task", "translation")
        assert_refused(other_task, tmp_path, "--task translation", "--task translation_with_kd")
        no_teacher = run(tmp_path / "log", "kd_ext.teacher_cache", data, *PLUGIN, "--teacher-cache-dir", tmp_path / "x")
        assert_refused(no_teacher, tmp_path, "--teacher-checkpoint-path is missing")
        assert not (tmp_path / "x").exists()


MANIFEST = {"top_k": 3, "vocabulary": 11}


def random_sentences(rng, k=3):
    words = np.stack([rng.permutation(11)[:k] for _ in range(LENGTHS.sum())])
    return words, rng.random((LENGTHS.sum(), k)).astype(np.float32)


def test_files_keep_what_was_written(tmp_path):
    """In any order of sentences, in the smallest type that holds the words."""
    rng = np.random.default_rng(0)
    for vocabulary, dtype in ((11, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)):
        folder = str(tmp_path / str(vocabulary))
        manifest = {"top_k": 3, "vocabulary": vocabulary}
        create(folder, manifest, LENGTHS)
        assert read_manifest(folder) == manifest
        files = CacheFiles(folder, manifest, LENGTHS, writable=True)
        words, probs = random_sentences(rng)
        words[0, 0] = vocabulary - 1
        starts = np.cumsum(LENGTHS) - LENGTHS
        for ids in ([2, 0], [3]):
            ids = np.array(ids)
            assert not files.there(ids).any()
            rows = np.concatenate([np.arange(starts[i], starts[i] + LENGTHS[i]) for i in ids])
            files.write(ids, LENGTHS[ids], list(ids + 5), words[rows], probs[rows])
        assert files.there(np.arange(4)).tolist() == [True, False, True, True]
        ids = np.array([0, 3, 2])
        rows = np.concatenate([np.arange(starts[i], starts[i] + LENGTHS[i]) for i in ids])
        again = CacheFiles(folder, manifest, LENGTHS, writable=False).read(ids, LENGTHS[ids], list(ids + 5))
        assert again.sound.all()
        assert np.array_equal(again.words, words[rows])
        assert np.array_equal(again.probs, probs[rows])
        assert again.words.dtype == np.int64
        assert np.load(tmp_path / str(vocabulary) / "words.npy").dtype == dtype
        assert files.read(ids, LENGTHS[ids], [5, 9, 7]).sound.tolist() == [True, False, True]


@pytest.mark.parametrize("damage", [flip, truncate, swap])
@pytest.mark.parametrize("name", ["words.npy", "probs.npy", "sums.npy", "manifest.json"])
def test_damaged_files(tmp_path, damage, name):
    """What is read is what was written, or is told apart from it."""
    rng = random.Random(f"{damage.__name__} {name}")
    folder, ids, texts = tmp_path / "cache", np.arange(4), [1, 2, 3, 4]
    create(str(folder), MANIFEST, LENGTHS)
    words, probs = random_sentences(np.random.default_rng(1))
    CacheFiles(str(folder), MANIFEST, LENGTHS, writable=True).write(ids, LENGTHS, texts, words, probs)
    whole = (folder / name).read_bytes()
    noticed = 0
    for _ in range(100):
        content = bytes(damage(bytearray(whole), rng))
        if content == whole:
            noticed += 1  # nothing to notice
            continue
        (folder / name).write_bytes(content)
        try:
            manifest = read_manifest(str(folder))
            if manifest != MANIFEST:
                noticed += 1
                continue
            read = CacheFiles(str(folder), manifest, LENGTHS, writable=False).read(ids, LENGTHS, texts)
        except ConfigError as error:
            noticed += "\n" not in str(error) and str(folder) in str(error)
            continue
        noticed += not read.sound.all()
        for i, (start, n) in enumerate(zip(np.cumsum(LENGTHS) - LENGTHS, LENGTHS)):
            if read.sound[i]:
                assert np.array_equal(read.words[start : start + n], words[start : start + n])
                assert np.array_equal(read.probs[start : start + n], probs[start : start + n])
    # a flipped bit that numpy does not look at, in the version or the padding of a header, changes nothing
    assert noticed > 80


def test_a_full_disk_is_found_before_anything_is_asked(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"GB cannot be made there.*No space left"):
        create(str(tmp_path / "cache"), MANIFEST, LENGTHS)
    assert list((tmp_path / "cache").iterdir()) == []


def test_one_that_is_there_is_left_alone(tmp_path):
    create(str(tmp_path / "cache"), MANIFEST, LENGTHS)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    create(str(tmp_path / "cache"), {**MANIFEST, "note": "another worker's"}, LENGTHS)
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}


def test_made_in_a_folder_that_is_there(tmp_path):
    """Also behind a link, and where a process was killed while it made one."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "folder/manifest.json.tmp").write_text(json.dumps(MANIFEST))
    (tmp_path / "folder/words.npy").write_bytes(b"half")
    assert read_manifest(str(tmp_path / "link")) == {}
    create(str(tmp_path / "link"), MANIFEST, LENGTHS)
    assert read_manifest(str(tmp_path / "folder")) == MANIFEST
    assert not CacheFiles(str(tmp_path / "folder"), MANIFEST, LENGTHS, writable=False).there(np.arange(4)).any()


@pytest.mark.parametrize("step", range(13))
def test_killed_while_it_is_made(tmp_path, step):
    """At any moment: the next attempt makes it."""
    folder = str(tmp_path / "cache")
    child = os.fork()
    if child == 0:
        calls = iter(range(100))

        def dying(function):
            return lambda *args, **kwargs: os._exit(9) if next(calls) == step else function(*args, **kwargs)

        for name in ("replace", "fsync", "open", "posix_fallocate"):
            setattr(os, name, dying(getattr(os, name)))
        create(folder, MANIFEST, LENGTHS)
        os._exit(0)
    assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 9
    assert read_manifest(folder) == {}
    create(folder, MANIFEST, LENGTHS)
    assert read_manifest(folder) == MANIFEST
    assert sorted(os.listdir(folder)) == ["manifest.json", "probs.npy", "sums.npy", "words.npy"]


@pytest.mark.parametrize("name", ["words.npy", "probs.npy", "sums.npy", "manifest.json.tmp", "notes", ".hidden"])
@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_users_own_files_stay(tmp_path, monkeypatch, name, kind):
    """Also where making a cache would fail, which removes what it has made."""
    folder, own = tmp_path / "folder", tmp_path / "own"
    folder.mkdir()
    own.write_bytes(b"embeddings")
    if kind == "folder":
        (folder / name).mkdir()
    elif kind == "link":
        (folder / name).symlink_to(own)
    else:
        (folder / name).write_bytes(b"embeddings")
    monkeypatch.setattr(os, "posix_fallocate", None)
    is_unfinished = name == "manifest.json.tmp" and kind != "link"  # what an attempt may have left, without a word
    for ask in (lambda: read_manifest(str(folder)), lambda: create(str(folder), MANIFEST, LENGTHS)):
        if is_unfinished:
            continue
        with pytest.raises(
            ConfigError, match=rf"--teacher-cache-dir {folder}: it is no teacher cache, and has .*{name}"
        ):
            ask()
    assert os.listdir(folder) == [name]
    assert own.read_bytes() == b"embeddings"
    if kind == "file":
        assert (folder / name).read_bytes() == b"embeddings"


SYSTEM_ERRORS = {
    errno.ENOMEM: "ulimit -v",
    errno.EMFILE: "ulimit -n",
    errno.EIO: "disk",
    errno.EROFS: "name another folder",
    errno.EACCES: "name another folder",
}


@pytest.mark.parametrize("error", SYSTEM_ERRORS)
@pytest.mark.parametrize("name", ["manifest.json", "words.npy", "probs.npy", "sums.npy"])
def test_what_the_system_says_is_no_damage(tmp_path, monkeypatch, error, name):
    create(str(tmp_path), MANIFEST, LENGTHS)
    opened = open

    def failing(path, *args, **kwargs):
        if str(path).endswith(name):
            raise OSError(error, os.strerror(error))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", failing)
    with pytest.raises(ConfigError) as raised:
        CacheFiles(str(tmp_path), read_manifest(str(tmp_path)), LENGTHS, writable=True)
    message = str(raised.value)
    assert message.startswith(f"--teacher-cache-dir: {tmp_path}")
    assert os.strerror(error) in message
    assert SYSTEM_ERRORS[error] in message
    assert "damaged" not in message
    assert "remove" not in message


@pytest.mark.parametrize("name", ["manifest.json", "words.npy", "probs.npy", "sums.npy"])
def test_a_pipe_in_place_of_a_file(tmp_path, name):
    create(str(tmp_path), MANIFEST, LENGTHS)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"^--teacher-cache-dir: {tmp_path}/{name}: no regular file"):
        CacheFiles(str(tmp_path), read_manifest(str(tmp_path)), LENGTHS, writable=False)


BROKEN = [{"vocabulary": 11}, {"top_k": 3}, {"top_k": "3", "vocabulary": 11}, {"top_k": 3, "vocabulary": "100"}]
BROKEN += [{"top_k": 12, "vocabulary": 11}, {"top_k": 0, "vocabulary": 11}, {"top_k": True, "vocabulary": 11}]
BROKEN += [{"top_k": None, "vocabulary": None}, {"top_k": 3.0, "vocabulary": 11}, [], [1], "x", None, 7, {}]
BROKEN += [{"top_k": [3], "vocabulary": {}}]


@pytest.mark.parametrize("content", [*map(json.dumps, BROKEN), "", "{", "[" * 10**5, "1" * 10**5, '{"top_k": NaN}'])
def test_a_manifest_that_is_none(tmp_path, content):
    create(str(tmp_path), MANIFEST, LENGTHS)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ConfigError) as raised:
        read_manifest(str(tmp_path))
    assert str(raised.value).startswith(f"--teacher-cache-dir: {tmp_path}/manifest.json: ")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def make_one(folder):
    create(folder, {**MANIFEST, "maker": os.getpid()}, LENGTHS)
    return read_manifest(folder)["maker"]


def test_made_once_by_several_processes(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        makers = pool.map(make_one, [str(tmp_path / "cache")] * 6, chunksize=1)
    assert len(set(makers)) == 1


@pytest.mark.parametrize("strategy", ["word_level", "batch_level"])
def test_a_batch_of_another_worker_is_not_asked_about(strategy):
    """A worker without a batch is given one of the validation set, whose sentences are in no cache."""
    stub = Run(strategy, **({"kd_rate": 0.5} if strategy == "batch_level" else {}))
    stub.criterion.teacher.output = stub.criterion.teacher.probs = None  # to be asked is a TypeError
    batch = random_batch(np.random.default_rng(0), ["hi", "ta"])
    loss, logged = stub.forward(batch, is_dummy=True)
    assert loss.isfinite()
    assert logged["kd_selected"] == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_cache_that_cannot_be_written(tmp_path):
    create(str(tmp_path), MANIFEST, LENGTHS)
    (tmp_path / "probs.npy").chmod(0o444)
    with pytest.raises(ConfigError, match="Permission denied"):
        CacheFiles(str(tmp_path), MANIFEST, LENGTHS, writable=True)


def test_batches_made_elsewhere_bring_the_same(train, cache, tmp_path):
    """By two processes that make batches, with a prefix that is not distilled, in bfloat16: bit for bit."""
    flags = ["--max-update", 12, "--ignore-prefix-size", 1, "--bf16"]
    for workers in (0, 2):
        save_dir = tmp_path / str(workers)
        result = train(save_dir, *cached(cache, *flags, "--num-workers", workers, strategy="word_level"))
        assert result.returncode == 0, result.output
    assert_same_run(tmp_path / "0/checkpoint_last.pt", tmp_path / "2/checkpoint_last.pt")
