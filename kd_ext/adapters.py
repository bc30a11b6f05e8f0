"""``python -m kd_ext.adapters list|export|merge``: adapters as small files, and several of them in one checkpoint.

A file of adapters holds tensors, strings and dictionaries, and is read as such: nothing in it is run. It records
a fingerprint of the base that the adapters were trained on, and goes into no other.
"""

import argparse
import os
from typing import Any, Dict, Iterator, List, Optional, Sequence

import torch
from torch import Tensor

import kd_ext  # noqa: F401  registers the architectures, and lets fairseq's checkpoints be read
from kd_ext.errors import ConfigError, printable
from kd_ext.files import adapter_file
from kd_ext.files.adapter_file import FORMAT, setting_keys
from kd_ext.files.base_settings import deciding
from kd_ext.files.fingerprint import is_weight, model_fingerprint
from kd_ext.files.reading import explained
from kd_ext.files.safe_loading import load
from kd_ext.files.settings import check
from kd_ext.files.writing import PART, check_output, written_whole
from kd_ext.models.extension_flags import SIDES, activation_key
from kd_ext.models.saved_settings import get, model_settings
from kd_ext.modules.adapter import adapter_of
from kd_ext.parsing import Parser


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Run one command.

    Raises:
        ConfigError: where a file or an argument cannot be used
    """
    options = _parser().parse_args(arguments)
    if options.command == "list":
        for line in describe(options.checkpoint):
            print(line)
    elif options.command == "export":
        print(export(options.checkpoint, options.id, options.output, options.side))
    else:
        print(merge(options.checkpoint, options.adapters, options.output))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m kd_ext.adapters", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="the adapters of a checkpoint")
    listing.add_argument("checkpoint")
    exporting = commands.add_parser("export", help="write one adapter to a file of its own")
    exporting.add_argument("checkpoint")
    exporting.add_argument("id", help="which adapter")
    exporting.add_argument("output", help="the file to write")
    exporting.add_argument("--side", choices=SIDES, help="leave the other side's adapter of this id out")
    merging = commands.add_parser("merge", help="put adapters of one base together in one checkpoint")
    merging.add_argument("checkpoint", help="the base, or a checkpoint with adapters on it")
    merging.add_argument("adapters", nargs="+", help="files that export wrote")
    merging.add_argument("--output", required=True, help="the checkpoint to write")
    return parser


def describe(path: str) -> List[str]:
    """One line for the base, and one for each adapter of a checkpoint."""
    state = _read_checkpoint(path)
    model, settings = state["model"], model_settings(state)
    base = _base_weights(model)
    lines = [f"base {fingerprint(model)}: {sum(t.numel() for t in base.values()):,} weights"]
    for side in SIDES:
        for name in _ids(model, side):
            size = sum(t.numel() for t in _tensors(model, name, [side]).values())
            trained = ", trained" if get(settings, f"{side}_train_adapter") == name else ""
            lines.append(f"{side} {printable(name)}: {size:,} weights{trained}")
    return lines if len(lines) > 1 else lines + ["no adapters"]


def export(path: str, adapter_id: str, output: str, side: Optional[str] = None) -> str:
    """Write the adapters of one id, of one `side` or of both, to the file `output`; returns what was done.

    Raises:
        ConfigError: if the checkpoint has no such adapter; the message lists those that it has. If `output` is there,
            and is not a file of adapters
    """
    target = check_output(output, [path], adapter_file.read)
    state = _read_checkpoint(path)
    model, settings = state["model"], model_settings(state)
    sides = [s for s in SIDES if s in (side or s) and adapter_id in _ids(model, s)]
    if not sides:
        known = "; ".join(f"{s} {', '.join(_ids(model, s)) or 'none'}" for s in SIDES)
        where = f" on the {side}" if side else ""
        raise ConfigError(f"id {adapter_id}: {path} has no such adapter{where}; it has: {known}")
    file = {
        "format": FORMAT,
        "id": adapter_id,
        "base": fingerprint(model),
        "settings": {key: str(get(settings, key)) for key in setting_keys(sides)},
        "base_settings": deciding(settings),
        "tensors": {name: tensor.clone() for name, tensor in _tensors(model, adapter_id, sides).items()},
    }
    adapter_file.check_fits(path, file, model, settings)
    if not any(tensor.any() for name, tensor in file["tensors"].items() if name.endswith((".up.weight", ".up.bias"))):
        raise ConfigError(
            f"id {adapter_id}: in {path} it is as it began, and adds nothing; name a checkpoint that trained it, by "
            f"--encoder-train-adapter {adapter_id} or --decoder-train-adapter {adapter_id}"
        )
    _write(file, target)
    return (
        f"wrote {output}: adapter {adapter_id} of the {' and the '.join(sides)}, {os.path.getsize(output):,} bytes "
        f"({os.path.getsize(output) / _model_bytes(model):.1%} of the model)"
    )


def merge(path: str, adapters: Sequence[str], output: str) -> str:
    """Write the checkpoint `path` with adapters added as `output`; returns what was done.

    Translating with one of them gives what it gave in the checkpoint that it was exported from, to the last bit where
    that was trained in the precision of `path`.

    Raises:
        ConfigError: if a file is no adapter, is of another base, or contradicts what is there. If `output` is there,
            and was not written by this, or is one of those that are read
    """
    target = check_output(output, [path, *adapters], _check_is_merged)
    state = _read_checkpoint(path)
    model, settings = dict(state["model"]), model_settings(state)
    _use_our_architecture(path, settings)
    base = fingerprint(model)
    for file_name in adapters:
        file = adapter_file.read(file_name)
        if file["base"] != base and file["base"] not in _rounded_fingerprints(model):
            raise ConfigError(
                f"{file_name}: its adapter {file['id']} is of base {file['base']}, and {path} is of base {base}; "
                "name the checkpoint that it was trained on"
            )
        adapter_file.check_fits(file_name, file, model, settings)
        adapter_file.check_base_settings(file_name, file, path, deciding(settings))
        _take_settings(file_name, file, model, settings)
        for name, tensor in file["tensors"].items():
            there = model.get(name, tensor)
            if there.dtype != tensor.dtype or not torch.equal(there, tensor):
                raise ConfigError(
                    f"{file_name}: another adapter {file['id']} is in {path} already; merge into one without it"
                )
            model[name] = tensor
    for side in SIDES:
        ids = _ids(model, side)
        _set(settings, f"{side}_add_adapters", bool(ids))
        _set(settings, f"{side}_adapter_ids", ",".join(ids) or None)
        # none of them is the one to use unless --activate-*-adapter says so
        _set(settings, f"{side}_train_adapter", None)
        _set(settings, activation_key(side), None)
    # the optimizer's state is of the parameters that the checkpoint trained
    merged = {key: value for key, value in state.items() if key != "last_optimizer_state"}
    _write({**merged, "model": model}, target)
    listed = "; ".join(f"{side} {', '.join(_ids(model, side)) or 'none'}" for side in SIDES)
    return f"wrote {output}: {listed}; choose by --activate-encoder-adapter and --activate-decoder-adapter"


def fingerprint(model: Dict[str, Tensor]) -> str:
    """Of all weights of a model but its adapters'; the same for upstream's checkpoint."""
    return model_fingerprint({name: tensor for name, tensor in model.items() if adapter_of(name) is None})


def _rounded_fingerprints(model: Dict[str, Tensor]) -> Iterator[str]:
    """Of a base as runs with --fp16 and --bf16 save it: rounded, in float32."""
    for dtype in (torch.float16, torch.bfloat16):
        yield fingerprint({name: t.to(dtype).float() if t.is_floating_point() else t for name, t in model.items()})


def _base_weights(model: Dict[str, Tensor]) -> Dict[str, Tensor]:
    return {name: tensor for name, tensor in model.items() if adapter_of(name) is None and is_weight(name)}


def _ids(model: Dict[str, Tensor], side: str) -> List[str]:
    owners = filter(None, map(adapter_of, model))
    return list(dict.fromkeys(adapter_id for owner_side, adapter_id in owners if owner_side == side))


def _tensors(model: Dict[str, Tensor], adapter_id: str, sides: Sequence[str]) -> Dict[str, Tensor]:
    owners = [(side, adapter_id) for side in sides]
    return {name: tensor for name, tensor in model.items() if adapter_of(name) in owners}


def _model_bytes(model: Dict[str, Tensor]) -> int:
    """Tied weights, which are one storage in the file, once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in model.values()}.values())


def _take_settings(file_name: str, file: Dict[str, Any], model: Dict[str, Tensor], settings: Any) -> None:
    """Take the adapters' settings over, or see that they are those of the adapters that are there."""
    for key, text in file["settings"].items():
        side = next((side for side in SIDES if key.startswith(side)), None)
        others = [other for s in ([side] if side else SIDES) for other in _ids(model, s)]
        if others and str(get(settings, key)) != text:
            raise ConfigError(
                f"{file_name}: adapter {file['id']} has {key} {text}, and {', '.join(others)} "
                f"{get(settings, key)}; all adapters of a checkpoint must have the same"
            )
        _set(settings, key, _parsed(key, text))


def _parsed(key: str, text: str) -> Any:
    if key.endswith("_factor"):
        return int(text)
    return text == "True" if key.endswith("_gating") else text


def _use_our_architecture(path: str, settings: Any) -> None:
    """The settings of a checkpoint of upstream's transformer say its size; the class must know adapters."""
    from fairseq.models import ARCH_MODEL_REGISTRY
    from fairseq.models.transformer import TransformerModel

    from kd_ext.models.transformer_ext import TransformerExtModel

    name = get(settings, "arch") or get(settings, "_name")
    model_class = ARCH_MODEL_REGISTRY.get(name) if isinstance(name, str) else None
    if model_class is TransformerModel:
        _set(settings, "arch", "transformer_ext")
        _set(settings, "_name", "transformer_ext")
    elif model_class is not TransformerExtModel:
        raise ConfigError(f"{path}: architecture {name} cannot have adapters; use one of upstream's transformer")


def _read_checkpoint(path: str) -> Dict[str, Any]:
    """A checkpoint as fairseq wrote it."""
    try:
        with explained(path, "checkpoint of fairseq"):
            state = load(path)
            check(path, state)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name a checkpoint that fairseq-train wrote") from None
    if not isinstance(state, dict) or not _has_model(state):
        raise ConfigError(f"{path}: not a checkpoint of fairseq: it has no settings or no model")
    return state


def _check_is_merged(path: str) -> None:
    """A run's checkpoint trains an adapter or has none, or has an optimizer's state: none of it can be made again."""
    state = _read_checkpoint(path)
    has_adapters = any(_ids(state["model"], side) for side in SIDES)
    is_trained = any(get(model_settings(state), f"{side}_train_adapter") for side in SIDES)
    if not has_adapters or is_trained or state.get("last_optimizer_state"):
        raise ConfigError(f"{path}: a checkpoint of a run")


def _has_model(state: Dict[str, Any]) -> bool:
    weights, cfg = state.get("model"), state.get("cfg")
    if not isinstance(weights, dict) or (cfg and not (isinstance(cfg, dict) and "model" in cfg)):
        return False
    if not isinstance(model_settings(state), (dict, argparse.Namespace)):
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items())


def _set(settings: Any, key: str, value: Any) -> None:
    if isinstance(settings, dict):
        settings[key] = value
    else:
        setattr(settings, key, value)


def _write(content: Dict[str, Any], path: str) -> None:
    with written_whole(path, f"{path}.{os.getpid()}{PART}") as file:
        torch.save(content, file)


if __name__ == "__main__":
    main()
