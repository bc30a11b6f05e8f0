"""python -m kd_ext.adapters: list, export and merge."""

import copy
import errno
import os
import pickle
import shutil
import stat
from argparse import Namespace
from pathlib import Path

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


@pytest.mark.parametrize("earlier", [False, True])
def test_a_base_of_upstreams_class_that_shares_all_embeddings(tmp_path, earlier):
    """It notes in its settings that the decoder's tables are one, which this project's class does not."""
    tied = {"share_all_embeddings": True, "share_decoder_input_output_embed": False}
    args = settings("transformer", **tied)
    base = build_from(args, seed=1)
    assert args.share_decoder_input_output_embed
    over = settings(load_checkpoint_liberally=True, **tied, **adapters(ids="hi", train="hi"))
    model = build_from(over, seed=2)
    model.load_state_dict(base.state_dict())
    path = save(tmp_path / "hi.pt", over, randomize(model, 2))
    tool.export(path, "hi", str(tmp_path / "hi.adapter"))
    if earlier:  # what files of earlier releases have of it
        file = read(tmp_path / "hi.adapter")
        file["base_settings"]["share_decoder_input_output_embed"] = "True"
        torch.save(file, tmp_path / "hi.adapter")
    tool.merge(save(tmp_path / "base.pt", args, base), [str(tmp_path / "hi.adapter")], str(tmp_path / "merged.pt"))
    src, prev = batch()
    expected = logits(model.eval().requires_grad_(True), src, prev)
    assert torch.equal(logits(load(str(tmp_path / "merged.pt"), "hi"), src, prev), expected)


def test_an_adapter_that_was_never_trained_is_not_exported(tmp_path):
    args = settings(**adapters(ids="hi,ta", train="hi"))
    path = save(tmp_path / "hi.pt", args, build_from(args))
    with pytest.raises(ConfigError, match=r"id ta: in .* as it began, and adds nothing; name a checkpoint"):
        tool.main(["export", path, "ta", str(tmp_path / "ta.adapter")])
    assert os.listdir(tmp_path) == ["hi.pt"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            ["export", "x.pt"],
            "the following arguments are required: id, output; python -m kd_ext.adapters export --help",
        ),
        (["export", "x.pt", "hi", "out", "--side", "both"], "--side: invalid choice: 'both' "),
        (["lst", "x.pt"], "command: invalid choice: 'lst' "),
        (
            ["list", "x.pt", "--all"],
            "unrecognized arguments: --all; python -m kd_ext.adapters --help lists what there is",
        ),
    ],
)
def test_arguments_that_cannot_be_used(typed, said):
    with pytest.raises(ConfigError) as error:
        tool.main(typed)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_names_for_a_folder_are_none_for_a_file(tmp_path, base, trained):
    for typed in (["export", trained["hi"][0], "hi"], ["merge", base[0], str(tmp_path), "--output"]):
        with pytest.raises(ConfigError, match="new/: a folder's name; name the file to write"):
            tool.main([*typed, f"{tmp_path}/new/"])


def test_an_id_is_shown_on_one_line(tmp_path):
    args = settings(**adapters(ids="hi", train="hi"))
    weights = {n.replace(".hi.", ".x\n\x1b[31mhi."): t for n, t in build_from(args).state_dict().items()}
    torch.save({"args": None, "cfg": {"model": args, "task": {}}, "model": weights}, tmp_path / "x.pt")
    lines = tool.describe(str(tmp_path / "x.pt"))
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)


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
    path = save(tmp_path / "model.pt", args, randomize(model, 1))
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
        tool.export(save(tmp_path / "bn.pt", args, randomize(model, 1)), "bn", str(tmp_path / "bn"))
        with pytest.raises(ConfigError, match=message):
            tool.merge(base[0], [str(tmp_path / "hi"), str(tmp_path / "bn")], str(tmp_path / "out.pt"))
    tool.export(trained["ta"][0], "hi", str(tmp_path / "other hi"))
    with pytest.raises(ConfigError, match=r"another adapter hi is in .* already"):
        tool.merge(base[0], [str(tmp_path / "hi"), str(tmp_path / "other hi")], str(tmp_path / "out.pt"))


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


def mutated(path, file, **changes):
    torch.save({**file, **changes}, path)
    return str(path)


@pytest.fixture
def hi(tmp_path, trained):
    """A file of the adapter ``hi``: its path and its content."""
    tool.export(trained["hi"][0], "hi", str(tmp_path / "hi.adapter"))
    return str(tmp_path / "hi.adapter"), read(tmp_path / "hi.adapter")


NAME = "encoder.layers.0.adapters.hi.up.weight"
CODE = "__import__('pathlib').Path('ran').write_text('x') and None"
# how the entries of a file are changed, and what is said
ENTRIES = {
    "foreign": (lambda f: {"foreign": 1}, "'foreign' is in it"),
    "id": (lambda f: {"id": "h.i"}, "its id 'h.i' is no id"),
    "no id": (lambda f: {"id": ["hi"]}, "its id is a list"),
    "another's id": (lambda f: {"id": "ta"}, "is no tensor of an adapter ta for this base"),
    "base": (lambda f: {"base": "x" * 16}, "is no fingerprint"),
    "settings": (lambda f: {"settings": []}, "its settings is a list"),
}
SETTINGS = {
    "foreign": ({"encoder_xformers_att_config": CODE}, "the setting 'encoder_xformers_att_config' is in it"),
    "adaptive": ({"adaptive_softmax_cutoff": CODE}, "the setting 'adaptive_softmax_cutoff' is in it"),
    "layers": ({"encoder_layers": "3"}, "the setting 'encoder_layers' is in it"),
    "type": ({"encoder_adapter_reduction_factor": 2}, None),
    "code": ({"encoder_adapter_reduction_factor": CODE}, "its setting encoder_adapter_reduction_factor is"),
    "zero": ({"decoder_adapter_reduction_factor": "0"}, "its setting decoder_adapter_reduction_factor is '0'"),
    "wide": ({"decoder_adapter_reduction_factor": "17"}, "decoder_adapter_reduction_factor is 17, and the base is 16"),
    "other": ({"decoder_adapter_reduction_factor": "4"}, r"has the shape \(8, 16\), and in an adapter .* \(4, 16\)"),
    "gating": ({"encoder_adapter_use_gating": "yes"}, "its setting encoder_adapter_use_gating is 'yes'"),
    "ungated": ({"encoder_adapter_use_gating": "False"}, "gate.* is no tensor of an adapter hi for this base"),
    "function": ({"adapter_activation_fn": "exec"}, "its setting adapter_activation_fn is 'exec'"),
    "missing": ({"adapter_activation_fn": None}, "its setting adapter_activation_fn is"),
}
TENSORS = {
    "foreign": (
        lambda t: {**t, "decoder.output_projection.bias": torch.zeros(30)},
        "'decoder.output_projection.bias' is",
    ),
    "base's": (
        lambda t: {**t, "encoder.layers.0.fc1.weight": torch.zeros(24, 16)},
        "'encoder.layers.0.fc1.weight' is no",
    ),
    "none": (lambda t: {}, "is missing, which an adapter for this base has"),
    "half": (lambda t: dict(list(t.items())[::2]), "is missing"),
    "one side": (lambda t: {name: x for name, x in t.items() if name[0] == "e"}, "decoder.* is missing"),
    "deeper": (lambda t: {**t, NAME.replace(".0.", ".2."): t[NAME]}, r"'encoder.layers.2.*' is no tensor"),
    "shape": (lambda t: {**t, NAME: t[NAME][:-1]}, r"has the shape \(15, 8\)"),
    "huge": (lambda t: {**t, NAME: torch.zeros(1).expand(2**40)}, "has the shape"),
    "integers": (lambda t: {**t, NAME: t[NAME].long()}, "is of torch.int64, which is not floating"),
    "complex": (lambda t: {**t, NAME: t[NAME].to(torch.complex64)}, "not floating"),
    "nan": (lambda t: {**t, NAME: t[NAME] * float("nan")}, "has values that are not finite"),
    "inf": (lambda t: {**t, NAME: t[NAME] + float("inf")}, "has values that are not finite"),
    "sparse": (lambda t: {**t, NAME: t[NAME].to_sparse()}, "is no plain tensor"),
    "list": (lambda t: {**t, NAME: t[NAME].tolist()}, "is no plain tensor"),
    "number": (lambda t: {**t, 7: t[NAME]}, "'7' is no tensor"),
}
CASES = {f"entry {name}": case for name, case in ENTRIES.items()}
CASES.update(
    {f"setting {n}": (lambda f, c=c: {"settings": {**f["settings"], **c}}, m) for n, (c, m) in SETTINGS.items()}
)
CASES.update({f"tensors {n}": (lambda f, c=c: {"tensors": c(f["tensors"])}, m) for n, (c, m) in TENSORS.items()})


@pytest.mark.parametrize("name", CASES)
def test_what_export_did_not_write(tmp_path, base, hi, name):
    """It is refused, in one line, before anything is written."""
    change, message = CASES[name]
    path = mutated(tmp_path / "odd.adapter", hi[1], **change(hi[1]))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ConfigError, match=message) as raised:
        tool.merge(base[0], [hi[0], path] if name.startswith("entry f") else [path], str(tmp_path / "out.pt"))
    assert str(raised.value).startswith(f"{path}: refused, ")
    assert "\n" not in str(raised.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_another_number_of_depths(tmp_path):
    """Of a stack the base's weights are the same for any number; the adapters are not."""
    stacked = {}
    for depths in (2, 3):
        flags = {f"{side}_recurrent_stacking": depths for side in SIDES}
        args = settings(**flags)
        base = build_from(args, seed=1)
        stacked[f"base {depths}"] = save(tmp_path / f"base{depths}.pt", args, base)
        args = settings(load_checkpoint_liberally=True, **flags, **adapters(ids="hi", train="hi"))
        model = build_from(args)
        model.load_state_dict(base.state_dict())
        stacked[depths] = save(tmp_path / f"{depths}.pt", args, randomize(model))
    tool.export(stacked[2], "hi", str(tmp_path / "hi"))
    with pytest.raises(ConfigError, match=r"is missing, which an adapter for this base has|other settings"):
        tool.merge(stacked["base 3"], [str(tmp_path / "hi")], str(tmp_path / "out.pt"))
    tool.export(stacked[3], "hi", str(tmp_path / "hi3"))
    with pytest.raises(ConfigError, match=r"is no tensor of an adapter hi for this base|other settings"):
        tool.merge(stacked["base 2"], [str(tmp_path / "hi3")], str(tmp_path / "out.pt"))
    assert not (tmp_path / "out.pt").exists()
    tool.merge(stacked["base 2"], [str(tmp_path / "hi")], str(tmp_path / "out.pt"))


def outputs(folder, path):
    """Spellings of one file."""
    (folder / "link").symlink_to(path)
    os.link(path, folder / "hard")
    relative = os.path.relpath(path)
    dotted = f"{os.path.dirname(path)}/./{os.path.basename(path)}"
    return [str(path), dotted, relative, str(folder / "link"), str(folder / "hard")]


def test_no_input_is_replaced(tmp_path, base, trained, hi):
    """However it is spelled."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    own, content = trained["hi"][0], {}
    for path in (own, base[0], hi[0]):
        content[path] = Path(path).read_bytes()
    for output in outputs(tmp_path / "a", own):
        with pytest.raises(ConfigError, match=f"^{output}: this command reads it, and would replace it"):
            tool.main(["export", own, "hi", output])
    for output in outputs(tmp_path / "b", base[0]) + [hi[0]]:
        with pytest.raises(ConfigError, match=f"^{output}: this command reads it, and would replace it"):
            tool.main(["merge", base[0], hi[0], "--output", output])
    # not even for a moment, under the name of what is not written yet
    os.rename(own, tmp_path / "own.tmp")
    tool.main(["export", str(tmp_path / "own.tmp"), "hi", str(tmp_path / "own")])
    assert (tmp_path / "own.tmp").read_bytes() == content[own]
    assert all(Path(path).read_bytes() == content[path] for path in (base[0], hi[0]))


def test_nothing_of_another_kind_is_replaced(tmp_path, base, trained, hi):
    own, pipe, notes = trained["hi"][0], tmp_path / "pipe", tmp_path / "notes"
    os.mkfifo(pipe)
    notes.write_text("notes")
    (tmp_path / "link").symlink_to(notes)
    for output in (os.devnull, str(pipe), str(tmp_path)):
        for command in (["export", own, "hi", output], ["merge", base[0], hi[0], "--output", output]):
            with pytest.raises(ConfigError, match=f"^{output}: is there, and no regular file; name another file"):
                tool.main(command)
    for output in (str(notes), str(tmp_path / "link"), base[0]):
        with pytest.raises(ConfigError, match=f"^{output}: is there, and not what this command writes; name another"):
            tool.main(["export", own, "hi", output])
    tool.main(["merge", base[0], hi[0], "--output", str(tmp_path / "merged.pt")])
    going_on = {**read(tmp_path / "merged.pt"), "last_optimizer_state": {"state": {}}}
    torch.save(going_on, tmp_path / "going_on.pt")  # of a run that trains a merged checkpoint's base further
    shutil.copy(base[0], tmp_path / "base_of_others.pt")
    of_runs = [trained["ta"][0], str(tmp_path / "going_on.pt"), str(tmp_path / "base_of_others.pt")]
    content = [Path(path).read_bytes() for path in of_runs]
    for output in (str(notes), str(tmp_path / "link"), *of_runs):
        with pytest.raises(ConfigError, match=f"^{output}: is there, and not what this command writes; name another"):
            tool.main(["merge", base[0], hi[0], "--output", output])
    assert [Path(path).read_bytes() for path in of_runs] == content
    assert notes.read_text() == "notes"
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_an_older_output_is_replaced_and_a_link_is_written_through(tmp_path, base, trained, hi):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere" / "file")
    for _ in range(2):
        tool.main(["export", trained["hi"][0], "hi", str(link)])
        assert link.is_symlink()
        assert read(tmp_path / "elsewhere" / "file")["id"] == "hi"
        tool.main(["merge", base[0], hi[0], "--output", str(tmp_path / "merged.pt")])
        assert "hi" in read(tmp_path / "merged.pt")["cfg"]["model"].encoder_adapter_ids
    assert os.listdir(tmp_path / "elsewhere") == ["file"]


SAME = {"dropout": 0.3, "encoder_layerdrop": 0.1, "max_source_positions": 77, "checkpoint_activations": True}
OTHER = {"encoder_attention_heads": 4, "activation_fn": "gelu", "no_scale_embedding": True, "decoder_learned_pos": True}
OTHER = {**OTHER, "decoder_normalize_before": True, "no_token_positional_embeddings": True, "encoder_learned_pos": True}


@pytest.mark.parametrize("key", [*SAME, *OTHER])
def test_the_settings_of_the_base(tmp_path, base, hi, key):
    """The same weights under other settings are another base."""
    state = read(base[0])
    setattr(state["cfg"]["model"], key, {**SAME, **OTHER}[key])
    torch.save(state, tmp_path / "other.pt")
    if key in SAME:
        tool.merge(str(tmp_path / "other.pt"), [hi[0]], str(tmp_path / "out.pt"))
        return
    with pytest.raises(
        ConfigError, match=f"was trained on a base with {key} .*, and .*other.pt has .*: the same weigh"
    ):
        tool.merge(str(tmp_path / "other.pt"), [hi[0]], str(tmp_path / "out.pt"))


def test_a_file_of_an_earlier_release(tmp_path, base, hi, caplog):
    old = {key: value for key, value in hi[1].items() if key != "base_settings"}
    torch.save(old, tmp_path / "old")
    tool.merge(base[0], [str(tmp_path / "old")], str(tmp_path / "out.pt"))
    assert f"{tmp_path}/old: an earlier release wrote it, without its base's settings" in caplog.text
