"""What is typed after flags that name files, folders or lists: as the command line is read, before anything is done."""

import os

import pytest

from kd_ext import adapters, export, teacher_dictionary
from kd_ext.errors import ConfigError
from kd_ext.sequences.flags import parse
from kd_ext.tasks.translation_with_kd import TranslationWithKDConfig, TranslationWithKDTask
from kd_ext.teachers.load import import_user_dir


def translate(words):
    parse(["data", *words], "")


TYPED = {
    (translate, "--path  --destdir x"): "--path is missing",
    (translate, "--path a.pt --destdir=~/sd"): "--destdir ~/sd: a shell ",
    (adapters.main, "merge a.pt b.pt --output=~/x.pt"): "OUTPUT ~/x.pt: a shell ",
    (adapters.main, "merge a.pt  --output x.pt"): "ADAPTERS '': empty",
    (export.main, "a.pt ~/x --format ctranslate2"): "OUTPUT ~/x: a shell ",
    (export.main, "a.pt x --format fairseq --data "): "DATA '': empty",
    (export.main, "--check a.pt "): "CHECK '': empty",
    (teacher_dictionary.main, "a.pt ~"): "DESTDIR ~: a shell ",
}


@pytest.mark.parametrize(("command", "typed"), TYPED)
def test_what_is_typed_is_what_is_meant(command, typed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        command(typed.split(" "))
    assert str(refused.value).startswith(TYPED[command, typed])
    assert os.listdir() == []


REPEATED = {
    "--teacher-checkpoint-path a.pt --teacher-checkpoint-path=b.pt": (
        "--teacher-checkpoint-path a.pt: not used, as the last one counts, b.pt; joined by ':' they are an ensemble"
    ),
    "--kd-language-tags hi --kd-language-tags ta": "--kd-language-tags hi: not used, as the last one counts, ta; ",
    "--teacher-checkpoint-path a.pt --teacher-checkpoint-path a.pt --alpha 0.2 --alpha 0.3": "",
    "--save-dir x --save-dir y": "",
}


@pytest.mark.parametrize("typed", REPEATED)
def test_of_two_values_the_last_counts_as_argparse_has_it(data, monkeypatch, caplog, typed):
    """A script's own flags, and then a user's: no error, and nothing is lost without a word."""
    monkeypatch.setattr("sys.argv", ["fairseq-train", str(data), *typed.split()])
    TranslationWithKDTask.setup_task(TranslationWithKDConfig(data=str(data)))
    said = [record.getMessage() for record in caplog.records if "the last one counts" in record.getMessage()]
    assert len(said) == bool(REPEATED[typed])
    assert all(line.startswith(REPEATED[typed]) for line in said)
    assert parse(["data", "--path", "a.pt", "--path", "b.pt", "--destdir", "x", "--destdir", "y"], "").path == "b.pt"


def test_short_flags_and_words_that_are_none():
    with pytest.raises(ConfigError, match=r"teacher\.pt: no such file"):
        teacher_dictionary.main(["teacher.pt", "out", "-sde", "-ten"])


def test_a_cache_in_a_home_that_no_shell_has_named(data):
    config = TranslationWithKDConfig(data=str(data), teacher_cache_dir="~/cache")
    task = TranslationWithKDTask.setup_task(config)
    with pytest.raises(ConfigError, match=r"^--teacher-cache-dir ~/cache: a shell puts"):
        task.open_cache(1.0)


def test_an_empty_user_module_of_a_recipe(tmp_path, monkeypatch):
    """The current folder is a module to fairseq."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "__init__.py").write_text("open('ran', 'w')")
    with pytest.raises(ConfigError, match="--teacher-user-dir '': empty"):
        import_user_dir("")
    assert os.listdir() == ["__init__.py"]
