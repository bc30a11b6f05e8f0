"""The README and docs/: length, links, and that what they name is there; what is there, they name."""

import argparse
import fnmatch
import functools
import importlib
import re
from unittest import mock

import pytest
from commands import PLUGIN, ROOT, run
from fairseq import options, registry
from fairseq.models import MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
from pages import PAGES, README, assert_translated, blocks, lines_of, paste, path_of_the_readme
from torch.distributed.run import get_args_parser

FLAG = r"(?<![\w-])--[a-z*][\w*-]*"
PARSERS = {
    "fairseq-preprocess": options.get_preprocessing_parser,
    "fairseq-train": options.get_training_parser,
    "fairseq-generate": options.get_generation_parser,
    "fairseq-interactive": lambda: options.get_interactive_generation_parser(),
    "fairseq-validate": options.get_validation_parser,
    "torch.distributed.run": get_args_parser,
}
OWN = [path.stem for path in (ROOT / "kd_ext").glob("*.py") if '__name__ == "__main__"' in path.read_text()]
OTHERS = {"--editable", "--list", "--bare", "--config-dir", "--config-name"}  # of pip, nox, pyenv and Hydra
OTHERS |= {"--model_path", "--data_dir", "--output_dir"}  # of CTranslate2


def text(page) -> str:
    """Without lines about flags that are not there, and without what is said of another project's."""
    lines = page.read_text().splitlines(True)
    if page.stem in ("coming-from-the-fork", "indictrans2"):
        lines = of_this_project(lines)
    return "".join(line for line in lines if "no such flag" not in line)


def of_this_project(lines):
    """Of tables the column "here" alone; of commands those that load the plugin."""
    here = None
    for line in lines:
        cells = line.split(" | ")
        if line.startswith("| ") and (here is None or "| here |" in line):
            here = cells.index("here") if "here" in cells else None
        if not line.startswith("|"):
            here = None
            if not line.startswith("fairseq-train ") or "--user-dir kd_ext" in line:
                yield re.sub(r"^- the (first|second) .*", "", line)
        elif here is not None:
            yield f"{cells[here]}\n" if here < len(cells) else line


def prose(page) -> str:
    """Without what is in fences."""
    return re.sub(r"^```.*?^```$", "", text(page), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """What GitHub names the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


def test_the_readme_leads_to_every_page():
    linked = {(ROOT / path).resolve() for path in re.findall(r"\]\(([^)#]+)", README.read_text())}
    assert linked >= set(PAGES) - {README}


@pytest.mark.parametrize("study", sorted((ROOT / "benchmarks/quality/results/cpu").glob("*.md")), ids=lambda x: x.stem)
def test_the_evidence_is_what_was_measured(study):
    table = "".join(line for line in study.read_text().splitlines(True) if line.startswith("|"))
    assert table in (ROOT / "docs/evidence.md").read_text()
    if study.stem == "pair":
        assert table in README.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_one_title_and_no_heading_twice(page):
    found = anchors(page)
    assert len(re.findall(r"^# ", prose(page), re.MULTILINE)) == 1
    assert len(set(found)) == len(found)


class Met(Exception):
    pass


def parser_of(call) -> argparse.ArgumentParser:
    """The parser by which `call` is about to read a command line."""

    original = argparse.ArgumentParser.parse_known_args

    def stop(parser, *args, **kwargs):
        if "--help" in parser._option_string_actions:
            raise Met(parser)
        return original(parser, *args, **kwargs)  # fairseq's, which looks for --user-dir alone

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop), pytest.raises(Met) as met:
        call()
    return met.value.args[0]


def flags_of(parser: argparse.ArgumentParser) -> set:
    """Of a parser and of those below it."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {flag for below in action.choices.values() for flag in flags_of(below)}
    return {flag for flag in found if flag.startswith("--")}


@functools.lru_cache(maxsize=None)
def known() -> dict:
    """The flags that each command takes, whatever task, model and criterion it is given."""
    registered = [*TASK_REGISTRY.values(), *MODEL_REGISTRY.values()]
    for group in registry.REGISTRIES.values():
        registered += group["registry"].values()
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    for one in registered:
        if hasattr(one, "add_args"):
            one.add_args(parser)
    of_components = flags_of(parser)
    found = {name: flags_of(make()) for name, make in PARSERS.items()}
    for name in found:
        if name.startswith("fairseq-"):
            found[name] |= of_components
    for name in OWN:
        main = importlib.import_module(f"kd_ext.{name}").main
        if main.__code__.co_argcount:
            found[f"kd_ext.{name}"] = flags_of(parser_of(lambda main=main: main([]))) | of_components
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_that_are_named_exist(page):
    scripts = set(re.findall(r"(?:benchmarks(?:/quality)?|tests|examples/demo)/\w+\.py", text(page)))
    of_scripts = {flag for path in scripts for flag in re.findall(FLAG, (ROOT / path).read_text())}
    everything = set().union(OTHERS, of_scripts, *known().values())
    for flag in set(re.findall(FLAG, text(page))):
        assert fnmatch.filter(everything, flag), flag


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_are_of_the_command_that_is_given_them(page):
    for line in (line for block in blocks(text(page)) for line in lines_of(block)):
        before, launched, after = line.rpartition("$(which fairseq-train)")
        parts = [before, f"fairseq-train {after}"] if launched else [line]
        for part in parts:
            for command in (name for name in known() if re.search(rf"(?:^|\s){re.escape(name)}\s", part)):
                assert set(re.findall(FLAG, part)) <= known()[command], part


def own_flags(folder) -> set:
    """Those of this project that the commands' ``--help`` lists, and those of its own commands."""
    found = set()
    for name in ("fairseq-train", "fairseq-generate", "fairseq-interactive", "fairseq-validate"):
        help_ = run(folder / name, name, *PLUGIN, "--help").output
        group = re.search(r"^fairseq-kd-ext:\n(.*?)^\S", help_, re.DOTALL | re.MULTILINE)
        found |= set(re.findall(rf"^  ({FLAG})", group[1], re.MULTILINE))
    for name, flags in known().items():
        if name.startswith("kd_ext."):
            found |= flags - set().union(*(known()[other] for other in PARSERS))
    return found


def test_every_flag_of_this_project_is_described(tmp_path):
    """Each in a table, or in a sentence; that a command uses it is not enough."""
    described = set(re.findall(FLAG, "".join(map(prose, PAGES))))
    own = own_flags(tmp_path)
    assert {"--kd-strategy", "--encoder-recurrent-stacking", "--activate-encoder-adapter", "--processes"} <= own
    assert sorted(own - described) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_are_named_exist(page):
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text(page), re.MULTILINE)) <= set(targets)
    assert set(re.findall(r"python -m kd_ext\.(\w+)", text(page))) <= set(OWN)
    for path in re.findall(r"(?<![\w/])(?:benchmarks|tests|examples|configs|kd_ext|docs)/[\w./-]*\w", text(page)):
        assert (ROOT / path).exists() or path == "benchmarks/results", path


def test_every_command_of_this_project_is_described():
    assert set(re.findall(r"python -m kd_ext\.(\w+)", "".join(map(text, PAGES)))) == set(OWN)


def test_from_an_empty_folder_to_a_translated_sentence(tmp_path):
    """Each block of the README's path as it stands there."""
    (tmp_path / "kd_ext").symlink_to(ROOT / "kd_ext")  # `--user-dir kd_ext`, which an installed package is found by
    result = paste(tmp_path, path_of_the_readme())
    assert result.returncode == 0, result.output
    assert "kd_kl" in result.output
    assert_translated(result.output)
