"""Each recipe in configs/, run by fairseq-hydra-train with overrides on the command line."""

import functools
import os
import subprocess
import sys
from argparse import Namespace

import pytest
from commands import ROOT, run, run_as_typed
from conftest import load
from omegaconf import OmegaConf
from test_cli_inference import hypotheses

from kd_ext.errors import ConfigError
from kd_ext.models.same_function import settings_read
from kd_ext.upstream.misspelt_settings import _check

RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
WIDTHS = {"layers": 2, "embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2}
TINY = [f"model.{side}_{name}={value}" for side in ("encoder", "decoder") for name, value in WIDTHS.items()]
SHORT = ["common.cpu=true", "common.log_interval=1", "dataset.num_workers=0", "dataset.max_tokens=200"]
SHORT += ["optimization.max_update=4", "optimization.lr=[0.01]", "lr_scheduler.warmup_updates=1"]
STACKED = ["model.encoder_recurrent_stacking=2", "model.decoder_recurrent_stacking=2"]
FACTORIZED = ["model.encoder_factorized_embed_dim=4", "model.decoder_factorized_embed_dim=4"]
ADAPTED = ["model.encoder_train_adapter=hi", "model.decoder_train_adapter=ta"]
# what each recipe leaves to the user, and its own sizes made tiny; `teacher`, `base` and `small` are checkpoints
OVERRIDES = {
    "teacher": [],
    "word_level": ["teacher"],
    "batch_level": ["teacher"],
    "global_level": ["teacher", "criterion.kd_queue_size=300"],
    "global_language_wise": ["teacher", "criterion.kd_queue_size=300"],
    "recurrent_stacking": ["teacher", *STACKED],
    "factorized_embedding": ["teacher", *FACTORIZED],
    "adapters": ["base", *ADAPTED],
    "all_together": ["teacher", "small", "criterion.kd_queue_size=300", *STACKED, *FACTORIZED, *ADAPTED],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hydra")


@pytest.fixture(scope="module")
def arguments(data, folder):
    """The command line of a recipe, for a folder to save in and overrides."""

    def arguments(recipe, save_dir, *overrides):
        common = [f"common.user_dir={ROOT / 'kd_ext'}", f"task.data={data}", f"checkpoint.save_dir={save_dir}"]
        return ["--config-dir", ROOT / "configs", "--config-name", recipe, *common, *SHORT, *TINY, *overrides]

    return arguments


@pytest.fixture(scope="module")
def hydra_train(arguments, folder):
    """Runs a recipe, forked and once; returns its last checkpoint and its output."""

    @functools.lru_cache(maxsize=None)
    def hydra_train(recipe, *overrides, name=None):
        save_dir = folder / (name or recipe)
        result = run(folder / f"{save_dir.name}.log", "fairseq-hydra-train", *arguments(recipe, save_dir, *overrides))
        assert result.returncode == 0, result.output
        return save_dir / "checkpoint_last.pt", result.output

    return hydra_train


@pytest.fixture(scope="module")
def trained_teacher(hydra_train):
    return hydra_train("teacher")[0]


@pytest.fixture(scope="module")
def small(hydra_train, trained_teacher):
    """A student that is stacked and factorized, without adapters."""
    adding = [f"+{override}" for override in FACTORIZED]
    teacher = f"task.teacher_checkpoint_path={trained_teacher}"
    return hydra_train("recurrent_stacking", teacher, *STACKED, *adding, name="small")[0]


@pytest.fixture(scope="module")
def of_checkpoints(trained_teacher, small):
    return {
        "teacher": f"task.teacher_checkpoint_path={trained_teacher}",
        "base": f"checkpoint.finetune_from_model={trained_teacher}",
        "small": f"checkpoint.finetune_from_model={small}",
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(hydra_train, of_checkpoints, recipe):
    overrides = [of_checkpoints.get(override, override) for override in OVERRIDES[recipe]]
    checkpoint, output = hydra_train(recipe, *overrides)
    state = load(checkpoint)
    assert state["optimizer_history"][-1]["num_updates"] == 4
    assert ("kd_loss" in output) == ("teacher" in OVERRIDES[recipe])
    names = list(state["model"])
    assert any(".adapters.hi." in name for name in names) == ("model.encoder_train_adapter=hi" in overrides)
    assert any(".layers.1.self_attn" in name for name in names) != (STACKED[0] in overrides)
    assert ("encoder.embed_tokens.up.weight" in names) == (FACTORIZED[0] in overrides)


def test_a_student_of_hydra_translates(hydra_train, of_checkpoints, data, tmp_path):
    overrides = [of_checkpoints.get(override, override) for override in OVERRIDES["all_together"]]
    checkpoint, _ = hydra_train("all_together", *overrides)
    flags = [data, "--user-dir", ROOT / "kd_ext", "--path", checkpoint, "--cpu", "--beam", 2, "--max-len-b", 9]
    result = run(tmp_path / "log", "fairseq-generate", *flags, "--activate-decoder-adapter", "hi")
    assert result.returncode == 0, result.output
    assert len(hypotheses(result.output)) == 20


def test_where_the_recipes_are(tmp_path):
    """As docs/hydra.md has it, in any folder. In a checkout; tests/check_installed.py looks into a package."""
    done = subprocess.run(
        [sys.executable, "-m", "kd_ext.recipes"],
        cwd=str(tmp_path),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout == f"{ROOT / 'configs'}\n"


def test_sanity_validation(hydra_train):
    _, output = hydra_train("teacher", "+run_sanity_validation_steps=true", name="sanity")
    assert output.index("| sanity_valid |") < output.index("train_inner")


def test_a_misspelt_setting_is_shown(arguments, tmp_path):
    """It is met before the plugin is loaded; hydra-core 1.0 would not show it on Python >= 3.10."""
    result = run_as_typed("fairseq-hydra-train", *arguments("teacher", tmp_path, "+criterion.label_smooting=0.2"))
    assert result.returncode != 0
    assert "label_smooting" in result.output
    assert "etype" not in result.output


@pytest.mark.parametrize(
    ("folder", "name", "said"),
    [
        (
            "configs",
            "word_levl",
            "--config-name word_levl: no recipe in --config-dir configs; there are adapters, all_",
        ),
        ("tests", "teacher", "--config-name teacher: no recipe in --config-dir tests; it has no recipe"),
        ("cnfigs", "teacher", "--config-dir cnfigs: No such file or directory; name a folder of recipes"),
    ],
)
@pytest.mark.parametrize("form", [["--config-dir", "{}", "--config-name", "{}"], ["--config-dir={}", "-cn={}"]])
def test_a_recipe_that_is_not_there(folder, name, said, form, monkeypatch):
    """fairseq would go by its own defaults."""
    monkeypatch.chdir(ROOT)
    values = iter([folder, name])
    words = [word.format(next(values)) if "{}" in word else word for word in form]
    result = run_as_typed("fairseq-hydra-train", *words, "task.data=data", "+model=transformer")
    assert result.returncode == 2
    assert result.last_line.startswith(f"kd_ext: error: {said}")
    assert "Traceback" not in result.output


def test_fairseqs_own_recipe(tmp_path):
    """A file without the ending is none."""
    (tmp_path / "teacher").touch()
    for name in ("config", "config.yaml"):
        result = run_as_typed("fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", name, "--cfg", "job")
        assert result.returncode == 0, result.output
    result = run_as_typed("fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "teacher", "--cfg", "job")
    assert result.last_line.startswith("kd_ext: error: --config-name teacher: no recipe in ")


MISSPELT = {
    "+model.dropuot=0.5": "model.dropuot: no setting of transformer_ext; near to it: dropout",
    "+model.zzz=null": "model.zzz: no setting of transformer_ext; leave it out",
}


@pytest.mark.parametrize("override", MISSPELT)
def test_a_misspelt_setting_of_a_model_is_one_line(arguments, tmp_path, override):
    """No dataclass says which there are."""
    result = run(tmp_path / "log", "fairseq-hydra-train", *arguments("teacher", tmp_path, override))
    assert result.returncode != 0
    assert result.last_line.startswith(f"kd_ext: error: {MISSPELT[override]}")
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("name", ["transformer_ext", "transformer_adapter_tiny"])
def test_what_a_trainer_takes_for_a_setting_of_a_model(name):
    def check(**settings):
        cfg = OmegaConf.create({"_name": name, **settings})
        _check(cfg)  # as in a recipe
        _check(None)

    check()
    check(arch=name, **dict.fromkeys(settings_read(Namespace(_name=name))))
    for key, close in (("encoder_train_adaptor", "encoder_train_adapter"), ("encoder_layer", "encoder_layers")):
        with pytest.raises(ConfigError, match=f"model.{key}: no setting of {name}; near to it: .*{close}"):
            check(**{key: "hi"})
    _check(OmegaConf.create({"_name": "transformer", "zzz": 1}))  # is not ours
    _check(Namespace(_name=name, zzz=1))  # of a command line, which has said so


def test_a_wrong_setting_is_an_error_of_one_line(arguments, tmp_path):
    wrong = ["criterion.kd_rate=50", "task.teacher_checkpoint_path=nowhere.pt"]
    result = run_as_typed("fairseq-hydra-train", *arguments("batch_level", tmp_path, *wrong))
    assert result.returncode != 0
    assert result.last_line == "kd_ext: error: --kd-rate 50.0: out of range; a number in (0, 1]"
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "kd_ext: error: Missing mandatory value: task.teacher_checkpoint_path; the recipe leaves it open (???)"),
        # what hydra-core 1.0 would not show on Python >= 3.10
        (
            ["criterion.kd_rate=half", "task.teacher_checkpoint_path=t.pt"],
            "kd_ext: error: kd_rate: Value 'half' could not be converted to Float; mend it in the recipe or on the",
        ),
        (
            ["task.teacher_checkpoint_path=t.pt", "+model.encoder_recurrent_stacking=2.0"],
            "kd_ext: error: --encoder-recurrent-stacking 2.0: is a float; give a whole number, without quotes",
        ),
    ],
)
def test_other_errors_are_shown(arguments, tmp_path, overrides, expected):
    result = run(tmp_path / "log", "fairseq-hydra-train", *arguments("batch_level", tmp_path, *overrides))
    assert result.returncode != 0
    assert result.last_line.startswith(expected)
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("override", "where", "said"),
    [
        (
            "task.teacher_checkpoint_path=lr=0.1/t.pt",
            "task.teacher_checkpoint_path=lr=0.1/t.pt: ",
            "mismatched input '=' expecting <EOF>",
        ),
        ("criterion.kd_rat=1", "", "Could not override 'criterion.kd_rat'."),
    ],
)
def test_what_hydra_has_against_the_command_line(arguments, tmp_path, override, where, said):
    """Before it loads the plugin; up to Python 3.9 it says so itself, without a traceback."""
    # which is set where a test before this one has loaded the plugin
    result = run_as_typed("fairseq-hydra-train", *arguments("batch_level", tmp_path, override), HYDRA_FULL_ERROR="")
    assert result.returncode != 0
    assert "Traceback" not in result.output
    assert said in result.output
    if sys.version_info >= (3, 10):
        assert result.last_line.startswith(f"kd_ext: error: {where}{said}")
