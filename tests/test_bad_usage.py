"""Every wrong use ends the command before training, with one line: the flag, its value, what would work."""

import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from commands import PLUGIN, run
from conftest import KD, SIZES, STRATEGIES, TRAINING, load, strategy_flags
from corpus import preprocess
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.models import MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
from fairseq.tasks.translation import TranslationTask
from omegaconf import OmegaConf

from kd_ext.criterions.label_smoothed_cross_entropy_with_kd import LabelSmoothedCrossEntropyWithKD
from kd_ext.errors import ConfigError
from kd_ext.exporting.student import load_student
from kd_ext.files import trained_with
from kd_ext.tasks.checks import check_student
from kd_ext.tasks.translation_with_kd import TranslationWithKDConfig, TranslationWithKDTask
from kd_ext.tasks.word_numbers import check_words
from kd_ext.teachers.load import Source, load_teacher


def assert_refused(result, save_dir, *parts):
    assert result.returncode != 0
    assert result.last_line.startswith("kd_ext: error: "), result.output[-2000:]
    assert "Traceback" not in result.output
    for part in parts:
        assert str(part) in result.last_line, result.last_line
    assert "begin training epoch" not in result.output
    assert not list(save_dir.glob("*.pt"))


FLAGS = {
    "no teacher": ("--kd-strategy word_level", ["--teacher-checkpoint-path is missing", "word_level", "--alpha 0"]),
    "no such file": ("--teacher-checkpoint-path no/x.pt", ["--teacher-checkpoint-path no/x.pt", "no such file"]),
    "an empty path": ("--teacher-checkpoint-path a.pt::b.pt", ["--teacher-checkpoint-path a.pt::b.pt: an empty path"]),
}

GLOBAL = "--kd-strategy global_level --kd-rate 0.5"
LANGUAGES = "--kd-strategy global_language_wise --kd-rate 0.5 --kd-queue-size 9"
WITH_TEACHER = {
    "unknown strategy": ("--kd-strategy sentence_level", ["--kd-strategy sentence_level", *STRATEGIES]),
    "alpha over 1": ("--alpha 1.5", ["--alpha 1.5", "from 0 to 1"]),
    "alpha under 0": ("--alpha=-0.5", ["--alpha -0.5", "from 0 to 1"]),
    "rate missing": ("--kd-strategy batch_level", ["--kd-rate is missing", "batch_level", "(0, 1]"]),
    "rate 0": ("--kd-strategy batch_level --kd-rate 0", ["--kd-rate 0.0", "(0, 1]"]),
    "rate over 1": ("--kd-strategy batch_level --kd-rate 50", ["--kd-rate 50.0", "(0, 1]"]),
    "queue missing": (GLOBAL, ["--kd-queue-size is missing", "global_level"]),
    "queue 0": (f"{GLOBAL} --kd-queue-size 0", ["--kd-queue-size 0", "over 0"]),
    "unknown window": (f"{LANGUAGES} --kd-queue-window one", ["--kd-queue-window one", "each, shared"]),
    "shared window, more than there is memory": (
        f"{LANGUAGES}{'0' * 13} --kd-queue-window shared",
        ["too large: 1 queue of it, 8 bytes a token", "at most"],
    ),
    "temperature 0": ("--kd-temperature 0", ["--kd-temperature 0.0", "from 0.01 to 1000"]),
    "temperature that is finite": ("--kd-temperature 1e200", ["--kd-temperature 1e+200", "from 0.01 to 1000"]),
    "smoothing over 1": ("--label-smoothing 1.5", ["--label-smoothing 1.5", "[0, 1)"]),
    "smoothing under 0": ("--label-smoothing=-0.1", ["--label-smoothing -0.1", "[0, 1)"]),
    "smoothing that is no number": ("--label-smoothing nan", ["--label-smoothing nan", "[0, 1)"]),
    "prefix under 0": ("--ignore-prefix-size=-1", ["--ignore-prefix-size -1", "0 for none"]),
    "no such tag": (
        "--kd-strategy global_language_wise --kd-rate 0.5 --kd-queue-size 9 --kd-language-tag <2",
        ["--kd-language-tag <2", "__src__hi"],
    ),
    "overrides": ("--teacher-model-overrides dropout=0", ["--teacher-model-overrides dropout=0", "dictionary"]),
    "no user module": ("--teacher-user-dir no/where", ["--teacher-user-dir no/where", "no such folder"]),
    "no prefix": (f"{LANGUAGES} --kd-language-tag=", ["--kd-language-tag ''", "empty", "__src__"]),
    "special symbols": (f"{LANGUAGES} --kd-language-tag <", ["--kd-language-tag <", "no word"]),
    "more than there is memory": (
        f"{GLOBAL} --kd-queue-size {10**13}",
        [f"--kd-queue-size {10**13}: too large", "at most"],
    ),
    "more than a number": (f"{LANGUAGES[:-1]}{10**30}", [f"--kd-queue-size {10**30}: too large", "4 queues"]),
    "padding before a target": (
        "--left-pad-target --num-batch-buckets 2",
        ["--left-pad-target --num-batch-buckets 2", "leave one of the two out"],
    ),
    "longer than the teacher's": ("--max-source-positions 2000", ["--max-source-positions 2000", "1024"]),
}


@pytest.mark.parametrize("case", FLAGS)
def test_without_a_teacher(train, tmp_path, case):
    flags, parts = FLAGS[case]
    assert_refused(train(tmp_path, *KD, *flags.split()), tmp_path, *parts)


@pytest.mark.parametrize("case", WITH_TEACHER)
def test_with_a_teacher(train, teacher, tmp_path, case):
    """Defects 7 and 12 among them."""
    flags, parts = WITH_TEACHER[case]
    assert_refused(train(tmp_path, *KD, "--teacher-checkpoint-path", teacher, *flags.split()), tmp_path, *parts)


def test_the_criterion_with_another_task(train, tmp_path):
    result = train(tmp_path, "--criterion", "label_smoothed_cross_entropy_with_kd", "--alpha", "0")
    assert_refused(result, tmp_path, "--criterion label_smoothed_cross_entropy_with_kd", "translation_with_kd")


OTHER_CRITERION = [
    "--teacher-checkpoint-path TEACHER",
    "--kd-strategy global_level, --teacher-user-dir no/where, --teacher-ema, --teacher-dtype bfloat16",
    "--kd-language-tags xx,yy",
]


@pytest.mark.parametrize("typed", OTHER_CRITERION)
def test_flags_of_distilling_with_another_criterion(train, teacher, tmp_path, typed):
    typed = typed.replace("TEACHER", str(teacher))
    flags = ["--task", "translation_with_kd", "--criterion", "label_smoothed_cross_entropy"]
    result = train(tmp_path, *flags, *typed.replace(", ", " ").split())
    expected = f"{typed}: --criterion label_smoothed_cross_entropy distils nothing"
    assert_refused(result, tmp_path, expected, "use --criterion label_smoothed_cross_entropy_with_kd")


def test_another_criterion_where_nothing_is_distilled(data):
    """Its flags left alone, or in the settings of a checkpoint that is validated."""
    other = OmegaConf.create({"_name": "label_smoothed_cross_entropy", "sentence_avg": False})
    for is_training, given in ((True, {}), (False, {"kd_strategy": "global_level", "teacher_checkpoint_path": "x.pt"})):
        task = TranslationWithKDTask.setup_task(TranslationWithKDConfig(data=str(data), **given))
        task._builds_student = is_training
        assert type(task.build_criterion(other)) is LabelSmoothedCrossEntropyCriterion


@pytest.mark.parametrize("is_training", [True, False])
def test_what_has_no_effect_with_alpha_0(data, caplog, is_training):
    given = {"teacher_checkpoint_path": "no/x.pt", "teacher_cache_dir": "no/cache", "teacher_ema": True}
    every = "--teacher-checkpoint-path no/x.pt, --teacher-ema, --teacher-cache-dir no/cache, --kd-temperature 4.0"
    for flags, temperature, said in ((given, 4.0, every), ({}, 1.0, None)):
        caplog.clear()
        task = TranslationWithKDTask.setup_task(TranslationWithKDConfig(data=str(data), **flags))
        task._builds_student = is_training
        LabelSmoothedCrossEntropyWithKD(task, False, 0.1, alpha=0.0, kd_temperature=temperature)
        expected = f"no effect with --alpha 0, by which nothing is distilled: {said}"
        assert [r.getMessage() for r in caplog.records if "no effect" in r.getMessage()] == (
            [expected] if said and is_training else []
        )


# what is given, and parts of the one line
OVERRIDES = {
    "{1: 2}": ["not a dictionary by names"],
    "{[]: 1}": ["not a dictionary by names"],
    "[" * 3000: ["not a dictionary by names"],
    "{'data': 3}": ["cannot be loaded so"],
    "{'data': None}": ["cannot be loaded so"],
    "{'encoder_layers': 2}": ["weights do not fit"],
    "{'encoder_layers': 'two'}": ["not for ", "its setting encoder_layers is 'two', which is no number"],
    "{'activation_fn': 'no such'}": ["cannot be loaded so"],
    "{'model': 3}": ["nothing reads 'model'"],
    "{'task': 3}": ["nothing reads 'task'"],
    "{'optimizer': []}": ["nothing reads 'optimizer'"],
    "{'source_lang': {1, 2}}": ["not for ", "give names and values"],
    "{'task': {'no such': 3}}": ["cannot be loaded so", "no such"],
    "{'arch': 'lstm'}": ["nothing reads 'arch'"],
    "{'encoder_layer': 2}": ["nothing reads 'encoder_layer'", "near to it: encoder_layer"],
    "{'lr': 2}": ["nothing reads 'lr'"],
    "{'zzz': 2}": ["nothing reads 'zzz'", "leave it out"],
}


@pytest.mark.parametrize("text", OVERRIDES)
def test_overrides(train, teacher, tmp_path, text):
    flags = ["--teacher-checkpoint-path", teacher, "--teacher-model-overrides", text]
    assert_refused(train(tmp_path, *KD, *flags), tmp_path, "--teacher-model-overrides", *OVERRIDES[text])


def test_overrides_that_are_read(train, teacher, data, tmp_path):
    overrides = {"data": str(data), "dropout": 0.3, "max_source_positions": 1024, "left_pad_source": True}
    flags = ["--teacher-checkpoint-path", teacher, "--teacher-model-overrides", str(overrides), "--max-update", "1"]
    assert train(tmp_path, *KD, *flags).returncode == 0


REGISTERS = """
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerModel

@register_model({model!r})
class Theirs(TransformerModel):
    pass
"""
USER_DIRS = {
    "registered already": ("theirs/__init__.py", REGISTERS.format(model="transformer"), "theirs", "registered already"),
    "a file": ("theirs.py", "", "theirs.py", "it is a file"),
    "of another's name": ("json/__init__.py", "", "json", "another name"),
    "of a module's name": ("math/__init__.py", "", "math", "another name"),
    "broken": ("theirs/__init__.py", "import no_such_module", "theirs", "no_such_module"),
    "not Python": ("theirs/__init__.py", "this is not\nPython", "theirs", "SyntaxError"),
    "ends": ("theirs/__init__.py", "1 / 0", "theirs", "ZeroDivisionError"),
}


@pytest.mark.parametrize("name", USER_DIRS)
def test_user_modules(train, teacher, tmp_path, name):
    file, content, given, said = USER_DIRS[name]
    (tmp_path / "modules" / file).parent.mkdir(parents=True)
    (tmp_path / "modules" / file).write_text(content)
    given = tmp_path / "modules" / given
    result = train(tmp_path / "run", *KD, "--teacher-checkpoint-path", teacher, "--teacher-user-dir", given)
    assert_refused(result, tmp_path / "run", f"--teacher-user-dir {given}: ", said)


METRIC = "--best-checkpoint-metric"
# what would end the run at its first validation, with nothing saved
VALIDATION = {
    "of training": (f"{METRIC} kd_kl", [f"{METRIC} kd_kl: validation has no such score; one of loss, nll_loss, ppl"]),
    "not translated": (f"{METRIC} bleu", [f"{METRIC} bleu: nothing is translated in validation; add --eval-bleu"]),
    "misspelt": (f"{METRIC} los", [f"{METRIC} los: validation has no such score"]),
    "too long": (
        "--max-source-positions 5 --max-target-positions 6",
        [
            "--valid-subset valid: ",
            "longer than the model's positions (5, 6); add --skip-invalid-size-inputs-valid-test",
        ],
    ),
    "none is left": (
        "--max-source-positions 2 --max-target-positions 2 --skip-invalid-size-inputs-valid-test",
        ["--valid-subset valid: 40 of its 40 sentences", "positions (2, 2); raise --max-source-positions and"],
    ),
    "one set of several": (
        "--valid-subset valid,test --combine-valid-subsets",
        ["--valid-subset valid,test: --combine-valid-subsets makes one set", "there is no test; leave"],
    ),
    "more than a batch": ("--max-tokens-valid 6", ["--max-tokens-valid 6: a sentence of --valid-subset valid has 12"]),
    "more than a batch of training": ("--max-tokens 8", ["--max-tokens-valid 8: ", "12 or more (it is --max-tokens"]),
}


@pytest.mark.parametrize("arch", ["nonautoregressive_transformer", "cmlm_transformer", "fconv_lm"])
def test_students_of_another_kind(teacher, data, tmp_path, arch):
    flags = ["--arch", arch, *KD, "--teacher-checkpoint-path", teacher, "--save-dir", tmp_path / "s"]
    result = run(tmp_path / "log", "fairseq-train", data, *TRAINING, *flags)
    assert_refused(result, tmp_path / "s", f"--arch {arch}: ", "word by word", "such as transformer_ext")


@pytest.mark.parametrize("name", ["lstm", "fconv", "lightconv", "transformer", "transformer_align", "transformer_ext"])
def test_students_of_all_kinds_that_predict_word_by_word(name):
    kind = MODEL_REGISTRY[name]
    check_student(kind.__new__(kind), name)  # as its class says, whatever is in it


@pytest.mark.parametrize(("flags", "parts"), VALIDATION.values(), ids=VALIDATION)
def test_before_the_first_validation(train, tmp_path, flags, parts):
    own = ["--criterion", "label_smoothed_cross_entropy"] if "kd_kl" not in flags else [*KD, "--alpha", "0"]
    assert_refused(train(tmp_path, *own, *flags.split(), "--max-update", "1"), tmp_path, *parts)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--eval-bleu --best-checkpoint-metric bleu", "the best is the highest, and will be taken for the worst; add"),
        (
            "--maximize-best-checkpoint-metric",
            "loss: the best is the lowest, and will be taken for the worst; leave out",
        ),
        ("--eval-bleu --best-checkpoint-metric bleu --maximize-best-checkpoint-metric", None),
        ("--best-checkpoint-metric accuracy --report-accuracy --maximize-best-checkpoint-metric", None),
        ("--best-checkpoint-metric bleu --disable-validation", None),
        ("--max-source-positions 9 --max-target-positions 9 --skip-invalid-size-inputs-valid-test", None),
        ("--max-tokens-valid 12", None),
        ("--valid-subset train,valid --combine-valid-subsets", None),
        ("--max-tokens-valid -1 --batch-size-valid 4", None),
    ],
)
def test_scores_and_lengths_that_do(train, tmp_path, flags, said):
    own = ["--criterion", "label_smoothed_cross_entropy", "--max-update", "1"]
    result = train(tmp_path, *own, *flags.split())
    assert result.returncode == 0, result.output
    assert (said or "") in result.output
    assert ("taken for the worst" in result.output) is bool(said)


@pytest.mark.parametrize(("side", "name"), [("src", "source"), ("tgt", "target")])
def test_parts_of_the_data_with_other_dictionaries(data, tmp_path, side, name):
    """fairseq reads the dictionaries of the first part alone, and all parts by them."""
    shutil.copytree(data, tmp_path / "other")
    dictionary = tmp_path / "other" / f"dict.{side}.txt"
    command = [f"{data}:{tmp_path}/other", *TRAINING, "--arch", "transformer", *SIZES, *KD, "--alpha", "0"]
    command += ["--max-update", "1", "--save-dir", tmp_path / "run"]
    assert run(tmp_path / "log", "fairseq-train", *command).returncode == 0
    shutil.rmtree(tmp_path / "run")
    lines = dictionary.read_text().splitlines()
    dictionary.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    result = run(tmp_path / "log", "fairseq-train", *command)
    assert_refused(result, tmp_path / "run", f"{tmp_path}/other: its {name} dictionary is not that of {data}")


EVAL_BLEU = {  # of which the run would end at its first validation, or take no notice
    ("--eval-bleu-args", "{'beam': 2}"): "not JSON by names; write it as '{\"beam\": 4}'",
    ("--eval-bleu-args", "[1]"): "not JSON",
    ("--eval-bleu-args", "{"): "not JSON",
    ("--eval-bleu-args", '{"beem": 2}'): "no setting of fairseq-generate's; near to it: beam",
    ("--eval-bleu-args", '{"max_len_b": "10"}'): 'of another type; {"max_len_b": 200} is its default',
    ("--eval-bleu-args", '{"lenpen": "1.0"}'): "of another type",
    ("--eval-bleu-args", '{"beam": 4.0}'): "of another type",
    ("--eval-bleu-args", ""): "not JSON",
    ("--eval-bleu-args", '{"sampling": "no"}'): "of another type",
    ("--eval-bleu-detok-args", "x"): "not JSON",
    ("--eval-bleu-detok", "nosuch"): "no tokenizer of fairseq's; one of moses, nltk, space",
    ("--eval-bleu-remove-bpe", "nosuch"): "unknown to fairseq; such as sentencepiece",
}


@pytest.mark.parametrize("task", ["translation", "translation_with_kd"])
@pytest.mark.parametrize("typed", EVAL_BLEU)
def test_settings_of_eval_bleu(data, task, typed):
    flag, text = typed
    cfg = TranslationWithKDConfig(data=str(data), eval_bleu=True, **{flag[2:].replace("-", "_"): text})
    built = TASK_REGISTRY[task].setup_task(cfg)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{flag} {text}: {EVAL_BLEU[typed]}')}"):
        built.build_model(None)  # before there is one
    with pytest.raises(TypeError, match="NoneType"):  # goes on, to what is no model
        built.build_model(None, from_checkpoint=True)
    built.cfg.eval_bleu = False
    with pytest.raises(TypeError, match="NoneType"):
        built.build_model(None)


def test_settings_of_eval_bleu_that_a_users_task_reads(data):
    class Theirs(TranslationTask):
        def build_generator(self, *args, **kwargs):
            return super().build_generator(*args, **kwargs)

    for settings, error in (('{"rerank": 1}', TypeError), ('{"beam": "4"}', ConfigError)):
        task = Theirs.setup_task(TranslationWithKDConfig(data=str(data), eval_bleu=True, eval_bleu_args=settings))
        with pytest.raises(error):
            task.build_model(None)


def test_settings_of_eval_bleu_that_do(train, tmp_path):
    settings = '{"beam": 2, "max_len_a": 1, "max_len_b": 5.0, "lenpen": 1, "sampling": false, "eos_token": null}'
    flags = ["--eval-bleu-args", settings, "--eval-bleu-remove-bpe", "--max-update", "1"]
    result = train(tmp_path, "--criterion", "label_smoothed_cross_entropy", "--eval-bleu", *flags)
    assert result.returncode == 0, result.output


@pytest.mark.parametrize("text", ['{"beam": "4"}', "{'beam': 4}"])
def test_settings_of_eval_bleu_as_typed(train, tmp_path, text):
    flags = [*KD, "--alpha", "0", "--eval-bleu", "--eval-bleu-args", text]
    assert_refused(train(tmp_path, *flags), tmp_path, f"--eval-bleu-args {text}: ")


MODEL_OVERRIDES = {
    "{'encoder_layer': 3}": "reads 'encoder_layer'; near to it: ",
    "{'encoder_layers': '2'}": "its setting encoder_layers is '2', which is no number; give other values",
    "{'encoder_layers': 3}": "no model can be made of its settings, --model-overrides {",
}


@pytest.mark.parametrize("command", ["fairseq-generate", "fairseq-validate", "fairseq-interactive"])
def test_overrides_and_paths_of_what_uses_a_student(teacher, data, tmp_path, command):
    for text in ("{1: 2}", "{[]: 1}", "print(1)"):
        flags = ["--path", teacher, "--model-overrides", text]
        result = run(tmp_path / "log", command, data, *PLUGIN, "--cpu", *flags)
        assert result.returncode != 0
        assert result.last_line.startswith(f"kd_ext: error: --model-overrides {text}: not a dictionary by names")
        assert "Traceback" not in result.output
    for text, said in MODEL_OVERRIDES.items():
        flags = ["--path", teacher, "--max-tokens", 200, "--model-overrides", text]
        result = run(tmp_path / "log", command, data, *PLUGIN, "--cpu", *flags)
        assert result.returncode != 0
        assert f"--model-overrides {text}" in result.last_line
        assert said in result.last_line
        assert "Traceback" not in result.output
    flags = ["--path", tmp_path / "none.pt", "--max-tokens", 200]
    result = run(tmp_path / "log", command, data, *PLUGIN, "--cpu", *flags)
    assert result.last_line.startswith(f"kd_ext: error: {tmp_path}/none.pt: Model file not found")
    assert "Traceback" not in result.output


def test_a_user_module_that_ends_the_process(train, teacher, tmp_path):
    folder = tmp_path / "ends_the_process"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit(3)")
    result = train(tmp_path / "run", *KD, "--teacher-checkpoint-path", teacher, "--teacher-user-dir", folder)
    assert result.returncode == 1
    assert result.last_line.startswith(
        f"kd_ext: error: --teacher-user-dir {folder}: cannot be imported (SystemExit: 3)"
    )


def test_a_folder_in_place_of_a_checkpoint(train, teacher, data, tmp_path):
    result = train(tmp_path, *KD, "--teacher-checkpoint-path", teacher.parent)
    assert_refused(result, tmp_path, f"--teacher-checkpoint-path {teacher.parent}: a folder; name a checkpoint in it")
    result = run(tmp_path / "log", "fairseq-generate", data, *PLUGIN, "--path", teacher.parent, "--cpu")
    assert_refused(result, tmp_path, f"{teacher.parent}: a folder; name a checkpoint")


def truncated(path, teacher):
    path.write_bytes(teacher.read_bytes()[:5000])


def text(path, teacher):
    path.write_text("this is not a checkpoint\n")


def empty(path, teacher):
    path.touch()


def weights_alone(path, teacher):
    torch.save(load(teacher)["model"], path)


def a_list(path, teacher):
    torch.save([1, 2], path)


@pytest.mark.parametrize("make", [truncated, text, empty, weights_alone, a_list])
def test_not_a_checkpoint(train, teacher, tmp_path, make):
    path = tmp_path / "teacher.file"
    make(path, teacher)
    result = train(tmp_path, *KD, "--teacher-checkpoint-path", path)
    assert_refused(result, tmp_path, f"--teacher-checkpoint-path {path}", "not a checkpoint")


def reordered(words):
    words[10], words[11] = words[11], words[10]


def shortened(words):
    words.pop()


@pytest.mark.parametrize(("change", "parts"), [(reordered, ["entry 14", "w"]), (shortened, ["nothing", "sizes"])])
def test_other_dictionaries(train, teacher, data, tmp_path, change, parts):
    """Defect 11. The first difference is named; 4 special symbols come before the file's first word.

    Those beside the checkpoint may be another's: it has no record of its own.
    """
    path = tmp_path / "other" / "teacher.pt"
    path.parent.mkdir()
    state = load(teacher)
    del state["extra_state"][trained_with.KEY]
    torch.save(state, path)
    for language in ("src", "tgt"):
        words = (data / f"dict.{language}.txt").read_text().splitlines()
        change(words)
        (path.parent / f"dict.{language}.txt").write_text("\n".join(words) + "\n")
    result = train(tmp_path / "student", *KD, "--teacher-checkpoint-path", path)
    read = [f"those in {path.parent} were read", "--srcdict", "--teacher-model-overrides \"{'data': 'folder'}\""]
    assert_refused(result, tmp_path / "student", "source dictionary differs", *read, *parts)


def test_another_projects_data_under_the_recorded_name(teacher, data, tmp_path, monkeypatch):
    """The record of a checkpoint says which folder has its own dictionaries, for teachers and for what is exported."""
    state = load(teacher)
    state["cfg"]["task"]["data"] = "d"
    path = tmp_path / "elsewhere" / "teacher.pt"
    path.parent.mkdir()
    torch.save(state, path)
    task = TranslationWithKDTask.setup_task(TranslationWithKDConfig(data=str(data)))
    monkeypatch.chdir(tmp_path)
    os.mkdir("d")
    for name in ("dict.src.txt", "dict.tgt.txt"):
        words = (data / name).read_text().splitlines()
        reordered(words)
        (tmp_path / "d" / name).write_text("\n".join(words) + "\n")
    load_teacher(Source(str(path)), task)
    with pytest.raises(ConfigError, match="in d is not the one that it was trained with"):
        load_student(str(path))
    for name in ("dict.src.txt", "dict.tgt.txt"):
        shutil.copy(data / name, tmp_path)
    state["cfg"]["task"]["data"] = str(tmp_path)
    torch.save(state, "d/student.pt")
    assert load_student("d/student.pt").folder == str(tmp_path)


def test_dictionaries_not_found(train, teacher, data, tmp_path):
    state = load(teacher)
    state["cfg"]["task"]["data"] = "/nowhere/bin"
    path = tmp_path / "moved.file"
    torch.save(state, path)
    flags = [*KD, "--teacher-checkpoint-path", path]
    wrong = train(tmp_path, *flags, "--teacher-model-overrides", "{'data': '/elsewhere'}")
    assert_refused(wrong, tmp_path, path, "dict.src.txt", "/elsewhere", "--teacher-model-overrides")
    assert str(data) not in wrong.last_line
    named = train(tmp_path / "ok", *flags, "--teacher-model-overrides", f"{{'data': '{data}'}}", "--max-update", "1")
    assert named.returncode == 0, named.output


@pytest.mark.parametrize("change", ["none", "another word"])
def test_dictionaries_that_are_the_students_alone(train, teacher, data, tmp_path, change):
    """Of a teacher that was trained with a relative DATA, from another folder; its record says whether they are its."""
    state = load(teacher)
    state["cfg"]["task"]["data"] = "data-bin"
    if change != "none":
        state["extra_state"][trained_with.KEY]["source dictionary"] = "that of other words"
    path = tmp_path / "moved.file"
    torch.save(state, path)
    result = train(tmp_path / "student", *KD, "--teacher-checkpoint-path", path, "--max-update", "1")
    if change != "none":
        said = ["the source dictionary", data, "not the one that it was trained with"]
        assert_refused(result, tmp_path / "student", path, *said)
    else:
        assert result.returncode == 0, result.output
        assert f"those in {data} are taken" in result.output


@pytest.mark.parametrize("side", ["src", "tgt"])
@pytest.mark.parametrize("kind", ["as it is", "truncated", "several"])
def test_data_of_another_dictionary(data, tmp_path, side, kind):
    """Someone copied another dictionary over that of the data: seen where it is loaded to train, with any strategy."""
    shutil.copytree(data, tmp_path / "bin")
    lines = (data / f"dict.{side}.txt").read_text().splitlines()
    (tmp_path / f"bin/dict.{side}.txt").write_text("\n".join(lines[:20]) + "\n")
    flags = {"dataset_impl": "mmap", "required_seq_len_multiple": 1, "train_subset": "train", "upsample_primary": 1}
    if kind == "truncated":
        flags.update(truncate_source=True, max_source_positions=1024)
    if kind == "several":
        for path in list((tmp_path / "bin").glob("train.*")):
            shutil.copy(path, path.with_name(path.name.replace("train.", "train1.")))
    name = {"src": "source", "tgt": "target"}[side]
    said = f"{tmp_path}/bin: the {name} of its train set was binarized with another dictionary (word 47 of 24); prepro"
    task = TranslationWithKDTask.setup_task(TranslationWithKDConfig(data=str(tmp_path / "bin"), **flags))
    task.load_dataset("train", combine=kind == "several")  # to generate, say
    task._builds_student = True
    with pytest.raises(ConfigError, match=re.escape(said)):
        task.load_dataset("train", combine=kind == "several")


def test_tags_of_data_of_another_dictionary(data, tmp_path):
    """Looked for in any command, by a prefix and by a list."""
    shutil.copytree(data, tmp_path / "bin")
    lines = (data / "dict.src.txt").read_text().splitlines()
    tags = [line for line in lines if line.startswith("__src__")]
    (tmp_path / "bin/dict.src.txt").write_text("\n".join([*tags, "x 1"]) + "\n")
    for given in ({}, {"kd_language_tags": tags[0].split()[0]}):
        flags = {"dataset_impl": "mmap", "required_seq_len_multiple": 1, "train_subset": "train", **given}
        task = TranslationWithKDTask.setup_task(TranslationWithKDConfig(data=str(tmp_path / "bin"), **flags))
        with pytest.raises(ConfigError, match="bin: the source of its train set was binarized with another dictionary"):
            _ = task.languages


def test_no_language_tag_in_the_dictionary(tmp_path, teacher):
    """Defect 12: an error before training, not a KeyError in it."""
    data = preprocess(tmp_path / "corpus", tagged=False, train=60)
    flags = [*TRAINING, "--arch", "transformer", *SIZES, *KD, *strategy_flags("global_language_wise")]
    flags += ["--save-dir", tmp_path, "--teacher-checkpoint-path", teacher]
    result = run(tmp_path / "log", "fairseq-train", data, *flags)
    assert_refused(result, tmp_path, "--kd-language-tag __src__", "source dictionary")


class RunsACommand:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_carries_code(train, teacher, data, tmp_path, zipped):
    """Refused as a teacher and to translate with, and the command does not run."""
    witness, path = tmp_path / "witness", tmp_path / "evil.file"
    state = {**load(teacher), "extra_state": RunsACommand(witness)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    result = train(tmp_path, *KD, "--teacher-checkpoint-path", path)
    assert_refused(result, tmp_path, path, "refused", "system")
    result = run(tmp_path / "log", "fairseq-generate", data, *PLUGIN, "--path", path, "--cpu")
    assert result.returncode != 0
    assert "system" in result.output
    assert not witness.exists()
    with pytest.raises(pickle.UnpicklingError):
        load(path)
    torch.load(path, weights_only=False)  # it would have run
    assert witness.exists()


@pytest.mark.parametrize("flags", [["--encoder-layers", "2"], ["--decoder-ffn-embed-dim", "40"]])
def test_weights_of_another_size(train, teacher, tmp_path, flags):
    begin = ["--finetune-from-model", teacher, "--criterion", "label_smoothed_cross_entropy", "--max-update", 1]
    result = train(tmp_path / "s", *begin, *flags)
    parts = teacher, "encoder.layers.1" if "--encoder-layers" in flags else "size mismatch", "give the flags"
    assert_refused(result, tmp_path / "s", *parts)


def test_the_first_word_that_there_is_not():
    check_words(np.array([0, 4]), 5, "a set")
    with pytest.raises(ConfigError, match=r"a set was binarized with another dictionary \(word 5 of 5\)"):
        check_words(np.array([0, 5]), 5, "a set")
