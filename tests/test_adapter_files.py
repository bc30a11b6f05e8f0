"""python -m kd_ext.adapters: list, export and merge."""

import copy
import errno
import pickle
from argparse import Namespace

import pytest
import torch
from tiny_models import SIDES, adapters, batch, build_from, dictionary, logits, randomize, settings

from kd_ext import adapters as tool
from kd_ext.errors import ConfigError
from kd_ext.files.safe_loading import load as read

NORM = {"encoder_normalize_before": True}


def save(path, args, model):
    """As fairseq's trainer does."""
    state = {"args": None, "cfg": {"model": args, "task": {"_name": "translation"}}, "model": model.state_dict()}
    extra = {"train_iterator": {"epoch": 1}}
    torch.save({**state, "optimizer_history": [], "extra_state": extra, "last_optimizer_state": {"big": 1}}, path)
    return str(path)


@pytest.fixture
def base(tmp_path):
    """A checkpoint of upstream's transformer."""
    args = settings("transformer", **NORM)
    model = build_from(args, seed=1)
    return save(tmp_path / "base.pt", args, model), model


@pytest.fixture
def trained(tmp_path, base):
    """Checkpoints of two adapters that were trained apart on the base."""
    made = {}
    for seed, name in enumerate(("hi", "ta"), start=5):
        args = settings(load_checkpoint_liberally=True, **NORM, **adapters(ids="hi,ta,bn", train=name, gated=True))
        model = build_from(args, seed=seed)
        model.load_state_dict(base[1].state_dict())
        made[name] = save(tmp_path / f"{name}.pt", args, randomize(model, seed)), model.eval().requires_grad_(True)
    return made


def load(path, active):
    """As fairseq-generate does with --activate-*-adapter."""
    state = read(path)
    args = state["cfg"]["model"]
    args.activate_encoder_adapter = args.activate_decoder_adapter = active
    model = build_from(args, seed=99)
    model.load_state_dict(state["model"], strict=True)
    return model.eval().requires_grad_(True)


def test_merged_adapters_compute_exactly_what_they_did_apart(tmp_path, base, trained):
    files = [str(tmp_path / f"{name}.adapter") for name in trained]
    for (name, (path, _)), file in zip(trained.items(), files):
        tool.main(["export", path, name, file])
    merged = str(tmp_path / "merged.pt")
    tool.main(["merge", base[0], *files, "--output", merged])
    src, prev = batch()
    for name, (_, model) in trained.items():
        assert torch.equal(logits(load(merged, name), src, prev), logits(model, src, prev))
    assert torch.equal(logits(load(merged, "none"), src, prev), logits(base[1].eval(), src, prev))
    assert torch.equal(logits(load(merged, None), src, prev), logits(base[1], src, prev))
    with pytest.raises(ConfigError, match="bn: unknown; the encoder has hi, ta"):
        load(merged, "bn")
    state = read(merged)
    assert "last_optimizer_state" not in state
    assert state["extra_state"] == {"train_iterator": {"epoch": 1}}


def test_merging_in_two_steps_is_merging_in_one(tmp_path, base, trained):
    for name, (path, _) in trained.items():
        tool.export(path, name, str(tmp_path / name))
    tool.merge(base[0], [str(tmp_path / "hi"), str(tmp_path / "ta")], str(tmp_path / "one.pt"))
    tool.merge(base[0], [str(tmp_path / "hi")], str(tmp_path / "first.pt"))
    tool.merge(str(tmp_path / "first.pt"), [str(tmp_path / "ta")], str(tmp_path / "two.pt"))
    one, two = read(tmp_path / "one.pt"), read(tmp_path / "two.pt")
    assert vars(one["cfg"]["model"]) == vars(two["cfg"]["model"])
    assert one["model"].keys() == two["model"].keys()
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"] if "_float" not in name)


def test_a_file_holds_one_adapter_and_no_code(tmp_path, trained):
    path, model = trained["hi"]
    file = tmp_path / "hi.adapter"
    tool.export(path, "hi", str(file))
    content = read(file)  # torch's safe loader
    expected = {name: t for name, t in model.state_dict().items() if ".adapters.hi." in name}
    assert content["tensors"].keys() == expected.keys()
    assert all(torch.equal(content["tensors"][name], t) for name, t in expected.items())
    assert content["id"] == "hi"
    assert {type(v) for v in content.values()} == {str, dict}
    assert {type(v) for v in content["settings"].values()} == {str}
    tool.export(path, "hi", str(file), side="decoder")
    assert {name.split(".")[0] for name in read(file)["tensors"]} == {"decoder"}


def test_a_file_is_a_few_percent_of_the_model(tmp_path):
    sizes = dict(
        layers=6, encoder_embed_dim=128, decoder_embed_dim=128, encoder_ffn_embed_dim=512, decoder_ffn_embed_dim=512
    )
    args = settings(**{**sizes, **adapters(ids="as,bn,gu,hi,kn,ml,mr,or,pa,ta,te", factor=8)})
    model = build_from(args, words=dictionary(4000))
    path = save(tmp_path / "model.pt", args, model)
    tool.export(path, "hi", str(tmp_path / "hi"))
    weights = 12 * (2 * 128 + 128 * 16 + 16 + 16 * 128 + 128)
    assert (tmp_path / "hi").stat().st_size < 4 * weights + 400 * 12 * 6
    assert (tmp_path / "hi").stat().st_size < 0.05 * (tmp_path / "model.pt").stat().st_size


def test_list(capsys, base, trained):
    tool.main(["list", trained["hi"][0]])
    lines = capsys.readouterr().out.splitlines()
    one = 2 * (2 * 16 + 16 * 8 + 8 + 8 * 16 + 16 + 17)
    assert lines[1:] == [
        f"{side} {name}: {one:,} weights{', trained' if name == 'hi' else ''}"
        for side in SIDES
        for name in ("hi", "ta", "bn")
    ]
    tool.main(["list", base[0]])
    plain = capsys.readouterr().out.splitlines()
    assert plain[0] == lines[0]  # one base, with adapters on it or without, with dead parameters or without
    assert plain[1:] == ["no adapters"]


def test_another_base_is_refused(tmp_path, trained):
    args = settings("transformer", **NORM)
    model = build_from(args, seed=1)
    with torch.no_grad():
        model.decoder.layers[1].fc2.bias[0] += 1e-6
    other = save(tmp_path / "other.pt", args, model)
    tool.export(trained["hi"][0], "hi", str(tmp_path / "hi"))
    with pytest.raises(ConfigError, match=r"its adapter hi is of base [0-9a-f]{16}, and .*other.pt is of base"):
        tool.merge(other, [str(tmp_path / "hi")], str(tmp_path / "out.pt"))
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_of_a_run_in_half_precision_go_into_their_float32_base(tmp_path, base, trained, dtype):
    """Such a run saves its base rounded, in float32."""
    args, (_, model) = read(trained["hi"][0])["cfg"]["model"], trained["hi"]
    rounded = save(tmp_path / "rounded.pt", args, copy.deepcopy(model).to(dtype).float())
    once, twice = str(tmp_path / "once.pt"), str(tmp_path / "twice.pt")
    tool.export(rounded, "hi", str(tmp_path / "hi"))
    tool.merge(base[0], [str(tmp_path / "hi")], once)
    tool.export(once, "hi", str(tmp_path / "again"))
    tool.merge(base[0], [str(tmp_path / "again")], twice)
    src, prev = batch()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters.hi." in name:
                parameter.copy_(parameter.to(dtype))
    for merged in (once, twice):
        assert torch.equal(logits(load(merged, "hi"), src, prev), logits(model, src, prev))
        assert torch.equal(logits(load(merged, "none"), src, prev), logits(base[1].eval(), src, prev))

    other = build_from(settings("transformer", **NORM), seed=2)
    with pytest.raises(ConfigError, match="its adapter hi is of base"):
        tool.merge(save(tmp_path / "other.pt", args, other), [str(tmp_path / "hi")], str(tmp_path / "out.pt"))


def test_contradictions_are_refused(tmp_path, base, trained):
    tool.export(trained["hi"][0], "hi", str(tmp_path / "hi"))
    for change, message in (({"factor": 4}, "adapter_reduction_factor 4"), ({"gated": False}, "use_gating False")):
        flags = {"ids": "bn", "train": "bn", "gated": True, **change}
        args = settings(load_checkpoint_liberally=True, **NORM, **adapters(**flags))
        model = build_from(args)
        model.load_state_dict(base[1].state_dict())
        tool.export(save(tmp_path / "bn.pt", args, model), "bn", str(tmp_path / "bn"))
        with pytest.raises(ConfigError, match=message):
            tool.merge(base[0], [str(tmp_path / "hi"), str(tmp_path / "bn")], str(tmp_path / "out.pt"))
    tool.export(trained["ta"][0], "hi", str(tmp_path / "untrained hi"))
    with pytest.raises(ConfigError, match=r"another adapter hi is in .* already"):
        tool.merge(base[0], [str(tmp_path / "hi"), str(tmp_path / "untrained hi")], str(tmp_path / "out.pt"))


def test_what_is_not_there(tmp_path, base, trained):
    path, out = trained["hi"][0], str(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"id xx: .* it has: encoder hi, ta, bn; decoder hi, ta, bn"):
        tool.export(path, "xx", out)
    with pytest.raises(ConfigError, match="it has: encoder none; decoder none"):
        tool.export(base[0], "hi", out)
    with pytest.raises(ConfigError, match=r"nowhere\.pt: no such file"):
        tool.export("nowhere.pt", "hi", out)
    with pytest.raises(ConfigError, match="no folder"):
        tool.export(path, "hi", str(tmp_path / "missing" / "hi"))
    with pytest.raises(ConfigError, match="not a file of adapters"):
        tool.merge(base[0], [path], out)
    (tmp_path / "text").write_text("not a checkpoint")
    with pytest.raises(ConfigError, match="not a checkpoint of fairseq"):
        tool.describe(str(tmp_path / "text"))
    lstm = save(tmp_path / "lstm.pt", Namespace(arch="lstm", _name="lstm"), base[1])
    with pytest.raises(ConfigError, match="architecture lstm cannot have adapters"):
        tool.merge(lstm, [], out)


class Harmful:
    def __reduce__(self):
        return (print, ("run!",))


def test_a_file_with_code_is_refused(tmp_path, base, capsys):
    torch.save({"format": tool.FORMAT, "tensors": Harmful()}, tmp_path / "harmful")
    with pytest.raises(ConfigError, match=r"refused, it refers to .*print, which no file of adapters does"):
        tool.merge(base[0], [str(tmp_path / "harmful")], str(tmp_path / "out.pt"))
    assert "run!" not in capsys.readouterr().out
    assert isinstance(pickle.loads(pickle.dumps(Harmful())), type(None))  # it would have run
    assert "run!" in capsys.readouterr().out


def test_a_failed_write_leaves_what_was_there(tmp_path, trained, monkeypatch):
    file = tmp_path / "hi"
    tool.export(trained["hi"][0], "hi", str(file))
    before = file.read_bytes()

    def full_disk(content, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(ConfigError, match=f"^{file}: cannot be written: no space left$"):
        tool.export(trained["ta"][0], "ta", str(file))
    assert file.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"base.pt", "hi.pt", "ta.pt", "hi"}
