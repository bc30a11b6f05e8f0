"""The parts of benchmarks/quality that train nothing."""

import importlib.util
import json
import logging
import sys
import types
from pathlib import Path

import pytest
import recipes
from catalogues import Pair, write_pairs

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks" / "quality"))

import plots
import studies
import tables
from speeds import measure

HERE = Path(studies.__file__).parent
LANGUAGES = {"de": 400, "hi": 200, "ta": 150}


@pytest.fixture
def corpus(tmp_path):
    """The text of a test set, one sentence in twenty of which is of each rare language."""
    folder = tmp_path / "corpus" / "pieces"
    folder.mkdir(parents=True)
    pairs = [
        Pair(language, f"{language} {i}", f"the {i}th of {count} sentences")
        for language, count in LANGUAGES.items()
        for i in range(count)
    ]
    write_pairs(folder / "test.tsv", pairs)
    return tmp_path / "corpus", pairs


def keep(folder, variant, seed, pairs, wrong=0, language=None, parameters=1000, first=0):
    """A run of which so many sentences are wrong, as the harness keeps it."""
    wrongs = range(first, first + wrong)
    translations = ["nothing of it" if i in wrongs else pair.english for i, pair in enumerate(pairs)]
    name = studies.named(f"{variant} {language or ''}", recipes.MODELS[0], seed).name
    result = {
        "variant": variant,
        "seed": seed,
        "language": language,
        "updates": 10,
        "parameters": parameters,
        **tables.scores.score(translations, pairs),
    }
    (folder / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    (folder / f"{name}.txt").write_text("".join(f"{text}\n" for text in translations), encoding="utf-8")


def study(**changed):
    model = recipes.MODELS[1]
    return studies.Study("Which?", "languages", {"alone": model, "word": model}, ("alone",))._replace(**changed)


def cells(path):
    lines = [line[2:-2].split(" | ") for line in path.read_text().splitlines() if line.startswith("|")]
    return {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


def test_the_table_has_what_there_is(tmp_path, corpus):
    folder, pairs = corpus
    for seed, wrong in ((1, 100), (2, 140)):
        keep(tmp_path, "alone", seed, pairs, wrong)
        keep(tmp_path, "word", seed, pairs, wrong // 10)
    keep(tmp_path, "of another study", 1, pairs)
    tables.write(study(), tmp_path, folder, tmp_path / "table")
    found = cells(tmp_path / "table.md")
    assert list(found) == ["alone", "word"]
    assert found["word"]["seeds"] == "2"
    # whoever has fewer than 300 sentences is counted with the others of few
    assert {"chrF, de (400)", "chrF, hi ta (350)"} < set(found["alone"])
    # wrong are German ones alone
    assert found["alone"]["chrF, hi ta (350)"] == "100.0 (100.0 to 100.0)"
    difference, p = found["word"]["over alone"].split(", p ")
    assert float(difference) > 5
    assert float(p) < 0.01
    assert found["alone"]["over alone"] == ""
    assert (tmp_path / "table.png").stat().st_size > 1000


def test_equals_are_not_told_apart(tmp_path, corpus):
    folder, pairs = corpus
    keep(tmp_path, "alone", 1, pairs, 150, first=100)
    keep(tmp_path, "word", 1, pairs, 150, first=250)
    tables.write(study(), tmp_path, folder, tmp_path / "table")
    difference, p = cells(tmp_path / "table.md")["word"]["over alone"].split(", p ")
    assert abs(float(difference)) < 1
    assert float(p) > 0.05


def test_adapters_count_as_one_model_once_there_are_all(tmp_path, corpus):
    folder, pairs = corpus
    keep(tmp_path, "word", 1, pairs, 30)
    adapted = study(adapted="word", plot="size")
    for language in LANGUAGES:
        assert "word, an adapter for each language" not in _sizes(adapted, tmp_path, folder)
        alone = [pair for pair in pairs if pair.language == language]
        keep(tmp_path, "word, an adapter for each language", 1, alone, language=language, parameters=1010)
    row = _sizes(adapted, tmp_path, folder)["word, an adapter for each language"]
    assert row["parameters"] == "1,030"
    assert row["chrF"] == "100.0"


def test_each_is_compared_with_its_own(tmp_path, corpus):
    folder, pairs = corpus
    for name, wrong in (("alone", 100), ("word", 50), ("narrow, alone", 200), ("narrow, word", 200)):
        keep(tmp_path, name, 1, pairs, wrong)
    model = recipes.MODELS[1]
    variants = dict.fromkeys(("alone", "word", "narrow, alone", "narrow, word"), model)
    without = {"word": "alone", "narrow, word": "narrow, alone"}
    found = _sizes(study(variants=variants, against=(), without=without, plot="size"), tmp_path, folder)
    assert float(found["word"]["gain"].split(", p ")[0]) > 2
    assert float(found["narrow, word"]["gain"].split(", p ")[0]) == 0
    assert found["alone"]["gain"] == found["narrow, alone"]["gain"] == ""


def _sizes(adapted, results, folder):
    tables.write(adapted, results, folder, results / "size")
    return cells(results / "size.md")


def test_the_front_is_what_nothing_smaller_beats():
    points = [(10, 1.0, "a"), (20, 3.0, "b"), (20, 2.0, "c"), (30, 2.5, "d"), (40, 3.0, "e"), (50, 4.0, "f")]
    assert [name for _, _, name in plots.pareto(points)] == ["a", "b", "f"]


@pytest.mark.parametrize("size", studies.SIZES)
@pytest.mark.parametrize("name", studies.STUDIES["cpu"])
def test_every_run_of_a_study_has_a_name_of_its_own(size, name):
    chosen = studies.STUDIES[size][name]
    runs = studies.runs(chosen, studies.SIZES[size], [1, 2, 3])
    runs += studies.longer(chosen, studies.SIZES[size], [1, 2, 3], dict.fromkeys(chosen.variants, 2.0))
    runs += studies.adapters(chosen, size, [1, 2, 3])
    names = [run.model.name for run in runs]
    assert len(set(names)) == len(names)
    assert set(chosen.against) <= set(chosen.variants)
    assert set(chosen.equal_time) <= set(chosen.variants)


def test_a_run_of_two_studies_is_one():
    by_name = {}
    for study in studies.STUDIES["cpu"].values():
        for run in studies.runs(study, studies.SIZES["cpu"], [1]):
            assert by_name.setdefault((study.corpus, run.model.name), run.model) == run.model


def test_equal_time_is_that_of_the_last_baseline():
    chosen = study(equal_time=("alone",), against=("alone", "word"))
    (run,) = studies.longer(chosen, studies.SIZES["cpu"], [1], {"alone": 9.0, "word": 4.5})
    assert run.updates == 2 * studies.SIZES["cpu"].student_updates[chosen.corpus]
    assert run.model.arguments == chosen.variants["alone"].arguments


def test_longer_training_is_told_apart():
    chosen = study(equal_time=("alone",), against=("alone", "word"), times=4)
    size = studies.SIZES["cpu"]
    runs = [*studies.runs(chosen, size, [1]), *studies.longer(chosen, size, [1], {"alone": 9.0, "word": 4.5})]
    usual = size.student_updates[chosen.corpus]
    assert [run.updates for run in runs] == [4 * usual] * 2 + [8 * usual]
    assert [run.variant for run in runs][1:] == ["word, 4 times the updates", "alone, 4 times the updates, equal time"]


def test_a_speed_that_is_measured_later_stands_beside_the_others(tmp_path):
    """The machine is half as fast the second time."""
    log = tmp_path / "speeds.log"
    speeds = {"alone": 8.0, "word": 4.0}

    class Commands:
        def log(self, name):
            return log

        def run(self, name, words, environment):
            ups = speeds[words[0]]
            lines = [{"num_updates": str(n), "ups": str(ups if n > 20 else 1.0)} for n in range(10, 90, 10)]
            log.write_text("".join(f"x | train_inner | {json.dumps(line)}\n" for line in lines))

    def measured(*names):
        runs = [studies.Run(name, recipes.MODELS[1], 100) for name in names]
        return measure(tmp_path / "speeds.json", runs, lambda run, folder: [run.variant], Commands(), {})

    assert measured("alone", "word") == {"alone": 8.0, "word": 4.0}
    speeds = {"alone": 0.0, "cached": 3.5, "word": 2.0}
    assert measured("alone", "cached", "word") == {"alone": 8.0, "word": 4.0, "cached": 7.0}
    speeds = {}
    assert measured("cached", "word")["cached"] == 7.0


def command():
    """The module of the command; the demo has one of its name."""
    spec = importlib.util.spec_from_file_location("quality_run", HERE / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """The names of what is trained, in order, with a folder of results; and what asks for a study."""
    module = command()
    done = []
    monkeypatch.setattr(module.demo, "announce", lambda out, step: done.append(step.name))
    (tmp_path / "pieces").mkdir()
    (tmp_path / "pieces" / "train.src").write_text("one\n")
    results = tmp_path / "results"
    results.mkdir()
    (results / "speeds.json").write_text(json.dumps(dict.fromkeys(studies.STUDIES["cpu"]["pair"].variants, 2.0)))

    class Recorded(module.Studied):
        def _one(self, run):
            done.append(run.model.name)
            self._kept(run.model.name).write_text("{}")

    commands = types.SimpleNamespace(out=tmp_path)
    size = studies.SIZES["cpu"]._replace(at_once=1)

    def train(name, seeds, *only):
        done.clear()
        Recorded(commands, size, results).students(name, "cpu", seeds, only or ("",))
        return list(done)

    return train, results


def test_teachers_come_first_and_what_is_there_is_not_made_again(harness):
    train, results = harness
    found = train("pair", [1])
    assert found[:4] == ["teacher", "teacher-2", recipes.SEQUENCE, "teacher-cache-32"]
    pair = studies.STUDIES["cpu"]["pair"]
    assert len(set(found[4:])) == len(found[4:]) == len(pair.variants) + len(pair.equal_time)
    assert train("pair", [1]) == []
    # on another machine the results are there, and no model
    (results / "word-alpha-0.5-seed1.json").unlink()
    assert train("pair", [1]) == ["teacher", "word-alpha-0.5-seed1"]


def test_some_variants_alone(harness):
    train, _ = harness
    found = train("pair", [2], "sequence, equal", "batch")
    assert found == ["teacher", recipes.SEQUENCE, "batch-rate-0.5-seed2", "sequence-equal-time-seed2"]


def test_adapters_come_after_what_they_are_on_top_of(harness):
    train, results = harness
    base = "2-1-layers-of-96-distilled-seed1"
    models = {run.variant: "" for run in studies.runs(studies.STUDIES["cpu"]["size"], studies.SIZES["cpu"], [1])}
    (results / "decoding.json").write_text(json.dumps(models))
    found = train("size", [1])
    adapters = [name for name in found if "an-adapter" in name]
    assert len(adapters) == 10
    assert found.index(base) < min(map(found.index, adapters))
    (results / f"{adapters[3]}.json").unlink()
    assert train("size", [1]) == [base, adapters[3]]


def test_a_teacher_that_is_tuned_comes_after_what_it_is_tuned_from():
    runs = studies.runs(studies.STUDIES["cpu"]["languages"], studies.SIZES["cpu"], [1])
    found = [model.name for model in studies.teachers(runs, "cpu")]
    assert found[0] == "teacher-longer"
    assert "teacher-hi" in found
    assert recipes.TEACHER not in found


def test_a_study_from_text_to_table(tmp_path, monkeypatch, capsys):
    """All but the text, which is made up, and the sizes of the models."""
    module = command()

    def extract(packages, folder, languages):
        syllables = [f"{first}{second}" for first in "bdgklmnprstw" for second in "aeiou"]
        words = ["".join(syllables[i * step % 60] for step in (1, 7, 11)) for i in range(60)]
        texts = [" ".join(words[i * step % 60] for step in (1, 3, 8)) for i in range(600)]
        write_pairs(folder / "pairs.tsv", [Pair("de", text, f"{text[::-1]} {i}") for i, text in enumerate(texts)])

    monkeypatch.setattr(module.corpora, "extract", extract)
    monkeypatch.setattr(module.corpora, "wheels", lambda folder: module.Step("wheels", {}, lambda folder: None))
    monkeypatch.setattr("pieces.VOCABULARY", 150)
    monkeypatch.setattr("speeds.UPDATES", 30)
    monkeypatch.setattr("speeds.ROUNDS", 1)
    small = studies.SIZES["cpu"]._replace(
        teacher=(16, 1, 1), student=(8, 2, 1), teacher_updates=5, student_updates={"pair": 20, "languages": 20}
    )
    for place, name, value in (
        (module, "SIZES", small),
        (module, "STUDIES", studies._studies(small)),
        (studies, "TEACHERS", studies._teachers(small)),
    ):
        monkeypatch.setattr(place, name, {"cpu": value})
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    for logger in map(logging.getLogger, ("fairseq", "kd_ext")):  # silenced for good, for other tests as well
        monkeypatch.setattr(logger, "setLevel", lambda level: None)
    variants = ["alone, alpha 0, equal time", "word from a cache of 32, equal time"]
    arguments = ["run.py", "pair", "--seeds", "1", "--out", str(tmp_path / "out")]
    out = tmp_path / "out" / "cpu" / "pair"

    def typed(*more):
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        status = module.main()
        assert status == 0, capsys.readouterr().err
        (out / ".lock").unlink(missing_ok=True)  # held until this process ends
        return cells(tmp_path / "results" / "cpu" / "pair.md")

    found = typed("--only", *variants)
    assert list(found) == ["teacher", *variants]
    kept = tmp_path / "results" / "cpu" / "pair"
    speeds = json.loads((kept / "speeds.json").read_text())
    of_word = speeds["word, alpha 0.5"]
    for name in variants:
        run = json.loads((kept / f"{studies.named(name, recipes.MODELS[0], 1).name}.json").read_text())
        updates = 20 * speeds[name[: -len(", equal time")]] / of_word
        assert found[name]["updates"] == str(run["updates"]) == str(max(round(updates / 10), 1) * 10)
    test = module.demo.test_pairs(out, None)
    assert len((kept / "alone-alpha-0-equal-time-seed1.txt").read_text().splitlines()) == len(test) > 10

    # again: nothing is trained, and the table is the same
    (out / "teacher" / recipes.CHECKPOINT).unlink()
    assert typed("--only", *variants) == typed("--report") == found
