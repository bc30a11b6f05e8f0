"""What is typed after flags that name files, folders or lists: as the command line is read, before anything is done."""

import os
from argparse import Namespace

import pytest

from kd_ext import adapters, export, teacher_dictionary
from kd_ext.errors import ConfigError
from kd_ext.models.extension_flags import read_extensions, set_defaults
from kd_ext.sequences.flags import parse
from kd_ext.tasks.translation_with_kd import TranslationWithKDConfig, TranslationWithKDTask
from kd_ext.teachers.load import import_user_dir


def train(words):
    """As fairseq-train comes to it, which hands no words on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["fairseq-train", "data", *words])
        TranslationWithKDTask.setup_task(TranslationWithKDConfig(data="data"))


def train_adapters(words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["fairseq-train", "data", *words])
        settings = Namespace()
        set_defaults(settings)
        read_extensions(settings)


def translate(words):
    parse(["data", *words], "")


PATH, IDS = "--teacher-checkpoint-path", "--encoder-adapter-ids"
TYPED = {
    (train, f"{PATH} a.pt {PATH}=b.pt"): f"{PATH} a.pt {PATH} b.pt: the last alone would count; joined by ':'",
    (train, f"{PATH} a.pt {PATH} "): f"{PATH} '': empty",
    (train, "--kd-language-tags hi --kd-language-tags ta"): "--kd-language-tags hi --kd-language-tags ta: the last",
    (train, "--teacher-cache-dir "): "--teacher-cache-dir '': empty",
    (train, "--teacher-user-dir="): "--teacher-user-dir '': empty",
    (train, "--teacher-cache-dir=~/cache"): "--teacher-cache-dir ~/cache: a shell ",
    (train_adapters, f"{IDS} hi {IDS} ta"): f"{IDS} hi {IDS} ta: the last alone would count; join them by ','",
    (translate, "--path a.pt --path b.pt"): "--path a.pt --path b.pt: the last alone would count; joined by ':'",
    (translate, "--path  --destdir x"): "--path '': empty",
    (translate, "--path a.pt --rescore="): "--rescore '': empty",
    (translate, "--path a.pt --destdir=~/sd"): "--destdir ~/sd: a shell ",
    (adapters.main, "merge a.pt b.pt --output=~/x.pt"): "--output ~/x.pt: a shell ",
    (adapters.main, "merge a.pt  --output x.pt"): "ADAPTERS '': empty",
    (export.main, "a.pt ~/x --format ctranslate2"): "OUTPUT ~/x: a shell ",
    (export.main, "a.pt x --format fairseq --data "): "--data '': empty",
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


def test_the_last_counts_where_no_other_is_meant(tmp_path, monkeypatch):
    """As argparse has it: a script's own flags, and then a user's."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        adapters.main(["merge", "a.pt", "b.pt", "--output", "x.pt", "--output", "y.pt"])
    assert parse(["data", "--path", "a.pt", "--path", "a.pt", "--destdir", "x", "--destdir", "y"], "").destdir == "y"


def test_an_empty_user_module_of_a_recipe(tmp_path, monkeypatch):
    """The current folder is a module to fairseq."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "__init__.py").write_text("open('ran', 'w')")
    with pytest.raises(ConfigError, match="--teacher-user-dir '': empty"):
        import_user_dir("")
    assert os.listdir() == ["__init__.py"]
