"""Which models' output layers are taken apart, and that what is trained does not depend on it."""

import functools

import numpy as np
import pytest
import torch
from fairseq.distributed import LegacyDistributedDataParallel, ModuleProxyWrapper
from fairseq.models.transformer import TransformerConfig, TransformerDecoderBase, TransformerModelBase
from stubs import Run, random_batch, to_sample
from torch.nn import functional as F

from kd_ext.models.output_projection import NoProjectionError, find_projection
from kd_ext.modules.chunked_logits import LinearLogits
from kd_ext.modules.teacher import Teacher


def transformer(task, **settings):
    cfg = TransformerConfig(dropout=0.0, **settings)
    for side in (cfg.encoder, cfg.decoder):
        side.embed_dim, side.ffn_embed_dim, side.layers, side.attention_heads = 8, 16, 1, 2
    cfg.decoder.input_dim = cfg.decoder.output_dim = 8
    return TransformerModelBase.build_model(cfg, task)


class Factorized(torch.nn.Module):
    """A projection in two factors, as a module of someone else's might define it."""

    def __init__(self):
        super().__init__()
        self.up, self.table = torch.nn.Linear(4, 8, bias=False), torch.nn.Parameter(torch.randn(17, 4))

    def forward(self, x):
        return F.linear(F.linear(x, self.up.weight.t()), self.table)

    def linear_logits(self, features):
        return LinearLogits(F.linear(features, self.up.weight.t()), self.table)


def with_bias():
    return torch.nn.Linear(8, 17)


KINDS = {
    "untied": ({}, None),
    "tied": ({"share_decoder_input_output_embed": True}, None),
    "shared by all": ({"share_all_embeddings": True, "share_decoder_input_output_embed": True}, None),
    "with bias": ({}, with_bias),
    "factorized": ({}, Factorized),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("strategy", "flags"),
    [
        ("word_seq_level", {"alpha": 0.3}),
        ("word_seq_level", {"alpha": 0.0}),
        ("word_level", {}),
        ("batch_level", {"kd_rate": 0.4}),
        ("global_level", {"kd_rate": 0.4, "kd_queue_size": 30}),
        ("global_language_wise", {"kd_rate": 0.4, "kd_queue_size": 20}),
    ],
)
def test_gradients_of_the_model_are_those_of_the_plain_formulation(kind, strategy, flags):
    results = []
    for lean in (True, False):
        torch.manual_seed(0)
        run = Run(strategy, prefix=1, **flags)
        settings, projection = KINDS[kind]
        models = [transformer(run.task, **settings) for _ in range(2)]
        if projection is not None:
            for model in models:
                model.decoder.output_projection = projection()
        student, teacher = models
        run.criterion.teacher = Teacher([teacher], [find_projection(teacher) if lean else None])
        if not lean:
            run.criterion._find_projection = lambda model: None
        rng = np.random.default_rng(3)
        for _ in range(2):  # gradients accumulate
            sample = to_sample(run.words, random_batch(rng, ["hi", "ta", "bn", "hi"]), extra=1)
            sample["net_input"]["src_lengths"] = sample["net_input"]["src_tokens"].ne(run.words.pad()).sum(1)
            loss, _, logged = run.criterion(student, sample)
            loss.backward()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        results.append((loss, logged, gradients))
    (loss, logged, gradients), (plain_loss, plain_logged, expected) = results
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-5)
    assert logged.keys() == plain_logged.keys()
    for name in logged:
        assert float(logged[name]) == pytest.approx(float(plain_logged[name]), rel=1e-5, abs=1e-5), name
    assert gradients.keys() == expected.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.fixture
def task():
    return Run("word_level").task


def test_adaptive_softmax(task):
    model = transformer(task, adaptive_softmax_cutoff="5,10")
    with pytest.raises(NoProjectionError, match="adaptive softmax"):
        find_projection(model)


def test_gradients_of_an_adaptive_softmax(task):
    """They are those of the probabilities written out: of a cluster, times that of a word in it."""
    torch.manual_seed(0)
    model = transformer(task, adaptive_softmax_cutoff="5,10", adaptive_softmax_factor=2).train()
    softmax, x = model.decoder.adaptive_softmax, torch.randn(2, 3, 8)
    target, weights = torch.randint(17, (2, 3, 1)), list(model.decoder.adaptive_softmax.parameters())
    found = softmax.get_log_prob(x, None)
    head = F.log_softmax(F.linear(x, softmax.head.weight), -1)
    tails = [head[..., 5 + i : 6 + i] + F.log_softmax(tail(x), -1) for i, tail in enumerate(softmax.tail)]
    expected = torch.cat([head[..., :5], *tails], -1)
    torch.testing.assert_close(found, expected)
    pairs = zip(*(torch.autograd.grad(y.gather(-1, target).sum(), weights) for y in (found, expected)))
    for gradient, reference in pairs:
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize(
    ("owner", "function"),
    [
        (TransformerModelBase, "get_normalized_probs"),
        (TransformerDecoderBase, "get_normalized_probs"),
        (TransformerDecoderBase, "output_layer"),
        (TransformerDecoderBase, "forward"),
    ],
)
def test_anything_of_its_own_on_the_way(task, owner, function):
    model = transformer(task)
    changed = model if owner is TransformerModelBase else model.decoder

    def theirs(self, *args, **kwargs):
        return getattr(super(kind, self), function)(*args, **kwargs)

    kind = type("Theirs", (type(changed),), {function: theirs})
    changed.__class__ = kind
    with pytest.raises(NoProjectionError, match=f"Theirs has a {function} of its own"):
        find_projection(model)


def test_a_forward_without_features_only(task):
    class Theirs(TransformerModelBase):
        def forward(self, src_tokens, src_lengths, prev_output_tokens):
            return super().forward(src_tokens, src_lengths, prev_output_tokens)

    model = transformer(task)
    model.__class__ = Theirs
    with pytest.raises(NoProjectionError, match="no features_only"):
        find_projection(model)


def test_an_output_layer_of_another_kind_or_with_hooks(task):
    model = transformer(task)
    model.decoder.output_projection.register_forward_pre_hook(lambda *_: None)  # quantization noise does
    with pytest.raises(NoProjectionError, match="has hooks"):
        find_projection(model)
    for where, register in (
        ("its decoder", lambda m: m.decoder.register_forward_hook),
        ("the model", lambda m: m.register_forward_hook),
        ("its output projection", lambda m: m.decoder.output_projection.register_full_backward_hook),
    ):
        hooked = transformer(task)
        register(hooked)(lambda *_: None)
        with pytest.raises(NoProjectionError, match=f"{where} has hooks"):
            find_projection(hooked)
    model.decoder.output_projection = torch.nn.Sequential(torch.nn.Linear(8, 17))
    with pytest.raises(NoProjectionError, match="is a Sequential"):
        find_projection(model)


@pytest.mark.parametrize("path", ["decoder.output_layer", "decoder.forward", "get_normalized_probs"])
def test_a_function_that_was_put_in_the_place_of_another(task, path):
    model = transformer(task)
    owner = model.decoder if path.startswith("decoder") else model
    name = path.split(".")[-1]
    setattr(owner, name, functools.partial(getattr(owner, name)))
    with pytest.raises(NoProjectionError, match=f"has a {name} of its own"):
        find_projection(model)
    model = transformer(task)
    model.decoder.output_projection.forward = lambda x: x
    with pytest.raises(NoProjectionError, match="its output projection has a forward of its own"):
        find_projection(model)


def replaced(model):
    model.decoder.output_projection = torch.nn.Linear(8, 17)


def patched(model):
    forward = model.decoder.output_layer
    model.decoder.output_layer = lambda x: forward(x) * 2


def moved(model):
    model.decoder.output_projection.weight = torch.nn.Parameter(torch.randn(17, 8))


@pytest.mark.parametrize("change", [None, replaced, patched, moved])
@pytest.mark.parametrize("flags", [{"alpha": 0.3}, {"alpha": 0.0}])
def test_the_projection_is_that_of_the_model_that_is_there(change, flags):
    """One criterion, two models, or one that is changed between two batches: as a criterion that saw none before."""
    results = []
    for sees_another_first in (True, False):
        torch.manual_seed(0)
        run = Run("word_seq_level", **flags)
        first, teacher = transformer(run.task), transformer(run.task)
        second = transformer(run.task) if change is None else first
        run.criterion.teacher = Teacher([teacher])
        batch = random_batch(np.random.default_rng(3), ["hi", "ta"])
        sample = to_sample(run.words, batch)
        sample["net_input"]["src_lengths"] = sample["net_input"]["src_tokens"].ne(run.words.pad()).sum(1)
        if sees_another_first:
            run.criterion(first, sample)
        if change is not None:
            change(second)
        loss, _, _ = run.criterion(second, sample)
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in second.named_parameters()}))
    (loss, gradients), (expected_loss, expected) = results
    assert loss == expected_loss
    for name, gradient in expected.items():
        assert (gradient is None) == (gradients[name] is None)
        assert gradient is None or torch.equal(gradients[name], gradient)


def test_wrappers(task, tmp_path):
    """legacy_ddp and pytorch_ddp let the projection be used outside, but not if unused parameters are searched."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = transformer(task)
        group = torch.distributed.group.WORLD
        weight = model.decoder.output_projection.weight
        x = torch.zeros(1, 8)
        assert find_projection(ModuleProxyWrapper(LegacyDistributedDataParallel(model, group)))(x).weight is weight
        wrap = functools.partial(torch.nn.parallel.DistributedDataParallel, model)
        assert find_projection(ModuleProxyWrapper(wrap()))(x).weight is weight
        with pytest.raises(NoProjectionError, match="--find-unused-parameters"):
            find_projection(ModuleProxyWrapper(wrap(find_unused_parameters=True)))
    finally:
        torch.distributed.destroy_process_group()


def test_a_wrapper_that_shards_the_weights(task):
    class FullyShardedDataParallel(torch.nn.Module):
        pass

    with pytest.raises(NoProjectionError, match="FullyShardedDataParallel"):
        find_projection(FullyShardedDataParallel())


def test_the_log_says_once_which_formulation_is_used_and_why(caplog):
    run = Run("word_level")  # its models have their own get_normalized_probs
    batch = random_batch(np.random.default_rng(0), ["hi"])
    for _ in range(2):
        run.forward(batch)
    (message,) = [r.getMessage() for r in caplog.records if "plain formulation" in r.getMessage()]
    assert "the forward of GivenLogits has no features_only" in message


@pytest.mark.parametrize("of_decoder", [False, True])
def test_the_function_behind_the_probabilities(task, of_decoder):
    """fairseq's get_normalized_probs calls get_normalized_probs_scriptable, of the model and of its decoder."""
    model = transformer(task)
    changed = model.decoder if of_decoder else model

    def theirs(self, net_output, log_probs, sample=None):
        probs = super(kind, self).get_normalized_probs_scriptable(net_output, log_probs, sample)
        return probs * 2

    kind = type("Theirs", (type(changed),), {"get_normalized_probs_scriptable": theirs})
    changed.__class__ = kind
    with pytest.raises(NoProjectionError, match="Theirs has a get_normalized_probs_scriptable of its own"):
        find_projection(model)


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
                 "register_full_backward_pre_hook"]
)  # fmt: skip
def test_hooks_of_every_kind(task, register):
    model = transformer(task)
    find_projection(model)
    if not hasattr(model.decoder.output_projection, register):
        pytest.skip("torch < 2.0")
    getattr(model.decoder.output_projection, register)(lambda *_: None)
    with pytest.raises(NoProjectionError, match="its output projection has hooks"):
        find_projection(model)
