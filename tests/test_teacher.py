"""Any teacher: what is loaded, what it computes, and what its loading leaves alone."""

import copy
import gc
import random
import re
import shutil
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PLUGIN, run
from conftest import KD, SIZES, TRAINING, load
from fairseq import checkpoint_utils
from fairseq.models import ARCH_CONFIG_REGISTRY
from test_resume import is_trained

from kd_ext.criterions.label_smoothed_cross_entropy_with_kd import LabelSmoothedCrossEntropyWithKD
from kd_ext.errors import ConfigError
from kd_ext.files.safe_loading import HAS_SAFE_GLOBALS
from kd_ext.models.layers import is_dead
from kd_ext.modules.positions import Positions
from kd_ext.tasks.translation_with_kd import TranslationWithKDConfig, TranslationWithKDTask
from kd_ext.teachers.load import Source, identify_teacher, load_teacher
from kd_ext.teachers.reading import read


@pytest.fixture
def student_task(data):
    return TranslationWithKDTask.setup_task(TranslationWithKDConfig(data=str(data)))


def net_input(task):
    """Two sentences, padded on either side."""
    return {
        "src_tokens": torch.tensor([[1, 1, 7, 8, 2], [9, 10, 11, 12, 2]]),
        "src_lengths": torch.tensor([3, 5]),
        "prev_output_tokens": torch.tensor([[2, 9, 9, 1], [2, 5, 6, 7]]),
    }


def probs(task, path, **settings):
    loaded = load_teacher(Source(str(path), **settings), task)
    return loaded.probs({"net_input": net_input(task)}, Positions(torch.ones(2, 4, dtype=torch.bool)))


def upstream_probs(task, path):
    (model,), _ = checkpoint_utils.load_model_ensemble([str(path)], task=copy.copy(task))
    model.eval()
    with torch.no_grad():
        return model.get_normalized_probs(model(**net_input(task)), log_probs=False).flatten(0, 1)


def test_computes_what_upstreams_model_computes(student_task, teacher):
    torch.testing.assert_close(probs(student_task, teacher), upstream_probs(student_task, teacher))


@pytest.mark.parametrize("content", [b"w1 one\n", b"w1 1\nw1 2\n", b"\xff\xfe 1\n"])
def test_a_damaged_dictionary_beside_it(content, student_task, teacher, data, tmp_path):
    path = tmp_path / "model.pt"
    shutil.copy(teacher, path)
    shutil.copy(data / "dict.src.txt", tmp_path)
    (tmp_path / "dict.tgt.txt").write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_teacher(Source(str(path)), student_task)
    assert str(refused.value).startswith(f"--teacher-checkpoint-path {path}: its {tmp_path}/dict.tgt.txt: damaged, or")


def test_several_that_are_joined_otherwise(teacher, tmp_path):
    (tmp_path / "x:y").mkdir()
    for name in ("a.pt", "b.pt", "x:y/a.pt"):
        shutil.copy(teacher, tmp_path / name)
    a, b, colon = (f"{tmp_path}/{name}" for name in ("a.pt", "b.pt", "x:y/a.pt"))
    for path, said in (
        (f"{a},{b}", f"no such file; ':' joins several: {a}:{b}"),
        (f"{a} {b}", f"no such file; ':' joins several: {a}:{b}"),
        (f"{a},{b}x", "no such file; name the checkpoint"),
        (colon, "a file with a ':' in its path, and ':' joins several"),
    ):
        with pytest.raises(ConfigError) as refused:
            identify_teacher(Source(path), None)
        assert str(refused.value).startswith(f"--teacher-checkpoint-path {path}: {said}")


def test_without_the_dead_encoder_parameters(student_task, teacher, tmp_path):
    """As upstream's git main writes checkpoints."""
    state = load(teacher)
    kept = {name: value for name, value in state["model"].items() if is_trained(name)}
    assert len(kept) == len(state["model"]) - 8 - 2
    kept.update({name: value for name, value in state["model"].items() if name.endswith("_float_tensor")})
    torch.save({**state, "model": kept}, tmp_path / "main.pt")
    torch.testing.assert_close(probs(student_task, tmp_path / "main.pt"), probs(student_task, teacher))


def test_as_old_torch_wrote_it_and_compressed(student_task, teacher, tmp_path):
    """Files that cannot be mapped into memory."""
    torch.save(load(teacher), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(teacher) as source, zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as to:
        for name in source.namelist():
            to.writestr(name, source.read(name))
    for name in ("old.pt", "small.pt"):
        torch.testing.assert_close(probs(student_task, tmp_path / name), upstream_probs(student_task, teacher))


def mappings(path):
    """The addresses that a file is mapped to."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return [range(*(int(x, 16) for x in fields[0].split("-"))) for fields in lines if fields[-1] == str(path)]


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists() or not HAS_SAFE_GLOBALS,
    reason="torch < 2.6, or no /proc",
)
def test_the_optimizers_state_is_not_read(student_task, teacher):
    state = read(str(teacher), {})
    moments = [x for entry in state["last_optimizer_state"]["state"].values() for x in entry.values()]
    moments = [x for x in moments if torch.is_tensor(x) and x.dim() > 0]
    assert len(moments) > 10
    for x in moments:
        assert any(x.data_ptr() in addresses for addresses in mappings(teacher))
    del state, moments, x
    gc.collect()  # of what this test read
    gc.disable()
    try:
        identify_teacher(Source(str(teacher)), student_task)
        assert mappings(teacher) == []  # the file may be written over
        loaded = load_teacher(Source(str(teacher)), student_task)
        assert loaded.models
        assert mappings(teacher) == []
    finally:
        gc.enable()


def test_holds_no_dead_parameters(student_task, teacher):
    assert any(map(is_dead, load(teacher)["model"]))
    loaded = load_teacher(Source(str(teacher)), student_task)
    assert not any(is_dead(name) for name, _ in loaded.models[0].named_parameters())


def test_ensemble(student_task, teacher, student):
    both = probs(student_task, f"{teacher}:{student}")
    mean = (upstream_probs(student_task, teacher) + upstream_probs(student_task, student)) / 2
    torch.testing.assert_close(both, mean)


def test_a_student_can_teach(student_task, student):
    """Its own teacher is not asked for."""
    torch.testing.assert_close(probs(student_task, student), upstream_probs(student_task, student))


def test_overrides_reach_the_model(student_task, teacher, caplog):
    with caplog.at_level("INFO"):
        probs(student_task, teacher, overrides="{'activation_fn': 'gelu'}")
    relu, gelu = probs(student_task, teacher), probs(student_task, teacher, overrides="{'activation_fn': 'gelu'}")
    assert not torch.allclose(relu, gelu)
    message = next(r.getMessage() for r in caplog.records if "loaded teacher" in r.getMessage())
    assert re.search(rf"loaded teacher {teacher}: architecture transformer, [\d,]+ parameters, saved as", message)


def test_leaves_random_state_and_student_task_alone(student_task, teacher):
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    attributes = dict(vars(student_task))
    symbols, state = list(student_task.source_dictionary.symbols), copy.deepcopy(student_task.state_dict())
    probs(student_task, teacher)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()
    assert vars(student_task) == attributes
    assert student_task.source_dictionary.symbols == symbols
    assert student_task.state_dict() == state


def test_the_student_starts_from_the_same_weights(train, distil, tmp_path):
    flags = ["--max-update", "1", "--optimizer", "sgd", "--lr", "0", "--seed", "17"]
    assert train(tmp_path / "alone", "--criterion", "label_smoothed_cross_entropy", *flags).returncode == 0
    assert distil(tmp_path / "taught", *flags, strategy="global_level").returncode == 0
    alone, taught = (load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("alone", "taught"))
    for name in filter(is_trained, alone):
        assert torch.equal(alone[name], taught[name])


def test_eval_bleu_translates_with_the_student(data, teacher):
    """Defect 10: the teacher, built by the student's task, took the place of the student in its generator."""
    config = TranslationWithKDConfig(data=str(data), eval_bleu=True, eval_bleu_args='{"beam": 2}')
    config.teacher_checkpoint_path = str(teacher)
    task = TranslationWithKDTask.setup_task(config)
    settings = Namespace(arch="transformer", encoder_layers=1, decoder_layers=1)
    ARCH_CONFIG_REGISTRY["transformer"](settings)
    student = task.build_model(settings)
    generator = task.sequence_generator
    LabelSmoothedCrossEntropyWithKD(task, False, 0.1)
    assert task.sequence_generator is generator
    assert generator.model.single_model is student


def test_another_architecture_and_size(data, distil, teacher, tmp_path):
    """An LSTM and a larger transformer teach a transformer, as an ensemble."""
    lstm = ["--arch", "lstm", "--encoder-embed-dim", "12", "--encoder-hidden-size", "14", "--decoder-embed-dim", "12"]
    lstm += ["--decoder-hidden-size", "14", "--decoder-out-embed-dim", "10"]
    large = ["--arch", "transformer", *SIZES, "--encoder-layers", "3", "--encoder-ffn-embed-dim", "50"]
    for name, flags in (("lstm", lstm), ("large", large)):
        flags = [*TRAINING, *flags, "--criterion", "label_smoothed_cross_entropy", "--max-update", "2"]
        result = run(tmp_path / f"{name}.log", "fairseq-train", data, *flags, "--save-dir", tmp_path / name)
        assert result.returncode == 0, result.output
    paths = f"{tmp_path}/lstm/checkpoint_last.pt:{tmp_path}/large/checkpoint_last.pt:{teacher}"
    result = distil(tmp_path / "student", "--teacher-checkpoint-path", paths, "--max-update", "3")
    assert result.returncode == 0, result.output
    for name in ("architecture lstm", "architecture transformer"):
        assert name in result.output


USER_MODULE = """
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerModel, base_architecture


@register_model("somebodys_model")
class SomebodysModel(TransformerModel):
    pass


register_model_architecture("somebodys_model", "somebodys_model")(base_architecture)
"""


@pytest.fixture(scope="session")
def somebodys_teacher(data, tmp_path_factory):
    """A folder with a user module, and the checkpoint of a teacher whose architecture is registered there."""
    folder = tmp_path_factory.mktemp("somebody")
    module = folder / "somebodys_module"
    module.mkdir()
    (module / "__init__.py").write_text(USER_MODULE)
    flags = [*TRAINING[len(PLUGIN) :], "--arch", "somebodys_model", *SIZES, "--max-update", "2"]
    flags += ["--user-dir", module, "--criterion", "label_smoothed_cross_entropy", "--save-dir", folder / "teacher"]
    result = run(folder / "log", "fairseq-train", data, *flags)
    assert result.returncode == 0, result.output
    return module, folder / "teacher/checkpoint_last.pt"


def test_a_teacher_from_another_user_module(somebodys_teacher, train, tmp_path):
    module, path = somebodys_teacher
    flags = [*KD, "--teacher-checkpoint-path", path, "--max-update", "2"]
    result = train(tmp_path / "student", *flags, "--teacher-user-dir", module)
    assert result.returncode == 0, result.output
    assert "architecture somebodys_model" in result.output
    result = train(tmp_path / "wrong", *flags)
    assert result.returncode != 0
    assert "kd_ext: error: --teacher-checkpoint-path" in result.last_line
    assert "somebodys_model" in result.last_line
    assert "--teacher-user-dir" in result.last_line


def test_a_user_module_where_the_teacher_is_identified_first(somebodys_teacher, data, train, tmp_path):
    """A cache, filled by training and by its command, a set of translations, and the dictionaries."""
    module, path = somebodys_teacher
    own = ["--teacher-user-dir", module]
    kept = ["--teacher-checkpoint-path", path, *own, "--teacher-cache-top-k", "4", "--teacher-cache-dir"]
    trained = train(tmp_path / "student", *KD, *kept, tmp_path / "trained", "--max-update", "2")
    decoding = ["--destdir", tmp_path / "sd", "--beam", "1", "--cpu"]
    commands = {
        "kd_ext.teacher_cache": [data, *kept, tmp_path / "filled", "--max-tokens", "1000", "--cpu"],
        "kd_ext.sequence_distillation": [data, "--path", path, *own, *decoding],
        "kd_ext.teacher_dictionary": [path, tmp_path / "dict", *own],
    }
    for result in (trained, *(run(tmp_path / "log", name, *flags) for name, flags in commands.items())):
        assert result.returncode == 0, result.output[-2000:]
    assert (tmp_path / "sd/train.src-tgt.tgt.bin").exists()
