"""The kernel of a row against the plain formulation, in Triton's interpreter on a CPU."""

import os
import subprocess
import sys

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("test_gpu.py has the kernel itself", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # has to be there before the kernel is imported

from test_chunked_loss import SELECTIONS, WEIGHTS, check, make, plain

from kd_ext.modules import chunked_logits, chunked_loss
from kd_ext.modules.chunked_logits import GivenLogits
from kd_ext.modules.chunked_loss import Weights
from kd_ext.modules.parted_logits import PartedLogits
from kd_ext.modules.top_probs import top_probs

triton = pytest.importorskip("triton")
row_kernel = pytest.importorskip("kd_ext.modules.row_kernel")


@pytest.fixture(autouse=True, params=[4096, 16])
def runs(request, monkeypatch):
    """Have the kernel used on a CPU, with one block for a row and with several; counts its runs."""
    found = []
    run = row_kernel.run
    monkeypatch.setattr(row_kernel, "BLOCK", request.param)
    monkeypatch.setattr(row_kernel, "run", lambda *args, **kwargs: (found.append(kwargs), run(*args, **kwargs))[1])
    monkeypatch.setattr(
        chunked_loss, "row_kernel_for", lambda like: row_kernel if like.dtype == torch.float32 else None
    )
    return found


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("teachers", [("linear",), ("given",)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equals_the_plain_formulation(runs, weights, selection, teachers, temperature):
    for bias, epsilon in ((True, 0.1), (False, 0.0)):
        settings = {"dtype": torch.float32, "bias": bias, "teachers": teachers, "selection": selection}
        check(5, 1e-5, Weights(*WEIGHTS[weights], epsilon, temperature), **settings)
    assert runs


def test_several_teachers_go_another_way(runs):
    settings = {"dtype": torch.float32, "teachers": ("linear", "given"), "selection": "all"}
    check(5, 1e-5, Weights(0.5, 0.5, 0.1, 1.0), **settings)
    assert all("teacher" not in arguments for arguments in runs)


@pytest.mark.parametrize("k", [1, 5, 37])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_listed_words(runs, k, temperature, weights):
    """As the plain formulation on the distribution that the list stands for."""
    from kd_ext.modules.chunked_logits import GivenLogits

    student, target, selected, teachers = make(torch.float32)
    target[::2] = 3  # some targets among the listed words of most tokens
    top = top_probs([teachers[0]], k, temperature)
    top = top._replace(words=top.words.clone())
    w = Weights(*WEIGHTS[weights], 0.1, temperature)
    given = [GivenLogits(top.dense().clamp(min=1e-30).log() * temperature)]
    expected, nll, term, _ = plain(student, target, selected, given, w)
    result = chunked_loss.chunked_loss(student, target, selected, top, w, rows=4)
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.nll, nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.kl, term.kl, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(result.loss, student)
    for gradient, reference in zip(found, torch.autograd.grad(expected, student)):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)
    assert any("listed" in arguments for arguments in runs)


def test_words_that_the_teacher_excludes(runs):
    """A logit of -inf is a probability of 0, and adds nothing to the entropy."""
    student, target, selected, teachers = make(torch.float32, teachers=("given",), selection="all")
    teachers[0].given[:, :20] = -float("inf")  # a whole block of them, and some
    w = Weights(0.5, 0.5, 0.1, 1.0)
    result = chunked_loss.chunked_loss(student, target, selected, teachers, w, rows=4)
    q = teachers[0].given.double().softmax(1)
    log_p = student.logits().double().log_softmax(1)
    kl = (torch.xlogy(q, q) - q * log_p).sum(1)
    torch.testing.assert_close(result.kl.double(), kl, rtol=1e-4, atol=1e-5)
    assert runs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_half_precision(runs, monkeypatch, dtype):
    """As a GPU takes them: half-precision operands, of which float16 is scaled to the range that it has."""
    product = chunked_logits.Product

    class Mixed(product):
        def __init__(self, like):
            super().__init__(like)
            self.operand = like.dtype

        def into(self, out, a, b):
            return torch.mm(a.float(), b.float(), out=out)

        def add(self, out, a, b, factor):
            out.addmm_(a.float(), b.float(), alpha=factor)

    monkeypatch.setattr(chunked_logits, "Product", Mixed)
    w = Weights(2e-8, 1e-8, 0.1, 1.0) if dtype == torch.float16 else Weights(0.5, 0.5, 0.1, 1.0)
    student, target, selected, teachers = make(torch.float32, n=60)
    half = type(student)(*(x.detach().to(dtype).requires_grad_() for x in student))
    known = [type(teacher)(*(x.to(dtype) for x in teacher if x is not None)) for teacher in teachers]
    full = type(student)(*(x.detach().float().requires_grad_() for x in half))
    scale = 2.0**24 if dtype == torch.float16 else 1.0
    expected, *_ = plain(full, target, selected, known, w)
    result = chunked_loss.chunked_loss(half, target, selected, known, w, rows=16)
    gradients = torch.autograd.grad(scale * result.loss, half)
    for gradient, reference in zip(gradients, torch.autograd.grad(scale * expected, full)):
        assert (gradient.double() - reference.double()).norm() <= torch.finfo(dtype).eps * reference.double().norm()
    assert runs


COMPILING = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kd_ext.modules import row_kernel

function, options = row_kernel._kernel, dict(HAS_TEACHER=False, HAS_LIST=False, WRITES=True, AT_T=False)
options.update({name: True for name in sys.argv[2:]}, BLOCK=row_kernel.BLOCK, BLOCK_K=32)
kinds = {name: "*fp32" for name in "logits teacher excess top at_target total total_at_t inner entropy".split()}
kinds.update(words="*i64", target="*i64", gradient=sys.argv[1], V="i32", K="i32", gradient_stride="i32")
kinds.update({name: "fp32" for name in "golden factor peak inverse_t scale".split()})
kinds.update(dict.fromkeys(options, "constexpr"))
names = function.arg_names
source = ASTSource(
    fn=function,
    signature={name: kinds[name] for name in names},
    constexprs={(names.index(name),): value for name, value in options.items()},
)
target = GPUTarget("cuda", 90, 32)
print("compiled", len(triton.compile(source, target=target, options={"num_warps": row_kernel.WARPS}).asm["ptx"]))
"""


@pytest.mark.skipif(not hasattr(triton, "compile"), reason="an older Triton")
@pytest.mark.parametrize("gradient", ["*bf16", "*fp32"])
@pytest.mark.parametrize("options", [["HAS_TEACHER"], ["HAS_TEACHER", "AT_T"], ["HAS_LIST"], []])
def test_compiles_for_a_gpu(gradient, options):
    """For one that is not here: the interpreter takes what the compiler does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILING, gradient, *options]
    done = subprocess.run(command, stdout=-1, stderr=-2, text=True, env=environment)
    assert "compiled" in done.stdout, done.stdout


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_parts_of_one_teacher_and_of_several(runs, sizes, temperature):
    """The kernel takes logits: where a part is an ensemble, whose chunk is probabilities, another way is gone."""
    student, target, selected, models = make(torch.float32, teachers=("linear", "bias", "given"), selection="all")
    groups = [models[: sizes[0]], models[sizes[0] : sum(sizes)]]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(23, generator=generator)
    of_parts = order.split([10, 13])
    probs = torch.empty(23, 37)
    for tokens, group in zip(of_parts, groups):
        of_each = [(model.logits()[tokens] / temperature).softmax(1) for model in group]
        probs[tokens] = sum(of_each) / len(of_each)
    parted = PartedLogits([[m.of(at) for m in group] for at, group in zip(of_parts, groups)], [10, 13], order)
    weights = Weights(0.7, 0.3, 0.1, temperature)
    expected, _, term, _ = plain(student, target, selected, [GivenLogits(probs.log() * temperature)], weights)
    result = chunked_loss.chunked_loss(student, target, selected, parted, weights, rows=4)
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.kl, term.kl, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(result.loss, student)
    for gradient, reference in zip(found, torch.autograd.grad(expected, student)):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)
    assert bool(runs) == (sizes == (1, 1))
