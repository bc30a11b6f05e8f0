"""Teachers by language as typed: training, resuming, the cache, and what cannot be."""

import copy
import re

import numpy as np
import pytest
import torch
from commands import run
from conftest import KD, STRATEGIES, TRAINING, strategy_flags
from fairseq import checkpoint_utils
from test_bad_usage import assert_refused
from test_cli_train import logged
from test_resume import assert_same_run

from kd_ext.criterions.label_smoothed_cross_entropy_with_kd import LabelSmoothedCrossEntropyWithKD
from kd_ext.tasks.translation_with_kd import TranslationWithKDConfig, TranslationWithKDTask
from kd_ext.teachers.assignment import is_by_language, read_assignment

PATH = "--teacher-checkpoint-path"


@pytest.fixture(scope="session")
def other(train, tmp_path_factory):
    """Another teacher, of another size."""
    save_dir = tmp_path_factory.mktemp("other=teacher")
    flags = ["--criterion", "label_smoothed_cross_entropy", "--max-update", 30, "--seed", 7, "--encoder-layers", 2]
    result = train(save_dir, *flags)
    assert result.returncode == 0, result.output
    return save_dir / "checkpoint_last.pt"


def a_criterion(data, path, strategy="word_seq_level", **flags):
    others = {"train_subset": "train", "dataset_impl": "mmap", "required_seq_len_multiple": 1}
    task = TranslationWithKDTask.setup_task(
        TranslationWithKDConfig(data=str(data), kd_strategy=strategy, teacher_checkpoint_path=path, **others)
    )
    task._builds_student = True
    criterion = LabelSmoothedCrossEntropyWithKD(task, False, 0.1, **flags)
    task.load_dataset("train")
    return task, criterion.train()


def model_of(path, task):
    task = copy.copy(task)
    task.trained_with, task.selector = {}, None  # of its state nothing is of interest
    (model,), _ = checkpoint_utils.load_model_ensemble([str(path)], {"dropout": 0.0}, task=task)
    return model


def samples(task, size=40):
    pairs = task.dataset("train")
    for start in range(0, 120, size):
        yield pairs.collater([pairs[i] for i in range(start, start + size)])


FLAGS = {
    "word_seq_level": {},
    "batch_level": {"kd_rate": 0.5},
    "global_language_wise": {"kd_rate": 0.5, "kd_queue_size": 100},
}


@pytest.mark.parametrize("strategy", FLAGS)
@pytest.mark.parametrize("path", ["hi={0},ta={0},bn={0}", "ta={0},...={0}", "hi={0}:{0},...={0}"])
def test_a_student_with_its_teachers_weights(data, teacher, strategy, path):
    task, criterion = a_criterion(data, path.format(teacher), strategy, **FLAGS[strategy])
    student = model_of(teacher, task).train()
    for sample in samples(task):
        _, _, sums = criterion(student, sample)
        assert abs(float(sums["kd_kl"]) / float(sums["kd_selected"])) < 1e-6


def test_each_sentence_has_its_own_teacher(data, teacher, other, student):
    """Sentence by sentence, with upstream's models, in float64."""
    task, criterion = a_criterion(data, f"hi={teacher}:{other},ta={teacher},...={other}")
    model = model_of(student, task).train()
    first, second = (model_of(path, task).double().eval() for path in (teacher, other))
    of_language = {"hi": [first, second], "ta": [first], "bn": [second]}
    reference = model_of(student, task).double().eval()
    for sample in samples(task):
        expected = 0.0
        for i in range(len(sample["id"])):
            source = sample["net_input"]["src_tokens"][i : i + 1]
            source = source[source != 1].unsqueeze(0)
            target = sample["target"][i : i + 1]
            previous = sample["net_input"]["prev_output_tokens"][i : i + 1, : target.ne(1).sum()]
            inputs = {"src_tokens": source, "src_lengths": torch.tensor([source.size(1)])}
            language = task.source_dictionary[int(source[0, 0])][len("__src__") :]
            with torch.no_grad():
                logits = [m(prev_output_tokens=previous, **inputs)[0][0] for m in (*of_language[language], reference)]
            *teachers, own = [x.double() for x in logits]
            q = sum(x.softmax(1) for x in teachers) / len(teachers)
            expected += float((q * (q.log() - own.log_softmax(1))).sum())
        _, _, sums = criterion(model, sample)
        assert float(sums["kd_kl"]) == pytest.approx(expected, rel=1e-5)


def by_language(teacher, other):
    return f"hi={teacher},ta={teacher}:{other},...={other}"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_and_resuming(train, teacher, other, tmp_path, strategy):
    """A run that is stopped and resumed is the same run; the teachers by language are one teacher to it."""
    flags = [*KD, *strategy_flags(strategy), PATH, by_language(teacher, other)]
    whole = train(tmp_path / "whole", *flags, "--max-update", 20)
    assert whole.returncode == 0, whole.output[-2000:]
    assert whole.output.count("loaded teacher") == 4
    assert re.search(r"languages of the training set's 300 sentences, .* hi \(__src__hi\) \d+[,;]", whole.output)
    assert min(logged(whole.output, "kd_kl")) > 0
    for updates in (9, 20):
        result = train(tmp_path / "parts", *flags, "--max-update", updates)
        assert result.returncode == 0, result.output[-2000:]
    assert_same_run(tmp_path / "whole/checkpoint_last.pt", tmp_path / "parts/checkpoint_last.pt")
    flags[-1] = f"hi={other},ta={teacher}:{other},...={other}"
    result = train(tmp_path / "parts", *flags, "--max-update", 30)
    assert result.returncode != 0
    assert result.last_line.startswith(f"kd_ext: error: {PATH} {flags[-1]}: not the teacher that the checkpoint was ")


def test_tags_that_only_teachers_need(train, teacher, other, tmp_path):
    """A list, on a strategy without languages; and the flags are said to be of no use where they are."""
    tags = ["--kd-language-tags", "__src__ta,__src__hi,__src__bn"]
    flags = [*KD, *strategy_flags("word_level"), "--max-update", 2, *tags]
    result = train(tmp_path / "a", *flags, PATH, f"__src__hi={teacher},...={other}")
    assert result.returncode == 0, result.output[-2000:]
    assert "has no effect" not in result.output
    assert re.search(r"by tags of the source: __src__ta \d+, __src__hi \d+, __src__bn \d+; untagged 0", result.output)
    result = train(tmp_path / "b", *flags, PATH, teacher)
    assert result.returncode == 0, result.output[-2000:]
    assert f"{' '.join(tags)} has no effect with --kd-strategy word_level" in result.output
    assert "languages of the training set" not in result.output


def test_listed_tags_in_another_order(train, teacher, other, tmp_path):
    """They are the same teachers, to a run that goes on and to a cache."""
    flags = [*KD, *strategy_flags("word_level"), PATH, f"__src__hi={teacher},...={other}"]
    flags += ["--teacher-cache-top-k", 4, "--teacher-cache-dir", tmp_path / "cache"]
    for tags, updates in (("__src__hi,__src__ta,__src__bn", 3), ("__src__bn,__src__hi,__src__ta", 5)):
        result = train(tmp_path / "run", *flags, "--kd-language-tags", tags, "--max-update", updates)
        assert result.returncode == 0, result.output[-2000:]
    assert "Loaded checkpoint" in result.output


def test_a_file_that_says_so(train, teacher, other, tmp_path):
    file = tmp_path / "teachers.txt"
    file.write_text(f"# my = teachers\n#\n#of today\nhi={teacher}\n\n  # the others\n... = {other}\n")
    flags = [*KD, *strategy_flags("word_level"), "--max-update", 3]
    assert train(tmp_path / "a", *flags, PATH, file, "--num-workers", 2).returncode == 0
    assert train(tmp_path / "b", *flags, PATH, f"hi={teacher},...={other}").returncode == 0
    assert_same_run(tmp_path / "a/checkpoint_last.pt", tmp_path / "b/checkpoint_last.pt")
    # a checkpoint whose name has a '=' is one teacher
    assert "other=teacher" in str(other)
    result = train(tmp_path / "c", *flags, PATH, other)
    assert result.returncode == 0, result.output[-2000:]
    assert "languages of the training set" not in result.output


@pytest.mark.parametrize("processes", [1, 2])
def test_the_cache(data, train, teacher, other, tmp_path, processes):
    """Filled beforehand, one teacher after the other, as filled in training; then nobody needs them."""
    path, folder = by_language(teacher, other), tmp_path / "cache"
    flags = ["--teacher-cache-top-k", 8, "--teacher-cache-dir"]
    filling = run(
        tmp_path / "log",
        *("kd_ext.teacher_cache", data, *TRAINING, *KD, PATH, path, "--processes", processes, *flags, folder),
    )
    assert filling.returncode == 0, filling.output[-2000:]
    assert "300/300" in filling.output
    updates = ["--max-update", 30, "--dropout", "0.1"]
    known = [*KD, *strategy_flags("word_level"), *updates, *flags]
    result = train(tmp_path / "filling", *known, tmp_path / "other", PATH, path)
    assert result.returncode == 0, result.output[-2000:]
    for name in ("words", "probs"):
        ours, theirs = (np.load(where / f"{name}.npy") for where in (folder, tmp_path / "other"))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    result = train(tmp_path / "reading", *known, folder, PATH, path)
    assert result.returncode == 0, result.output[-2000:]
    assert "loaded teacher" not in result.output
    alone = train(tmp_path / "alone", *known, folder)
    assert alone.returncode == 0, alone.output[-2000:]
    assert_same_run(tmp_path / "reading/checkpoint_last.pt", tmp_path / "alone/checkpoint_last.pt")
    changed = [PATH, f"hi={other},...={teacher}"]
    result = train(tmp_path / "wrong", *known, folder, *changed)
    assert_refused(result, tmp_path / "wrong", f"{PATH} {changed[1]}: the cache", "other teacher", f"name {path}"[:60])


BAD = {
    "unknown": ("xx={a},...={b}", ["'xx' is no language of the training set; it has", "hi", "'...' is all"]),
    "none for one": ("hi={a},bn={b}", ["none for ta;", "of the rest, ...=base.pt"]),
    "twice": ("hi={a},hi={b},...={a}", ["'hi' is there twice"]),
    "twice, by another name": ("hi={a},__src__hi={b},...={a}", ["'__src__hi' is there twice"]),
    "twice the rest": ("hi={a},...={b},...={a}", ["'...' is there twice"]),
    "no path": ("hi=,...={b}", ["'hi=' names no checkpoint"]),
    "no such file": ("hi=no/x=1.pt,...={b}", ["no/x=1.pt: no such file"]),
    "no file at all": ("lr=0.1/x.pt", ["lr=0.1/x.pt: no such file, and taken for teachers by language (hi=a.pt"]),
    "no such file in an ensemble": ("hi={a}:no.pt,...={b}", ["no.pt: no such file"]),
    "commas in place of colons": ("hi={a},no.pt,...={b}", ["{a},no.pt: no such file"]),
    "a folder": ("hi={folder},...={b}", ["{folder}: a folder"]),
    "a file with a wrong line": ("{folder}/wrong.txt", ["its line 'ta b.pt' names no checkpoint"]),
    "a file with a line that could be a language": ("{folder}/hash.txt", ["'#ta' is no language of the training set"]),
    "a file of comments alone": ("{folder}/comments.txt", ["comments.txt: damaged, cut short, or not a checkpoint"]),
    "a file that is no assignment": ("{folder}/text.txt", ["text.txt: damaged, cut short, or not a checkpoint"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_usage(train, teacher, other, tmp_path, case):
    path, parts = BAD[case]
    (tmp_path / "wrong.txt").write_text("hi=a.pt\nta b.pt\n")
    (tmp_path / "hash.txt").write_text("hi=a.pt\n#ta=b.pt\n...=c.pt\n")
    (tmp_path / "comments.txt").write_text("# hi=a.pt\n")
    (tmp_path / "text.txt").write_text("no checkpoint\nta=b.pt\n")
    names = {"a": teacher, "b": other, "folder": tmp_path}
    result = train(tmp_path / "run", *KD, PATH, path.format(**names))
    assert_refused(result, tmp_path / "run", PATH, *(part.format(**names) for part in parts))


def test_what_is_taken_for_an_assignment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    for name in ("lr=0.1/model.pt", "a=b.pt", "c.pt"):
        (tmp_path / name).write_bytes(b"PK\3\4\0")
    for path in (
        "lr=0.1/model.pt",
        "a=b.pt",
        "a=b.pt:c.pt",
        "c.pt",
        "none.pt",
        "runs/lr=1/none.pt",
        "lr=0.1",
        "lr=0.1/misspelt.pt",
        "c.pt:lr=0.1/misspelt.pt",
        None,
        "",
    ):
        assert not is_by_language(path), path
    for path in ("hi=c.pt", "...=c.pt", "hi=a=b.pt", "hi=lr=0.1/model.pt", "hi=runs/none.pt,...=c.pt"):
        assert is_by_language(path), path


def test_languages_with_signs_in_their_names():
    names = {"lang=hi": 0, "lang": 1, "hi": 0, "<lang=hi>": 0}
    pools, counts = ["lang=hi", "lang", "untagged"], [3, 3, 0]
    for path in ("lang=hi=x=y.pt,lang=z.pt", "<lang=hi>=x=y.pt,lang=z.pt", "lang=z.pt,hi=x=y.pt"):
        found = read_assignment(path, pools, names, counts)
        assert [found.paths[i] for i in found.of_pools[:2]] == ["x=y.pt", "z.pt"]
    assert read_assignment("lang=a,b.pt,...=c.pt", pools, names, counts).paths == ["a,b.pt", "c.pt"]
    with_untagged = read_assignment("hi=a.pt,...=c.pt", pools, names, [3, 3, 9])
    assert with_untagged.of_pools == [0, 1, 1]
