"""The touches of upstream: at interpreter start, and with the plugin."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Dict, List, Optional
from unittest.mock import MagicMock

import pytest
from commands import ROOT

NEEDS_START_UP = pytest.mark.skipif(sys.version_info < (3, 11), reason="fairseq imports unaided")


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        cwd="/",
    )
    return done.returncode, done.stdout


@NEEDS_START_UP
def test_fairseq_imports_and_only_with_the_start_up_hook():
    assert python("import fairseq, fairseq_cli.train; print('imported')")[1].endswith("imported\n")
    code, output = python("import fairseq", KD_EXT_STARTUP="0")
    assert code != 0
    assert "mutable default" in output


def test_start_up_imports_nothing():
    """What a bare interpreter has is what one with the hook has, but for the hook itself."""
    code = "import sys; print(sorted(sys.modules))"
    with_hook, without = python(code)[1], python(code, KD_EXT_STARTUP="0")[1]
    assert "kd_ext_startup" in with_hook
    assert with_hook == without
    assert "dataclasses" not in with_hook


def test_a_failure_of_the_hook_breaks_no_other_program():
    code = "import kd_ext_startup as s; s._apply = lambda: 1 / 0; import json, {}; print('went on')"
    assert python(code.format("string"))[1] == "went on\n"
    output = python(code.format("hydra"))[1]
    assert "the start-up remedies for fairseq failed: ZeroDivisionError: division by zero" in output


def test_the_hook_takes_itself_out_without_a_trace():
    """The finder after it is asked too, and it may be asked again by who goes through an older list of finders."""
    code = (
        "import sys, kd_ext_startup as s\ns._apply = lambda: None\nasked = []\n"
        "class Next:\n    def find_spec(name, path=None, target=None):\n        asked.append(name)\n"
        "        if name == 'hydra': raise ImportError\n"
        "sys.meta_path[:] = [s._Watcher, Next, *(f for f in sys.meta_path if f is not s._Watcher)]\n"
        "try: import hydra\nexcept ImportError: pass\n"
        "assert 'hydra' in asked and s._Watcher not in sys.meta_path\n"
        "print(s._Watcher.find_spec('hydra'))"
    )
    assert python(code) == (0, "None\n")


def test_finders_that_are_put_in_through_an_older_reference_are_asked():
    """Also in the middle of that import, before the hook and behind it; each that is asked is asked about all."""
    code = (
        "import sys, kd_ext_startup as s\n"
        "held, asked = sys.meta_path, {'first': [], 'last': []}\n"
        "def finder(key):\n"
        "    class Finder:\n"
        "        def find_spec(name, path=None, target=None): asked[key].append(name)\n"
        "    return Finder\n"
        "applied = []\n"
        "def apply():\n"
        "    applied.append(1)\n"
        "    held.insert(0, finder('first'))\n"
        "s._apply = apply\n"
        "try: import hydra\nexcept ValueError: pass\n"  # no remedies: mutable default
        "held.insert(0, finder('last'))\n"
        "try: import not_there\nexcept ImportError: pass\n"
        "assert sys.meta_path is held and s._Watcher not in held and applied == [1]\n"
        "assert 'not_there' in asked['first'] and 'not_there' in asked['last'], asked\n"
    )
    assert python(code) == (0, "")


HYDRAS = {
    "package": "hydra/__init__.py",
    "module": "hydra.py",
}


@pytest.mark.parametrize("kind", HYDRAS)
def test_a_users_own_hydra_gets_no_remedy(tmp_path, kind):
    """Until fairseq is imported: its classes are held to Python's rules then, too."""
    file = tmp_path / HYDRAS[kind]
    file.parent.mkdir(exist_ok=True)
    file.write_text("from dataclasses import dataclass\n@dataclass\nclass Config:\n    x: int = 0\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import kd_ext_startup as s, hydra, json, string\n"
        "assert hydra.Config.__module__ == 'hydra'\n"
        "assert '_kd_ext_early' not in sys.modules and s._Watcher in sys.meta_path\n"
        "import dataclasses, importlib.util\n"
        "assert not hasattr(dataclasses._get_field, '_kd_ext')\n"
        f"spec = importlib.util.spec_from_file_location('early', {str(ROOT / 'kd_ext' / 'upstream' / 'early.py')!r})\n"
        "early = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(early)\nearly.apply()\n"
        "try:\n    dataclasses.make_dataclass('B', [('a', hydra.Config, hydra.Config())])\n"
        "    print('taken')\n"
        "except ValueError: print('refused')\n"
    )
    expected = "refused" if sys.version_info >= (3, 11) else "taken"
    assert python(code) == (0, f"{expected}\n")


@NEEDS_START_UP
def test_other_packages_are_held_to_the_rules():
    """Only defaults whose class is of fairseq or hydra are let through."""
    code = (
        "import fairseq, dataclasses\n"
        "@dataclasses.dataclass\nclass A: pass\n"
        "@dataclasses.dataclass\nclass B:\n    a: A = A()\n"
    )
    status, output = python(code)
    assert status != 0
    assert "mutable default" in output


def test_a_wrong_flag_that_a_worker_meets_is_one_line():
    """fairseq-train starts a process for each GPU where it sees several."""
    code = (
        "import kd_ext, torch\nfrom kd_ext.errors import ConfigError\n"
        "def work(rank):\n    try: raise ConfigError('wrong')\n"
        "    except ConfigError as error: raise ConfigError(f'--flag 1: {error}') from error\n"
        "if __name__ == '__main__':\n"
        "    import torch.multiprocessing as m\n    m.start_processes(work, nprocs=1, start_method='fork')"
    )
    status, output = python(code)
    assert status == 1
    assert output.splitlines()[-1] == "kd_ext: error: --flag 1: wrong"
    assert "Traceback" not in output


def test_user_dir_under_every_spelling():
    code = (
        "import os, fairseq\nfrom argparse import Namespace\nfrom fairseq.utils import import_user_module\n"
        "import kd_ext\nfolder = os.path.dirname(kd_ext.__file__)\n"
        f"for path in (folder, os.path.join({str(ROOT)!r}, 'tests', '..', 'kd_ext')):\n"
        "    import_user_module(Namespace(user_dir=path))\n"
        "print('imported twice')"
    )
    assert python(code)[1].endswith("imported twice\n")


class AnyTrainer:
    """As much of a trainer as fairseq's own load_checkpoint uses."""

    checkpoint_suffix = ""
    lr_step = load_checkpoint = staticmethod(lambda *_, **__: None)

    def get_train_iterator(self, **_):
        return SimpleNamespace(epoch=1)


def test_commands_without_docstrings():
    """As ``python -OO`` runs them."""
    names = "adapters", "doctor", "export", "recipes", "sequence_distillation", "teacher_cache", "teacher_dictionary"
    code = (
        "import runpy, sys\n"
        f"for name in {names}:\n"
        "    sys.argv = ['x', '--help']\n"
        "    try: runpy.run_module(f'kd_ext.{name}', run_name='__main__')\n"
        "    except SystemExit as end: print(end.code, name, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert [line for line in done.stderr.splitlines() if line[:2] == "0 "] == [f"0 {name}" for name in names]


def test_what_was_stopped_is_not_taken_for_what_was_mended_before():
    code = (
        "import kd_ext\ntry:\n    raise kd_ext.errors.ConfigError('x')\nexcept ValueError:\n    raise KeyboardInterrupt"
    )
    status, output = python(code)
    assert status != 0
    assert output.endswith("KeyboardInterrupt\n")
    assert "kd_ext: error" not in output


@pytest.mark.parametrize("make", [MagicMock, AnyTrainer])
def test_any_trainer_will_do_that_does_for_fairseq(make):
    """A mock has every option and every number, and compares with none."""
    from fairseq import checkpoint_utils

    trainer, iterator = make(), SimpleNamespace(epoch=1)
    if make is MagicMock:
        trainer.load_checkpoint.return_value, trainer.checkpoint_suffix = None, ""
        trainer.get_train_iterator.return_value = iterator
    cfg = MagicMock(optimizer_overrides="{}", finetune_from_model=None, save_dir="no/where", restore_file="x.pt")
    extra_state, found = checkpoint_utils.load_checkpoint(cfg, trainer)
    assert extra_state is None
    assert found.epoch == 1
    assert not hasattr(found, "next_epoch_idx")  # training goes on


def test_hooks_are_safe_to_apply_twice():
    from fairseq.trainer import Trainer

    from kd_ext import upstream

    upstream.apply()  # in case that something else, as torch's process groups do, has put its own hook on top
    before = Trainer.load_checkpoint, sys.excepthook
    upstream.apply()
    assert (Trainer.load_checkpoint, sys.excepthook) == before


def test_without_fairseq_the_error_says_what_to_install(tmp_path):
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'fairseq': raise ModuleNotFoundError(\"No module named 'fairseq'\", name='fairseq')\n"
        "sys.meta_path.insert(0, Missing)\n"
        "import kd_ext"
    )
    status, output = python(code, PYTHONPATH=str(ROOT))
    assert status != 0
    assert "pip install fairseq==0.12.2" in output.splitlines()[-1]


def test_optional_types_are_known_for_what_they_are():
    """fairseq alone does not know them on Python 3.14."""
    from fairseq.dataclass.utils import interpret_dc_type

    assert interpret_dc_type(Optional[int]) is int
    assert interpret_dc_type(Optional[List[str]]) == List[str]
    assert interpret_dc_type(Dict[str, int]) == Dict[str, int]
    assert interpret_dc_type(float) is float


LOST = {
    "find_module": (
        (3, 12),
        "import os\nfrom importlib.machinery import FileFinder, SourceFileLoader\n"
        "finder = FileFinder(os.path.dirname(os.__file__), (SourceFileLoader, ['.py']))\n"
        "assert finder.find_module('bisect').get_filename() == os.path.join(finder.path, 'bisect.py')\n"
        "assert finder.find_module('no_such_module') is None",
    ),
    "typing.io": ((3, 13), "import typing\nfrom typing.io import TextIO\nassert TextIO is typing.TextIO"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_newer_pythons_have_lost_is_given_back(name):
    since, code = LOST[name]
    if sys.version_info < since:
        pytest.skip("this Python still has it")
    remedies = (
        "from importlib.util import module_from_spec, spec_from_file_location\n"
        f"spec = spec_from_file_location('early', {str(ROOT / 'kd_ext' / 'upstream' / 'early.py')!r})\n"
        "early = module_from_spec(spec)\nspec.loader.exec_module(early)\nearly.apply()\nearly.apply()\n"
    )
    assert python(code)[0] != 0
    assert python(remedies + code) == (0, "")
