"""The branches that a GPU takes, on a device that only says that it is one: its numbers are on the CPU.

Run by test_gpu_branches.py in a process of its own, which the device changes for good. An operation on tensors of two
devices fails, even where a GPU would take the indices from the CPU; products of half-precision operands into float32,
which a CPU does not have, are made from copies in float32.
"""

from functools import partial

import pytest
import torch
from test_chunked_loss import WEIGHTS, make, plain
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

from kd_ext.modules import chunked_logits
from kd_ext.modules.chunked_logits import GivenLogits, LinearLogits
from kd_ext.modules.chunked_loss import Weights, chunked_loss, chunked_nll, of_tokens
from kd_ext.modules.language_tags import LanguageTags
from kd_ext.modules.parted_logits import PartedLogits
from kd_ext.modules.positions import Positions, true_first
from kd_ext.modules.teacher import Teacher
from kd_ext.modules.token_selection import STRATEGIES, SharedWindow
from kd_ext.modules.top_probs import TopProbs, top_probs
from kd_ext.teachers.by_language import SplitByTeacher, TeachersByLanguage


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=_Module())
DEVICE = torch.device("pretend:0")
mixed_products = []  # the dtype of the operands of each


def _mm(a, b, dtype, out=None):
    _check_mixed(a, b, dtype, out)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def _addmm(to, a, b, dtype, alpha, out):
    _check_mixed(a, b, dtype, out)
    assert to.dtype == dtype
    return torch.addmm(to, a.to(dtype), b.to(dtype), alpha=alpha, out=out)


def _check_mixed(a, b, dtype, out):
    """As CUDA is about it."""
    assert a.dtype == b.dtype
    assert a.dtype in (torch.float16, torch.bfloat16)
    assert dtype == torch.float32
    assert out is None or (out.dtype == dtype and out.shape == (a.size(0), b.size(1)))
    mixed_products.append(a.dtype)


# half-precision products into float32
MIXED = {
    torch.ops.aten.mm.dtype: _mm,
    torch.ops.aten.mm.dtype_out: _mm,
    torch.ops.aten.addmm.dtype_out: _addmm,
}


class OnDevice(torch.Tensor):
    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=DEVICE, **layout)

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Takes in what is made from no tensor, too."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


def run(operation, args, kwargs):
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    on_device = [isinstance(x, OnDevice) for x in tensors if isinstance(x, OnDevice) or x.dim() > 0]
    moves = operation in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    assert moves or all(on_device) or not any(on_device), f"{operation}: tensors of two devices"
    if "device" in kwargs:
        stays = torch.device(kwargs["device"]) == DEVICE
    else:
        stays = isinstance(args[0], OnDevice) if moves else any(on_device)
    inside = tree_map(_inside, (args, kwargs))
    out = MIXED.get(operation, operation)(*inside[0], **inside[1])
    if not stays:
        return out
    out = tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(operation, args, kwargs, out)


def _inside(x):
    if isinstance(x, OnDevice):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) else x


def put(x):
    return None if x is None else OnDevice(x.detach().clone())


def put_all(student, teachers):
    """The student as leaf tensors, and the teachers."""
    leaves = LinearLogits(*(put(x).requires_grad_() for x in student))
    return leaves, [type(teacher)(*map(put, teacher)) for teacher in teachers]


def as_dtype(logits, dtype):
    return type(logits)(*(None if x is None else x.detach().to(dtype) for x in logits))


def assert_near(found, expected, tolerance):
    """As vectors: half precision rounds what is small beside the rest to little of its own value."""
    assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.fixture(autouse=True)
def _no_products_yet():
    mixed_products.clear()


def test_the_device_is_strict():
    with Pretend():
        tensor = put(torch.ones(3))
        assert tensor.is_cuda
        assert (tensor + torch.tensor(1.0)).tolist() == [2, 2, 2]
        with pytest.raises(AssertionError, match="two devices"):
            tensor + torch.ones(3)
        with pytest.raises(AssertionError, match="two devices"):
            tensor[torch.tensor([0])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("selection", ["all", "some", "none"])
@pytest.mark.parametrize("teachers", [("bias",), ("linear", "given")])
@pytest.mark.parametrize("is_listed", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_loss(dtype, temperature, selection, teachers, is_listed, weights):
    weights = Weights(*WEIGHTS[weights], 0.1, temperature)
    student, target, selected, teachers = make(torch.float32, n=60, teachers=teachers, selection=selection)
    student, teachers = as_dtype(student, dtype), [as_dtype(teacher, dtype) for teacher in teachers]
    full = LinearLogits(*(x.float().requires_grad_() for x in student))
    loss, nll, _, correct = plain(full, target, selected, teachers, weights)
    with Pretend():
        leaves, known = put_all(student, teachers)
        if is_listed:
            known = listed(known, student.weight.size(0), temperature)
        result = chunked_loss(leaves, put(target), put(selected), known, weights, rows=16)
        nll_alone = chunked_nll(leaves, put(target), rows=16)
        gradients = torch.autograd.grad(3 * result.loss, leaves)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(result.loss.cpu(), loss, **close)
    torch.testing.assert_close(result.nll.cpu(), nll, **close)
    torch.testing.assert_close(nll_alone.cpu(), nll.detach(), **close)
    assert torch.equal(result.correct.cpu(), correct)
    for gradient, expected in zip(gradients, torch.autograd.grad(3 * loss, full)):
        assert gradient.dtype == dtype
        assert_near(gradient.cpu(), expected, max(torch.finfo(dtype).eps, 1e-6))
    assert set(mixed_products) == ({dtype} - {torch.float32})


def listed(teachers, k, temperature, rows=16):
    if teachers[0][0].size(0) == 0:
        return TopProbs(put(torch.zeros(0, k, dtype=torch.int64)), put(torch.zeros(0, k)), k)
    with torch.no_grad():  # in place of the inference mode, which the device does not have
        return top_probs.__wrapped__(teachers, k, temperature, rows=rows)


@pytest.mark.parametrize("version", [(2, 7), (2, 10), (2, 11)])
def test_products_by_version(version, monkeypatch):
    """Of older torch, and chunks of the size that a GPU takes by itself; K words fewer than all."""
    monkeypatch.setattr(chunked_logits, "_TORCH", version)
    weights = Weights(0.5, 0.5, 0.1, 1.0)
    student, target, selected, teachers = make(torch.float32, n=60)
    student, teachers = as_dtype(student, torch.float16), [as_dtype(teacher, torch.float16) for teacher in teachers]
    full = LinearLogits(*(x.float().requires_grad_() for x in student))
    top = top_probs([as_dtype(teacher, torch.float32) for teacher in teachers], 5)
    loss, *_ = plain(full, target, selected, [GivenLogits(top.dense().log())], weights)
    with Pretend():
        leaves, known = put_all(student, teachers)
        known = listed(known, 5, 1.0, rows=None)
        result = chunked_loss(leaves, put(target), put(selected), known, weights)
        gradients = torch.autograd.grad(result.loss, leaves)
    torch.testing.assert_close(result.loss.cpu(), loss, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(gradients, torch.autograd.grad(loss, full)):
        assert_near(gradient.cpu(), expected, torch.finfo(torch.float16).eps)
    assert set(mixed_products) == (set() if version == (2, 7) else {torch.float16})


def test_small_gradients_in_float16():
    """Too small for float16 before they are multiplied by the scale of the loss."""
    weights, scale = Weights(2e-8, 1e-8, 0.1, 1.0), 2.0**24
    student, target, selected, teachers = make(torch.float32, n=60)
    student, teachers = as_dtype(student, torch.float16), [as_dtype(teacher, torch.float16) for teacher in teachers]
    full = LinearLogits(*(x.float().requires_grad_() for x in student))
    loss, *_ = plain(full, target, selected, teachers, weights)
    with Pretend():
        leaves, known = put_all(student, teachers)
        result = chunked_loss(leaves, put(target), put(selected), known, weights, rows=16)
        gradients = torch.autograd.grad(scale * result.loss, leaves)
    for gradient, expected in zip(gradients, torch.autograd.grad(scale * loss, full)):
        assert_near(gradient.cpu(), expected, torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_listed", [False, True])
def test_the_loss_under_automatic_mixed_precision(dtype, is_listed):
    """Of float32 weights: multiplied in the dtype of autocast, a teacher's too; gradients in float32.

    What a cache has was computed without it.
    """
    weights = Weights(0.5, 0.5, 0.1, 1.0)
    student, target, selected, teachers = make(torch.float32, n=60)
    rounded = LinearLogits(*(x.to(dtype).float().requires_grad_() for x in as_dtype(student, dtype)))
    seen = teachers if is_listed else [as_dtype(teacher, dtype) for teacher in teachers]
    loss, nll, term, _ = plain(rounded, target, selected, seen, weights)
    with Pretend():
        leaves, known = put_all(student, teachers)
        if is_listed:
            known = listed(known, student.weight.size(0), 1.0)
        torch.set_autocast_dtype("cuda", dtype)
        torch.set_autocast_enabled("cuda", True)
        try:
            result = chunked_loss(leaves, put(target), put(selected), known, weights, rows=16)
        finally:
            torch.set_autocast_enabled("cuda", False)
        gradients = torch.autograd.grad(result.loss, leaves)
    torch.testing.assert_close(result.loss.cpu(), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.nll.cpu(), nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.kl.cpu(), term.kl, rtol=1e-5, atol=1e-5)  # the teacher's side
    for gradient, expected in zip(gradients, torch.autograd.grad(loss, rounded)):
        assert gradient.dtype == torch.float32
        assert_near(gradient.cpu(), expected, torch.finfo(dtype).eps)
    assert set(mixed_products) == {dtype}


class _ByPreviousWord(torch.nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, src_tokens, prev_output_tokens, features_only):
        return self.table[prev_output_tokens], None


@pytest.mark.parametrize("rate", [0.4, 1.0])
def test_teachers_by_language(rate):
    """The same loss and gradient as on the CPU, and as of all logits put together there."""
    generator = torch.Generator().manual_seed(1)
    student, weight = (torch.randn(*size, generator=generator) for size in ((30, 8), (11, 8)))
    tables = [torch.randn(11, 8, generator=generator) for _ in range(4)]
    previous = torch.randint(2, 11, (6, 7), generator=generator)
    real = torch.arange(7) < torch.tensor([7, 7, 5, 4, 4, 3])[:, None]
    previous[~real] = 1
    sample = {"net_input": {"src_tokens": previous, "prev_output_tokens": previous}, "target": previous}
    pools = torch.tensor([2, 0, 1, 0, 2, 0])
    parts = SplitByTeacher([0, 1, 2], lambda _: pools, 1)(sample)
    target, weights = torch.randint(11, (30,), generator=generator), Weights(0.7, 0.3, 0.1, 1.0)
    selected = torch.rand(30, generator=generator) < rate

    def of(put_there):
        project = partial(LinearLogits, weight=put_there(weight))
        teachers = [
            Teacher([_ByPreviousWord(put_there(x)) for x in group], [project] * len(group))
            for group in (tables[:1], tables[1:3], tables[3:])
        ]
        several = TeachersByLanguage([lambda x=x: x for x in teachers], lambda _: parts)
        moved = {
            "net_input": {name: put_there(x) for name, x in sample["net_input"].items()},
            "target": put_there(sample["target"]),
        }
        output = several.output(moved, Positions(put_there(real), lambda: 30))
        chosen = put_there(selected)
        if rate < 1:
            output = of_tokens(output, true_first(chosen)[: int(selected.sum())])
        leaves = LinearLogits(*(put_there(x).requires_grad_() for x in (student, weight)))
        result = chunked_loss(leaves, put_there(target), chosen, output, weights, rows=4, count=int(selected.sum()))
        return result, torch.autograd.grad(result.loss, leaves[:2])

    there, gradients = of(lambda x: x.clone())
    with Pretend():
        found, on_device = of(put)
    for expected, got in zip((*there, *gradients), (*found, *on_device)):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-6)
    probs = torch.stack(
        [
            torch.stack([tables[i][word] @ weight.t() for i in ids]).softmax(1).mean(0)
            for row, ids in zip(range(6), ([3], [0], [1, 2], [0], [3], [0]))
            for word in previous[row][real[row]]
        ]
    )
    leaves = LinearLogits(student.clone().requires_grad_(), weight.clone().requires_grad_())
    whole = chunked_loss(leaves, target, selected, [GivenLogits(probs.log()[selected])], weights, rows=4)
    for expected, got in zip((*whole, *torch.autograd.grad(whole.loss, leaves[:2])), (*there, *gradients)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [*STRATEGIES.values(), SharedWindow])
def test_selection(kind):
    """The same tokens and gates as on the CPU, with updates that are skipped and a resumption among the others."""
    settings = {"rate": 0.3, "capacity": 100, "pools": ["hi", "ta", "untagged"]}
    on_cpu, on_device = (kind(**settings) for _ in range(2))
    language_tags = partial(LanguageTags, {1: "hi", 2: "ta"}, 4, [0])
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        nll = torch.rand(37, generator=generator)
        sentences = torch.randint(4, (37, 3), generator=generator)
        expected = on_cpu.select(nll, language_tags().of_sentences(sentences))
        with Pretend():
            found = on_device.select(put(nll), language_tags().of_sentences(put(sentences)))
        assert torch.equal(found.mask.cpu(), expected.mask)
        torch.testing.assert_close(found.gates.cpu(), expected.gates, equal_nan=True, rtol=0, atol=0)
        for selector in (on_cpu, on_device):
            with Pretend():
                selector.rollback() if step % 3 == 2 else selector.commit()
        if step == 6:  # resumed, with queues from the CPU
            with Pretend():
                saved, on_device = on_device.state_dict(), kind(**settings)
                on_device.load_state_dict(saved)
    with Pretend():
        saved = on_device.state_dict()
    for pool, values in on_cpu.state_dict().items():
        assert type(saved[pool]) is torch.Tensor  # on the CPU
        assert torch.equal(saved[pool], values)


LARGEST = {"golden": Weights(1.0, 0.0, 0.0, 1.0), "distilled": Weights(0.0, 1.0, 0.0, 4.0)}


LARGEST["both"] = Weights(0.5, 0.5, 0.0, 4.0)


@pytest.mark.parametrize("name", LARGEST)
def test_large_gradients_in_float16(name):
    """Scaled to what float16 holds, and not beyond it."""
    weights = LARGEST[name]
    features = torch.eye(4, 8).half()
    weight = torch.zeros(16, 8).half()
    weight[range(4), range(4)] = 200.0  # token i: all on word i
    target = torch.arange(4) + 4
    selected = torch.full((4,), weights.distilled > 0)
    given = torch.zeros(4, 16)
    given[range(4), target] = 400.0  # and the teacher's on another
    teachers = [GivenLogits(given.half())] if weights.distilled else []
    full = LinearLogits(features.float().requires_grad_(), weight.float().requires_grad_(), None)
    loss, *_ = plain(full, target, selected, teachers, weights)
    with Pretend():
        leaves = LinearLogits(put(features).requires_grad_(), put(weight).requires_grad_(), None)
        known = [GivenLogits(put(teacher.given)) for teacher in teachers]
        result = chunked_loss(leaves, put(target), put(selected), known, weights, rows=2)
        gradients = torch.autograd.grad(result.loss, leaves[:2])
    for gradient, expected in zip(gradients, torch.autograd.grad(loss, full[:2])):
        assert_near(gradient.cpu(), expected, torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_teachers_by_language_under_automatic_mixed_precision(dtype):
    """Of float32 weights: each teacher's are multiplied in the dtype of autocast."""
    weights = Weights(0.5, 0.5, 0.1, 1.0)
    student, target, selected, teachers = make(torch.float32, n=60, teachers=("linear", "bias"), selection="all")
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    parts = [[teacher.of(at)] for teacher, at in zip(teachers, order.split([25, 35]))]
    rounded = LinearLogits(*(x.to(dtype).float() for x in as_dtype(student, dtype)))
    probs = torch.cat([as_dtype(as_dtype(part, dtype), torch.float32).logits() for (part,) in parts]).softmax(1)
    given = [GivenLogits(torch.empty_like(probs).index_copy_(0, order, probs).log())]
    loss, _, term, _ = plain(rounded, target, selected, given, weights)
    with Pretend():
        leaves, _ = put_all(student, [])
        known = [[type(logits)(*map(put, logits)) for logits in part] for part in parts]
        torch.set_autocast_dtype("cuda", dtype)
        torch.set_autocast_enabled("cuda", True)
        try:
            parted = PartedLogits(known, [25, 35], put(order))
            result = chunked_loss(leaves, put(target), put(selected), parted, weights, rows=16)
        finally:
            torch.set_autocast_enabled("cuda", False)
    torch.testing.assert_close(result.loss.cpu(), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.kl.cpu(), term.kl, rtol=1e-5, atol=1e-5)
