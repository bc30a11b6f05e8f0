"""Checkpoints of the fork, as both generations of its flags wrote them: as teacher, to translate with, to go on from.

Their weights are those of fairseq's main branch, without what 0.12.2's encoder layers hold and never use.
"""

import re

import pytest
import torch
from commands import PLUGIN, run
from conftest import KD, load
from test_bad_usage import assert_refused
from test_old_checkpoints import kl
from test_resume import is_trained
from test_teacher import student_task  # noqa: F401  a fixture

from kd_ext.errors import ConfigError
from kd_ext.teachers.load import Source, load_teacher

TAGS = "__src__hi,__src__ta,__src__bn"
ADAPTERS = dict(add_adapters=False, adapter_ids=None, adapter_reduction_factor=2, train_adapter=None)
SIDES = ("encoder", "decoder")


def of_each_side(**settings):
    return {f"{side}_{name}": value for side in SIDES for name, value in settings.items()}


# what each generation's files have that no release has: in the task's settings, the criterion's and the model's
GENERATIONS = {
    "--kd-strategy": (
        {"kd_strategy": "global_language_wise", "teacher_checkpoint_path": "t.pt", "kd_language_tags": TAGS},
        {"kd_rate": 0.5, "kd_queue_size": 1000, "kd_criterion": "kl_div"},
        {
            **of_each_side(recurrent_stacking=None, factorized_embed_dim=None, adapter_use_gating=False, **ADAPTERS),
            "adapter_activation_fn": "relu",
            "factorized_embed_activation_fn": "linear",
        },
    ),
    "--kd-args": (
        {"teacher_checkpoint_path": "t.pt", "language_tags": TAGS},
        {"kd_args": '{"strategy": "global_language_wise", "rate": 0.5, "queue_size": 1000}'},
        {
            **of_each_side(recurrent_stacking=None, factorized_embed_dim=None, use_rmsnorm=False, use_glu=False),
            **of_each_side(kv_attention_heads=None),
            **{"attn_implementation": "fairseq", "lora_args": None, "rope_args": None, "alibi_args": None},
        },
    ),
}


def as_the_fork_wrote_it(path, teacher, generation, **of_model):
    """The teacher's checkpoint as the fork would have written it, with other settings of its model."""
    state = load(teacher)
    task, criterion, model = GENERATIONS[generation]
    cfg = state["cfg"]
    cfg["task"].update(_name="translation_with_kd", **task)
    cfg["criterion"].update(_name="label_smoothed_cross_entropy_with_kd", **criterion)
    cfg["checkpoint"].update(load_checkpoint_liberally=False)
    cfg["dataset"].update(run_sanity_validation_steps=False)
    for settings in (task, criterion, model, of_model):  # the model's hold those of all
        vars(cfg["model"]).update(settings)
    vars(cfg["model"]).update(task="translation_with_kd", criterion="label_smoothed_cross_entropy_with_kd")
    state["optimizer_history"][-1]["criterion_name"] = "KDLabelSmoothedCrossEntropyCriterion"
    state["extra_state"].pop("trained_with")
    state["task_state"] = {}
    state["model"] = {name: tensor for name, tensor in state["model"].items() if is_trained(name)}
    torch.save(state, path)
    return path


@pytest.fixture
def generate_with(data, tmp_path):
    """What fairseq-generate says by a checkpoint: its status, and translations with their scores, or its last line."""

    def generate_with(path, *flags):
        flags = [data, "--path", path, *PLUGIN, "--gen-subset", "valid", "--cpu", "--beam", 2, *flags]
        result = run(tmp_path / "log", "fairseq-generate", *flags)
        if result.returncode != 0:
            return result.returncode, result.last_line
        return 0, re.findall(r"^[HDP]-.*", result.output, re.MULTILINE)

    return generate_with


@pytest.fixture(params=GENERATIONS)
def of_fork(request, teacher, tmp_path):
    return as_the_fork_wrote_it(tmp_path / "checkpoint_best.pt", teacher, request.param)


def test_as_teacher(train, teacher, of_fork, tmp_path):
    begin = ["--finetune-from-model", teacher, "--max-update", 1, "--dropout", "0", "--lr", "1e-9"]
    flags = ["--teacher-checkpoint-path", of_fork, "--kd-strategy", "word_level", *begin]
    result = train(tmp_path / "student", *KD, *flags)
    assert result.returncode == 0, result.output
    assert kl(result.output) == 0


def test_as_path(generate_with, teacher, of_fork):
    found = generate_with(of_fork)
    assert len(found[1]) > 10
    assert found == generate_with(teacher)


def test_to_be_fine_tuned(train, teacher, of_fork, tmp_path):
    flags = ["--max-update", 3, "--criterion", "label_smoothed_cross_entropy", "--finetune-from-model"]
    for name, path in (("of the fork", of_fork), ("the same", teacher)):
        result = train(tmp_path / name, *flags, path)
        assert result.returncode == 0, result.output
    first, second = (load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("of the fork", "the same"))
    assert all(torch.equal(first[name], second[name]) for name in filter(is_trained, second))


@pytest.mark.parametrize(
    "positions",
    [{"rope_args": '{"theta": 10000}'}, {"use_rope": True}, {"alibi_args": '{"type": "symmetrical"}'}],
    ids=lambda given: next(iter(given)),
)
def test_positions_that_leave_no_trace_in_the_weights(train, generate_with, teacher, tmp_path, positions):
    """Read as fairseq's own transformer it would answer, but something else than it was trained to."""
    (name,) = positions
    path = as_the_fork_wrote_it(
        tmp_path / "x.pt", teacher, "--kd-args", no_token_positional_embeddings=True, **positions
    )
    result = train(tmp_path / "student", *KD, "--teacher-checkpoint-path", path, "--max-update", 1)
    assert_refused(result, tmp_path / "student", path, name)
    status, said = generate_with(path)
    assert status != 0
    assert said.startswith("kd_ext: error: ")
    assert name in said


@pytest.fixture
def stacked(teacher, tmp_path):
    """One layer for both depths: the fork has its tensors in the file once for each, and says that there is one."""
    path = as_the_fork_wrote_it(tmp_path / "x.pt", teacher, "--kd-strategy", **of_each_side(recurrent_stacking=2))
    state = load(path)
    for name in [name for name in state["model"] if ".layers.0." in name]:
        state["model"][name.replace(".layers.0.", ".layers.1.")] = state["model"][name].clone()
    vars(state["cfg"]["model"]).update(of_each_side(layers=1))
    torch.save(state, path)
    return path


def test_recurrent_stacking(train, generate_with, stacked, tmp_path):
    """It is as many equal layers, if it is said how many there are."""
    deep = str(of_each_side(layers=2))
    flags = [*KD, "--teacher-checkpoint-path", stacked, "--max-update", 1]
    assert_refused(train(tmp_path / "no", *flags), tmp_path / "no", stacked, "weights do not fit")
    result = train(tmp_path / "student", *flags, "--teacher-model-overrides", deep)
    assert result.returncode == 0, result.output
    status, said = generate_with(stacked, "--model-overrides", deep)
    assert status == 0
    assert len(said) > 10


def test_the_base_below_adapters(train, generate_with, teacher, tmp_path):
    """The fork's adapters compute something else than these, and have other names: the base alone is used."""
    settings = of_each_side(add_adapters=True, adapter_ids="hi,ta", train_adapter="hi")
    path = as_the_fork_wrote_it(tmp_path / "x.pt", teacher, "--kd-strategy", **settings)
    state = load(path)
    for name, shape in (("up", (8, 16)), ("down", (16, 8))):
        state["model"][f"encoder.layers.0.adapter_block.adapters.hi.{name}.weight"] = torch.ones(shape)
    torch.save(state, path)
    flags = [*KD, "--teacher-checkpoint-path", path, "--max-update", 1]
    assert_refused(train(tmp_path / "no", *flags), tmp_path / "no", path, "weights do not fit", "adapter_block")
    assert generate_with(path)[0] != 0
    flags = ["--max-update", 1, "--criterion", "label_smoothed_cross_entropy", "--load-checkpoint-liberally"]
    result = train(tmp_path / "base", *flags, "--finetune-from-model", path, arch="transformer_ext")
    assert result.returncode == 0, result.output
    assert re.search(r"liberally: unexpected: .*adapter_block", result.output)


def factorized(name, tensor):
    if not name.endswith("embed_tokens.weight"):
        return {name: tensor}
    return {name.replace("weight", "emb.weight"): tensor[:, :4], name.replace("weight", "up.weight"): tensor[:16, :4]}


def without_biases_of_norms(name, tensor):
    return {} if name.endswith("layer_norm.bias") else {name: tensor}


def with_lora(name, tensor):
    more = {name.replace("weight", "lora_A"): tensor[:2]} if name.endswith("v_proj.weight") else {}
    return {name: tensor, **more}


def with_fewer_heads_of_keys(name, tensor):
    return {name: tensor[:8] if ".k_proj." in name or ".v_proj." in name else tensor}


WEIGHTS = {
    factorized: of_each_side(factorized_embed_dim=4),
    without_biases_of_norms: of_each_side(use_rmsnorm=True),
    with_lora: {"lora_args": '{"r": 2}'},
    with_fewer_heads_of_keys: of_each_side(kv_attention_heads=1),
}


@pytest.mark.parametrize("change", WEIGHTS, ids=lambda change: change.__name__)
def test_weights_that_only_the_fork_has_a_place_for(student_task, teacher, tmp_path, change):  # noqa: F811
    path = as_the_fork_wrote_it(tmp_path / "x.pt", teacher, "--kd-args", **WEIGHTS[change])
    state = load(path)
    state["model"] = {k: v for name, tensor in state["model"].items() for k, v in change(name, tensor).items()}
    torch.save(state, path)
    with pytest.raises(ConfigError, match="weights do not fit"):
        load_teacher(Source(str(path), f"{{'data': '{student_task.cfg.data}'}}"), student_task)
