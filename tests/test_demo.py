"""The parts of examples/demo that are not a command of fairseq."""

import json
import os
import random
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import fetch
import figure
import polib
import pytest
import recipes
import run
import scores
from catalogues import Pair, extract, read_pairs, write_pairs
from cleaning import clean, is_useful
from running import Commands, _lock
from splitting import SPLITS, split
from steps import DemoError, Step, run_step

PO = """
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\\n"

msgid "Save  the\\nfile"
msgstr "फ़ाइल सहेजें"

#, fuzzy
msgid "A guess"
msgstr "एक अनुमान"

msgid "Not translated"
msgstr ""

msgid "%(count)s file"
msgid_plural "%(count)s files"
msgstr[0] "%(count)s फ़ाइल"
msgstr[1] "%(count)s फ़ाइलें"

#~ msgid "Gone"
#~ msgstr "गया"
"""


@pytest.mark.parametrize(
    ("foreign", "english", "useful"),
    [
        ("Datei speichern", "Save the file", True),
        ("{name} speichern", "Save {name}", True),
        ("kleiner als < 5", "less than < 5", True),
        ("", "Save", False),
        ("Name", "name", False),
        ("{name}: %(count)s", "{name} %(count)s", False),
        ("<b>Datei</b>", "<b>File</b>", False),
        ("Datei&nbsp;speichern", "Save the file", False),
        ("Datei " * 50, "Save the file", False),
    ],
)
def test_cleaning(foreign, english, useful):
    assert is_useful(clean(foreign), clean(english)) is useful


def test_extraction_reads_catalogues_and_translations(tmp_path):
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    out.mkdir()
    english = {"title": "Weather", "step": {"user": "Your name", "same": "OK"}}
    german = {"title": "Wetter", "step": {"user": "Dein Name", "same": "OK", "new": "Neu"}}
    with zipfile.ZipFile(wheels / "some-1-py3-none-any.whl", "w") as archive:
        archive.writestr("some/locale/hi/LC_MESSAGES/django.po", PO)
        archive.writestr("some/locale/xx/LC_MESSAGES/django.po", PO)
        archive.writestr("some/translations/en.json", json.dumps(english))
        archive.writestr("some/translations/de.json", json.dumps(german))
        archive.writestr("other/translations/de.json", json.dumps(german))
        archive.writestr("some/__init__.py", "raise SystemExit('run')")
    extract(wheels, out)
    assert list(read_pairs(out / "pairs.tsv")) == [
        Pair("de", "Dein Name", "Your name"),
        Pair("de", "Wetter", "Weather"),
        Pair("hi", "%(count)s फ़ाइलें", "%(count)s files"),
        Pair("hi", "फ़ाइल सहेजें", "Save the file"),
    ]


def test_catalogues_that_other_packages_have(tmp_path):
    """Compiled ones, English in a comment, English in a file beside, a hash in a file's name."""
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    out.mkdir()
    compiled = polib.MOFile(encoding="utf-8")
    compiled.append(polib.MOEntry(msgid="Save the file", msgstr="Datei speichern"))
    named = """#. Default: "Send it"
msgid "button_send"
msgstr "Senden"

msgid "label_only"
msgstr "Nur ein Name"
"""
    a, b = "a" * 32, "b" * 32
    files = {
        "some/locale/de/LC_MESSAGES/both.po": named,
        "some/locale/de/LC_MESSAGES/both.mo": b"not read where there is a source",
        "some/locales/de_DE/LC_MESSAGES/compiled.mo": compiled.to_binary(),
        "some/locale/de_AT/LC_MESSAGES/another.po": named.replace("Senden", "Abschicken"),
        "some/locale/de/LC_MESSAGES/app.json": json.dumps({"x.title": "Wetter"}),
        "some/locale/en/LC_MESSAGES/app.json": json.dumps({"x.title": "Weather"}),
        f"some/static/translations/part/de-{a}.json": json.dumps({"title": "Regen"}),
        f"some/static/translations/part/en-{b}.json": json.dumps({"title": "Rain"}),
        f"some/static/translations/part/en-GB-{a}.json": json.dumps({"title": "Drizzle"}),
    }
    with zipfile.ZipFile(wheels / "some-1-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    extract(wheels, out, ["de"])
    assert [(pair.foreign, pair.english) for pair in read_pairs(out / "pairs.tsv")] == [
        ("Datei speichern", "Save the file"),
        ("Regen", "Rain"),
        ("Senden", "Send it"),
        ("Wetter", "Weather"),
    ]


def test_a_split_has_its_limits(tmp_path):
    pairs = [Pair(language, f"{language} {i}", f"en {i}") for language in ("de", "hi") for i in range(2000)]
    pairs += [Pair("ta", f"ta {i}", f"en {i}") for i in range(20)]
    write_pairs(tmp_path / "pairs.tsv", pairs)
    split(tmp_path / "pairs.tsv", tmp_path, {"test": 10, "valid": 1}, {"train": 700, "test": 50})
    found = {name: list(read_pairs(tmp_path / f"{name}.tsv")) for name in SPLITS}
    counts = {name: Counter(pair.language for pair in part) for name, part in found.items()}
    assert counts["train"]["de"] == counts["train"]["hi"] == 700
    assert counts["test"]["hi"] == 50
    assert 10 < counts["train"]["ta"] <= 20
    assert counts["valid"]["de"] > 5
    assert not {pair.english for pair in found["train"]} & {pair.english for pair in found["test"]}
    # chosen from all of the text, not from its head
    assert max(int(pair.english[3:]) for pair in found["train"]) > 1900


def test_no_english_string_is_in_two_splits(tmp_path):
    rng = random.Random(1)
    pairs = [
        Pair(language, f"{language} {i}", rng.choice(["Word {}", "word {}"]).format(i))
        for i in range(500)
        for language in ("de", "hi", "ta")
    ]
    rng.shuffle(pairs)
    write_pairs(tmp_path / "pairs.tsv", pairs)
    split(tmp_path / "pairs.tsv", tmp_path)
    parts = {name: list(read_pairs(tmp_path / f"{name}.tsv")) for name in SPLITS}
    english = {name: {pair.english.casefold() for pair in part} for name, part in parts.items()}
    assert sorted(pair for part in parts.values() for pair in part) == sorted(pairs)
    assert all(english.values())
    assert not english["train"] & english["test"]
    assert not english["train"] & english["valid"]
    assert not english["valid"] & english["test"]


def make_step(name, done, setting=1, fail=False, **options):
    """A step that counts its runs in `done` and may be interrupted half-way."""

    def work(folder):
        done.append(name)
        (folder / "half").write_text((folder / "half").read_text() + "+" if (folder / "half").exists() else "")
        if fail:
            raise KeyboardInterrupt
        (folder / "whole").write_text(str(setting))

    return Step(name, {"setting": setting}, work, **options)


def test_a_step_is_done_once_and_again_after_a_change_before_it(tmp_path):
    done = []
    for setting in (1, 1, 2):
        run_step(tmp_path, make_step("first", done, setting))
        run_step(tmp_path, make_step("beside", done))
        run_step(tmp_path, make_step("second", done, after=("first",)))
        run_step(tmp_path, make_step("third", done, after=("second",)))
    assert done == ["first", "beside", "second", "third", "first", "second", "third"]
    assert (tmp_path / "first" / "whole").read_text() == "2"


@pytest.mark.parametrize(("resumes", "setting", "half"), [(True, 1, "+"), (True, 2, ""), (False, 1, "")])
def test_an_interrupted_step_is_not_done(tmp_path, resumes, setting, half):
    done = []
    with pytest.raises(KeyboardInterrupt):
        run_step(tmp_path, make_step("step", done, fail=True, resumes=resumes))
    assert not (tmp_path / "step").exists()
    assert run_step(tmp_path, make_step("step", done, setting, resumes=resumes))
    assert (tmp_path / "step" / "half").read_text() == half
    assert not (tmp_path / "step.partial").exists()


def test_a_failed_command_shows_its_last_lines_and_its_log(tmp_path):
    commands = Commands(tmp_path)
    program = "import sys; print(*range(100), sep='\\n'); sys.exit(3)"
    with pytest.raises(DemoError) as raised:
        commands.run("step", ["python", "-c", program])
    message = str(raised.value)
    assert message.startswith("85\n")
    assert message.endswith(f"99\nstep: python failed (3), see {commands.log('step')}")
    assert "\n0\n1\n" in commands.log("step").read_text()


def test_two_runs_do_not_share_a_folder(tmp_path):
    Commands(tmp_path)
    with pytest.raises(DemoError, match="another run is at work"):
        _lock(tmp_path / ".lock", patience=0)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is of Linux")
def test_a_killed_run_leaves_no_command_behind(tmp_path):
    command = ["python", "-c", "import time; print('running'); time.sleep(60)"]
    program = f"""
from pathlib import Path
from running import Commands
Commands(Path({str(tmp_path)!r})).run("step", {command!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(run.__file__).parent)}
    driver = subprocess.Popen([sys.executable, "-c", program], env=environment)
    log = tmp_path / "logs" / "step.log"
    while not (log.exists() and log.read_text().endswith("running\n")):
        assert driver.poll() is None
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    Commands(tmp_path)  # the lock is free: neither holds it any longer


def only_index(monkeypatch, **settings):
    """Let pip know nothing but `settings`."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


def test_without_a_network_there_is_one_line(tmp_path, monkeypatch, capsys):
    # nothing listens on port 9
    only_index(monkeypatch, PIP_INDEX_URL="http://127.0.0.1:9")
    assert run.main(["--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fetch: the package registry cannot be reached; is there a network?")
    assert not (tmp_path / "wheels").exists()


def test_another_failure_of_pip_is_told_in_one_line(tmp_path, monkeypatch):
    only_index(monkeypatch, PIP_NO_INDEX="1")
    with pytest.raises(DemoError, match=r"^fetch: pip could not download wheels.txt: ERROR: .*\)$"):
        fetch.fetch(tmp_path, tmp_path / "log")


def test_updates_are_read_off_the_log():
    assert recipes.update_of('2026-01-01 | INFO | train_inner | {"epoch": 1, "num_updates": "130"}\n') == 130
    assert recipes.update_of('2026-01-01 | INFO | train | {"epoch": 1, "train_num_updates": "130"}\n') == -1


def test_translations_are_scored_by_language():
    output = "S-1\t__src__hi __tgt__en b\nD-1\t-0.1\tthe second one here\nD-0\t-0.1\tthe first one here\n"
    pairs = [Pair("de", "a", "the first one here"), Pair("hi", "b", "a wholly other text")]
    result = scores.score(scores.hypotheses(output), pairs)
    assert result["scores"]["de"]["bleu"] == pytest.approx(100)
    assert result["scores"]["hi"]["bleu"] < 20
    assert result["scores"]["all"]["sentences"] == 2
    assert "tok:13a" in result["signatures"]["BLEU"]
    common = {"parameters": 1234, "bytes": 2_000_000}
    faster = {"x": {**common, "speeds": {"1": 30.0, "32": 90.0}, **result}}
    table = scores.render({"m": {**common, "speeds": {"1": 10.0, "32": 60.0}, **result}, **faster})
    assert "| m     | 1,234      | 2.0 |" in table
    assert "30 (3.0x)" in table
    assert "90 (1.5x)" in table


def test_a_model_of_one_language_has_its_scores_alone(tmp_path):
    pairs = [Pair("de", "a", "the first one here"), Pair("hi", "b", "a wholly other text")]
    texts = ["the first one here", "a wholly other text"]
    common = {"parameters": 1000, "bytes": 1_000_000, "speeds": {}}
    results = {"all": {**common, **scores.score(texts, pairs)}, "de": {**common, **scores.score(texts[:1], pairs[:1])}}
    assert results["de"]["scores"].keys() == {"de"}
    assert scores.render(results).splitlines()[3].replace(" ", "") == "|de|1,000|1.0|||||100.0/100.0||"
    figure.draw(results, tmp_path / "figure.png", "de")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "figure.tmp").exists()


def test_an_adapter_is_trained_on_its_language_and_its_base():
    (adapter,) = (model for model in recipes.MODELS if model.language)
    command = recipes.train(adapter, 5, adapter.name)
    assert command[1] == adapter.data == f"data-{recipes.ADAPTED}"
    assert f"{adapter.reads[0]}/{recipes.CHECKPOINT}" in command
    assert f"pieces/{recipes.ADAPTED}.train" in recipes.preprocess(recipes.ADAPTED, adapter.data)
    assert [a for a, b in zip(command, command[1:]) if b == "1e-3"] == ["--lr"]
    assert command.index("1e-3") > command.index("3e-3")  # the later one counts


def test_who_learns_from_the_teachers_translations():
    for model in recipes.MODELS:
        command = recipes.train(model, 5, model.name)
        assert command[1] == ("data-sequence/data" if model.sequence else model.data)
        assert model.after[0] == ("data-sequence" if model.sequence else model.data)
    assert any(model.sequence and not model.reads for model in recipes.MODELS)
    assert any(model.sequence and model.reads for model in recipes.MODELS)


def test_sentences_are_read_off_a_progress_bar():
    assert recipes.sentence_of("data.part:  17%|##   | 137/807 [00:03<00:16, 39.93sentence/s]") == 137
    assert recipes.sentence_of("2026-01-01 | INFO | fairseq | loaded 807 examples") == -1
