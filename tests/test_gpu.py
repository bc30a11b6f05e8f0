"""What needs a CUDA device: every precision and strategy there, against the CPU.

With KD_EXT_REHEARSE=1 in the environment all that a CPU can do of it is done on the CPU: so these tests are tested.
"""

import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from commands import ENVIRONMENT, PLUGIN, script
from conftest import KD, SIZES, TRAINING, load, strategy_flags
from fairseq.logging import metrics
from stubs import GivenFeatures, Run, dictionary, random_batch, to_sample
from test_chunked_loss import plain
from test_cli_teachers_by_language import other  # noqa: F401  a fixture, as those below
from test_foreign_tasks import TRAIN as OF_FOREIGN
from test_foreign_tasks import folder, kl, m2m, tagged  # noqa: F401
from test_sequence_distillation import FLAGS as OF_SEQUENCES
from test_sequence_distillation import best, both_sides  # noqa: F401
from tiny_models import batch, both, build

from kd_ext.files.fingerprint import is_weight
from kd_ext.modules.chunked_logits import GivenLogits, LinearLogits
from kd_ext.modules.chunked_loss import Weights, chunked_loss, chunked_nll
from kd_ext.modules.top_probs import top_probs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not os.environ.get("KD_EXT_REHEARSE"), reason="needs a CUDA device"
    ),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLACE = {"cuda": "cuda:0", "cpu": "cpu"}[DEVICE]
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="not on a CPU")
HAS_COMPILER = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 3)
ON_CPU = TRAINING.index("--cpu")
ON_GPU = TRAINING[:ON_CPU] + TRAINING[ON_CPU + 1 :] if DEVICE == "cuda" else TRAINING
SELECTIVE = ["batch_level", "global_level", "global_language_wise"]
# flags, environment, the dtype of the teacher, how far losses in bits may be from float32 on a CPU after 5 updates
PRECISIONS = {
    "float32": ([], {}, "float32", 3e-3),
    "tf32": ([], {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}, "float32", 2e-2),
    "fp16": (["--fp16"], {}, "float16", 5e-2),
    "memory-efficient-fp16": (["--memory-efficient-fp16"], {}, "float16", 5e-2),
    "bf16": (["--bf16"], {}, "bfloat16", 0.15),
    "memory-efficient-bf16": (["--memory-efficient-bf16"], {}, "bfloat16", 0.15),
    "amp": (["--amp"], {}, "float32", 5e-2),
}
RUNS = [
    *((precision, strategy) for precision in PRECISIONS for strategy in ("word_seq_level", "global_language_wise")),
    *(
        (precision, strategy)
        for precision in ("bf16", "fp16")
        for strategy in ("word_level", "batch_level", "global_level")
    ),
]


def run_typed(*command, stdin=None, **environment):
    environment = {**ENVIRONMENT, **environment}
    if DEVICE == "cuda":
        del environment["CUDA_VISIBLE_DEVICES"]
    done = subprocess.run(
        list(map(str, command)), input=stdin, stdout=-1, stderr=-2, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def train_flags(data, save_dir, *flags, arch="transformer"):
    # one worker: the default is one for each GPU
    return [data, *ON_GPU, "--arch", arch, *SIZES, "--save-dir", save_dir, "--distributed-world-size", "1", *flags]


def distil_on_gpu(data, teacher, save_dir, *flags, strategy="global_language_wise", **environment):
    flags = [*KD, *strategy_flags(strategy), "--dropout", "0", *flags]
    if teacher is not None:
        flags += ["--teacher-checkpoint-path", teacher]
    return run_typed(script("fairseq-train"), *train_flags(data, save_dir, *flags), **environment)


def nll(output):
    return [float(x) for x in re.findall(r"train_inner .*? nll_loss=([\d.]+)", output)]


@pytest.fixture(scope="module")
def on_cpu(distil, tmp_path_factory):
    """The losses of the first updates in float32 on a CPU, by strategy."""
    found = {}

    def losses(strategy):
        if strategy not in found:
            folder = tmp_path_factory.mktemp("cpu")
            found[strategy] = nll(distil(folder, "--max-update", "5", "--dropout", "0", strategy=strategy).output)
        return found[strategy]

    return losses


@pytest.mark.parametrize(("precision", "strategy"), RUNS)
def test_precisions(data, teacher, on_cpu, tmp_path, precision, strategy):
    flags, environment, dtype, tolerance = PRECISIONS[precision]
    if DEVICE == "cpu" and ("fp16" in precision or precision == "amp"):
        pytest.skip("upstream has it on GPUs alone")
    if DEVICE == "cuda" and "bf16" in precision and not torch.cuda.is_bf16_supported():
        pytest.skip("the device has no bfloat16")
    output = distil_on_gpu(data, teacher, tmp_path, *flags, "--max-update", "25", strategy=strategy, **environment)
    losses = nll(output)
    if "fp16" not in precision and precision != "amp":  # there the first updates may be skipped
        assert losses[:5] == pytest.approx(on_cpu(strategy), abs=tolerance)
    assert losses[-1] < losses[0] - 0.5
    assert f"teacher placed on {PLACE} as torch.{dtype}" in output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_teacher_in_a_dtype_of_its_own(data, teacher, on_cpu, tmp_path, dtype):
    output = distil_on_gpu(
        data, teacher, tmp_path, "--teacher-dtype", dtype, "--max-update", "5", strategy="word_level"
    )
    assert f"teacher placed on {PLACE} as torch.{dtype}" in output
    assert nll(output) == pytest.approx(on_cpu("word_level"), abs=0.05)


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_a_teacher_for_each_language(data, teacher, other, distil, tmp_path, precision):  # noqa: F811
    """Each is asked for its rows alone, and what they say is put together."""
    if DEVICE == "cpu" and ("fp16" in precision or precision == "amp"):
        pytest.skip("upstream has it on GPUs alone")
    flags, environment, dtype, tolerance = PRECISIONS[precision]
    by_language = f"hi={other},...={teacher}"
    of_teachers = ["--teacher-checkpoint-path", by_language, "--max-update", "5"]
    expected = distil(tmp_path / "cpu", *of_teachers, "--dropout", "0", strategy="word_level").output
    output = distil_on_gpu(
        data, by_language, tmp_path / "gpu", *flags, *of_teachers, strategy="word_level", **environment
    )
    assert output.count(f"teacher placed on {PLACE} as torch.{dtype}") >= 1
    found, wanted = (
        [float(x) for x in re.findall(r"train_inner .*? kd_loss=([\d.]+)", text)] for text in (output, expected)
    )
    if "fp16" not in precision and precision != "amp":  # there the first updates may be skipped
        assert found == pytest.approx(wanted, abs=tolerance)
    assert len(found) >= 4


@pytest.mark.parametrize("precision", [[], ["--bf16"], pytest.param(["--fp16"], marks=needs_cuda)])
def test_a_teacher_of_another_task(m2m, tagged, tmp_path, precision):  # noqa: F811
    """M2M-100's, and a student with its weights: nothing is between them but rounding."""
    flags = [flag for flag in OF_FOREIGN if flag != "--cpu" or DEVICE == "cpu"]
    flags += ["--teacher-checkpoint-path", m2m, "--finetune-from-model", m2m, "--save-dir", tmp_path, *precision]
    output = run_typed(script("fairseq-train"), tagged, *flags, "--distributed-world-size", "1")
    found = kl(output)
    assert len(found) >= 2
    assert max(map(abs, found)) <= (1e-3 if precision else 1e-4)


@pytest.mark.parametrize("precision", [[], ["--bf16"], pytest.param(["--fp16"], marks=needs_cuda)])
def test_the_teachers_translations(data, teacher, best, tmp_path, precision):  # noqa: F811
    """Those of a CPU in float32; in half precision, of a teacher that hardly prefers one to another, some differ."""
    flags = [flag for flag in OF_SEQUENCES if flag != "--cpu" or DEVICE == "cpu"]
    command = [sys.executable, "-m", "kd_ext.sequence_distillation", data, "--path", teacher, *flags, *precision]
    run_typed(*command, "--destdir", tmp_path / "out")
    wanted, found = both_sides(best[0]), both_sides(tmp_path / "out")
    texts = [dict(zip(*sides)) for sides in (wanted, found)]
    both = texts[0].keys() & texts[1].keys()
    assert len(both) >= 0.9 * len(texts[0])
    same = sum(texts[0][source] == texts[1][source] for source in both) / len(both)
    assert same >= (0.7 if precision else 0.97)


def test_what_upstream_has_in_bf16(data, teacher, tmp_path):
    """Clipping, averaged weights, several batches an update; then validation and translation in bfloat16."""
    flags = ["--bf16", "--clip-norm", "0.1", "--store-ema", "--update-freq", "2", "--max-update", "12"]
    output = distil_on_gpu(data, teacher, tmp_path, *flags, strategy="global_level")
    assert nll(output)[-1] < nll(output)[0]
    at = ["--path", tmp_path / "checkpoint_last.pt", *PLUGIN]
    on_gpu, in_bf16 = (
        run_typed(script("fairseq-validate"), data, *at, "--max-tokens", "400", *flags) for flags in ([], ["--bf16"])
    )
    losses = [float(re.findall(r"nll_loss ([\d.]+)", found)[-1]) for found in (on_gpu, in_bf16)]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
    translated = run_typed(script("fairseq-generate"), data, *at, "--gen-subset", "valid", "--bf16")
    assert len(re.findall(r"^H-", translated, re.MULTILINE)) > 10
    line = run_typed(script("fairseq-interactive"), data, *at, "--bf16", stdin="__src__hi __tgt__en w1 w2\n")
    assert len(re.findall(r"^H-0", line, re.MULTILINE)) == 1


@needs_cuda
@pytest.mark.parametrize("precision", ["--fp16", "--amp"])
def test_skipped_updates_push_nothing(data, teacher, tmp_path, precision):
    """A first scale that overflows: the queue holds the tokens of the updates that were made, and no other."""
    flags = [precision, "--fp16-init-scale", str(2**40), "--max-update", "6", "--kd-queue-size", "100000"]
    output = distil_on_gpu(data, teacher, tmp_path, *flags, strategy="global_level")
    tokens = sum(float(x) for x in re.findall(r"train_inner .*? wpb=([\d.]+)", output))
    queue = load(tmp_path / "checkpoint_last.pt")["task_state"]["kd"]["queues"]["all"]
    assert queue.numel() == pytest.approx(tokens, abs=1)


@pytest.mark.parametrize("precision", [[], ["--bf16"], pytest.param(["--fp16"], marks=needs_cuda)])
def test_resume(data, teacher, tmp_path, precision):
    whole = distil_on_gpu(data, teacher, tmp_path / "whole", *precision, "--max-update", "14")
    first = distil_on_gpu(data, teacher, tmp_path / "parts", *precision, "--max-update", "7")
    second = distil_on_gpu(data, teacher, tmp_path / "parts", *precision, "--max-update", "14")
    assert nll(first) + nll(second) == pytest.approx(nll(whole), abs=0.01 if not precision else 0.05)
    queues = [load(tmp_path / run / "checkpoint_last.pt")["task_state"]["kd"]["queues"] for run in ("whole", "parts")]
    for name, values in queues[0].items():
        torch.testing.assert_close(queues[1][name], values, atol=0.01 if not precision else 0.1, rtol=0)


@needs_cuda
def test_a_run_whose_optimizer_had_each_parameter_apart(data, teacher, tmp_path):
    """As fairseq has it with bfloat16, and earlier runs have: it goes on with all as one."""
    flags = ["--bf16", "--max-update"]
    whole = distil_on_gpu(data, teacher, tmp_path / "whole", *flags, "14")
    first = distil_on_gpu(data, teacher, tmp_path / "parts", *flags, "7", "--fp16-no-flatten-grads")
    states = [load(tmp_path / "parts" / "checkpoint_last.pt")["last_optimizer_state"]["state"]]
    second = distil_on_gpu(data, teacher, tmp_path / "parts", *flags, "14")
    assert nll(first) + nll(second) == pytest.approx(nll(whole), abs=0.05)
    states.append(load(tmp_path / "parts" / "checkpoint_last.pt")["last_optimizer_state"]["state"])
    assert len(states[0]) > 10
    assert len(states[1]) == 1


def test_cache(data, teacher, tmp_path):
    """Filled by a command in half precision, then read without the teacher."""
    cache = ["--teacher-cache-dir", tmp_path / "cache", "--max-tokens", "400"]
    filling = [*cache, "--teacher-checkpoint-path", teacher, "--teacher-cache-top-k", "30", "--bf16"]
    run_typed(sys.executable, "-m", "kd_ext.teacher_cache", data, *filling)
    flags = ["--max-update", "10"]
    from_cache = distil_on_gpu(data, None, tmp_path / "a", *flags, *cache[:2], strategy="word_level")
    with_teacher = distil_on_gpu(data, teacher, tmp_path / "b", *flags, strategy="word_level")
    assert nll(from_cache) == pytest.approx(nll(with_teacher), abs=0.05)
    assert "teacher placed" not in from_cache


def test_adapters(data, teacher, tmp_path):
    """In bfloat16 gradients go to the trained adapter alone."""
    on_sides = []
    for side in ("encoder", "decoder"):
        on_sides += [f"--{side}-add-adapters", f"--{side}-adapter-ids", "hi,ta", f"--{side}-train-adapter", "hi"]
    base = ["--finetune-from-model", teacher, "--load-checkpoint-liberally", "--bf16", "--max-update", "5"]
    flags = train_flags(data, tmp_path, *on_sides, *base, arch="transformer_adapter")
    run_typed(script("fairseq-train"), *flags, "--criterion", "label_smoothed_cross_entropy")
    before, after = load(teacher)["model"], load(tmp_path / "checkpoint_last.pt")["model"]
    for name, tensor in after.items():
        if name in before and is_weight(name):
            assert torch.equal(tensor, before[name].to(torch.bfloat16).to(tensor.dtype)), name
    moved = {name: bool(tensor.any()) for name, tensor in after.items() if ".up.weight" in name}
    assert moved == {name: ".hi." in name for name in moved}
    assert any(moved.values())


@pytest.mark.skipif(not HAS_COMPILER, reason="torch < 2.3")
@pytest.mark.parametrize("precision", [[], ["--bf16"]])
def test_torch_compile(data, teacher, tmp_path, precision):
    flags = [*precision, "--max-update", "30"]
    plain_run = distil_on_gpu(data, teacher, tmp_path / "a", *flags)
    compiled = distil_on_gpu(data, teacher, tmp_path / "b", *flags, "--torch-compile")
    assert nll(compiled) == pytest.approx(nll(plain_run), abs=0.15 if precision else 0.02)
    names = [load(tmp_path / run / "checkpoint_last.pt")["model"].keys() for run in "ab"]
    assert names[0] == names[1]


def test_two_workers_on_one_device(data, teacher, tmp_path):
    """Over gloo, against one worker that takes two batches an update."""
    flags = [*KD, "--teacher-checkpoint-path", teacher, *strategy_flags("global_language_wise"), "--dropout", "0"]
    flags += ["--max-update", "6"]
    one = [*train_flags(data, tmp_path / "one", *flags), "--update-freq", "2"]
    two = [data, *ON_GPU, "--arch", "transformer", *SIZES, "--save-dir", tmp_path / "two", *flags]
    two += ["--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp", "--device-id", "0"]
    alone = run_typed(script("fairseq-train"), *one)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    together = run_typed(*launcher, script("fairseq-train"), *two)
    assert nll(together) == pytest.approx(nll(alone), abs=5e-3)


@pytest.mark.parametrize("settings", [{"recurrent_stacking": 3}, {"factorized_embed_dim": 6}])
def test_step_by_step_equals_the_full_pass(settings):
    model = build("transformer_ext", **both(**settings)).eval()
    source, previous = batch()
    lengths = source.ne(1).sum(1)
    expected, _ = model(source, lengths, previous)
    model, source, lengths, previous = (x.to(DEVICE) for x in (model, source, lengths, previous))
    with torch.no_grad():
        full, _ = model(source, lengths, previous)
        encoded, state, steps = model.encoder(source, lengths), {}, []
        for t in range(1, previous.size(1) + 1):
            steps.append(model.decoder(previous[:, :t], encoder_out=encoded, incremental_state=state)[0])
    torch.testing.assert_close(full.cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["word_seq_level", "word_level", *SELECTIVE, "shared"])
def test_nothing_is_waited_for(strategy, monkeypatch):
    """Loss, selection, gradients and what is logged, with torch told to refuse whatever waits for the device."""
    monkeypatch.setattr(Run, "student_kind", GivenFeatures)
    monkeypatch.setattr(Run, "teacher_kind", GivenFeatures)
    flags = {"kd_rate": 0.5} if strategy in SELECTIVE else {}
    if strategy.startswith("global"):
        flags["kd_queue_size"] = 20
    if strategy == "shared":
        strategy, flags = "global_language_wise", {"kd_rate": 0.5, "kd_queue_size": 20, "kd_queue_window": "shared"}
    run = Run(strategy, **flags)
    run.criterion.report_accuracy = False  # upstream's waits
    words = dictionary()
    rng = np.random.default_rng(0)
    for update in range(4):
        sentences = random_batch(rng, ["hi", "ta", None, "hi"])
        run.set_logits(sentences)
        for model in (run.student, *run.teachers):
            model.logits = torch.nn.Parameter(model.logits.detach().to(DEVICE), requires_grad=model is run.student)
            model.to(DEVICE)
        sample = to_sample(words, sentences)
        sample = {
            **sample,
            "net_input": {name: x.to(DEVICE) for name, x in sample["net_input"].items()},
            "target": sample["target"].to(DEVICE),
        }
        if update == 0:  # the first finds the projection, moves the teacher and compiles the kernel
            run.criterion(run.student, sample)[0].backward()
            run.task.selector.commit()
            continue
        refuse_waits = torch.cuda.set_sync_debug_mode if DEVICE == "cuda" else lambda mode: None
        refuse_waits("error")
        try:
            loss, _, logged = run.criterion(run.student, sample)
            loss.backward()
            run.task.selector.commit()
        finally:
            refuse_waits("default")
        assert _waits(lambda: type(run.criterion).reduce_metrics([logged])) <= 1  # noqa: B023


def _waits(function):
    """How often a function waits for the device, and what it logs is asked for."""
    if DEVICE == "cpu":
        function()
        return 0
    with warnings.catch_warnings(record=True) as warned, metrics.aggregate(new_root=True) as logged:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        function()
        logged.get_smoothed_values()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in warned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("teacher", ["linear", "listed"])
def test_the_loss_by_chunks(dtype, temperature, teacher):
    """Against the plain formulation in float64, of a vocabulary and a batch of real sizes."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    n, vocabulary, width = 700, 10_008, 64
    randn = lambda *shape: torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)  # noqa: E731
    student = LinearLogits(randn(n, width).requires_grad_(), (randn(vocabulary, width) / 4).requires_grad_(), None)
    known = [LinearLogits(randn(n, 96), randn(vocabulary, 96) / 4)]
    target = torch.randint(vocabulary, (n,), generator=generator, device=DEVICE)
    selected = torch.arange(n, device=DEVICE) % 3 > 0
    known = [logits.of(selected.nonzero().squeeze(1)) for logits in known]
    weights = Weights(0.5, 0.5, 0.1, temperature)
    full = LinearLogits(*(x.detach().double().requires_grad_() for x in student[:2]))
    teachers = [LinearLogits(*(x.double() for x in known[0][:2]))]
    if teacher == "listed":
        known = top_probs(known, 50, temperature)
        dense = known.to(torch.device(DEVICE), torch.float64).dense()
        teachers = [GivenLogits(dense.log() * temperature)]
    expected, of_tokens, term, _ = plain(full, target, selected, teachers, weights)
    result = chunked_loss(student, target, selected, known, weights, rows=256)
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(result.loss.double(), expected, **close)
    torch.testing.assert_close(result.nll.double(), of_tokens, **close)
    torch.testing.assert_close(chunked_nll(student, target, rows=256).double(), of_tokens.detach(), **close)
    torch.testing.assert_close(result.kl.double(), term.kl, rtol=1e-4, atol=1e-3 if teacher == "listed" else 1e-4)
    found = torch.autograd.grad(result.loss, student[:2])
    for gradient, reference in zip(found, torch.autograd.grad(expected, full[:2])):
        assert gradient.dtype == dtype
        tolerance = max(torch.finfo(dtype).eps, 1e-5)
        assert (gradient.double() - reference).norm() <= tolerance * reference.norm()


@needs_cuda
def test_the_kernel_is_used():
    """Where Triton is there: else the tests above have tested something else."""
    pytest.importorskip("triton")
    from kd_ext.modules.chunked_logits import row_kernel_for

    assert row_kernel_for(torch.zeros(1, device=DEVICE)) is not None
