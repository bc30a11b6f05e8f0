"""Mutates settings of checkpoints and files of adapters: ``python tests/fuzz_settings.py --trials 5000``.

A mutated checkpoint is read as fairseq-generate reads one; a mutated file of adapters is merged, and what was merged is
read. Each ends in one line, or in a model; nothing of a file has run, and nothing hangs.
"""

import argparse
import collections
import contextlib
import copy
import logging
import os
import random
import signal
import sys
import tempfile
import traceback
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import torch
from fairseq import checkpoint_utils
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from tiny_models import adapters, build_from, dictionary, randomize, settings

from kd_ext import adapters as tool
from kd_ext.errors import ConfigError
from kd_ext.files.fingerprint import is_weight
from kd_ext.files.safe_loading import load

SECONDS = 30  # of a CPU that a trial may take, and four times that by the clock: others may use the machine
WITNESS = "ran"
CODE = [
    "__import__('pathlib').Path({0!r}).write_text('x') and None",
    "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'][0](['touch', {0!r}])",
    "open({0!r}, 'w')",
    "exec(\"open({0!r}, 'w')\")",
    "(lambda: open({0!r}, 'w'))()",
    "[open({0!r}, 'w') for _ in [1]]",
    "f\"{{open({0!r}, 'w')}}\"",
    "[(512, 3)] * 20 + [open({0!r}, 'w')]",
    "{{'name': open({0!r}, 'w')}}",
    "1 if open({0!r}, 'w') else 2",
    "print(open({0!r}, 'w'))\n",
    "__builtins__['open']({0!r}, 'w')",
    "sys.modules['os'].system('touch {0}')",
]
TEXTS = ["", " ", "None", "True", "[", "]", "1" * 5000, "9**9**9", "'a' * 10**10", "[[0] * 10**4] * 10**4", "(" * 9999]
TEXTS += ["-" * 9999 + "1", "${env:HOME}", "${oc.env:HOME}", "${model.dropout}", "${cfg}", "${.}", "${a}${b}", "???"]
TEXTS += [
    "../../../etc/passwd",
    "/dev/zero",
    "\0",
    "\ud800",
    "a\nb",
    "{0}",
    "%s",
    "é" * 300,
    "float('nan')",
    "lambda: 1",
]
TEXTS += [
    "transformer",
    "transformer_ext",
    "lstm",
    "relu",
    "gelu",
    "1e400",
    "0x10",
    "1_000",
    "[(512, 3)] * 20",
    "1,2,3",
]
NUMBERS = [0, 1, -1, 2, 3, 7, 10**6, 2**31, 2**63, 10**30, 0.0, -0.0, 0.5, 1.5, -1.0, float("nan"), float("inf"), True]


def anything(rng: random.Random, witness: str, depth: int = 0) -> Any:
    """A value that no setting should have, or that one could."""
    kind = rng.randrange(10)
    if kind < 2:
        return rng.choice(CODE).format(witness)
    if kind < 4:
        return rng.choice(TEXTS)
    if kind < 6:
        return rng.choice(NUMBERS)
    if kind == 6:
        return rng.choice([None, False, b"bytes", b"open('x')", 1j, torch.zeros(2), torch.float16, torch.Size([2])])
    if depth > 3:
        return []
    inside = [anything(rng, witness, depth + 1) for _ in range(rng.randrange(4))]
    names = [rng.choice(["a", "_name", "__class__", "data", "arch", "task", "${env:HOME}"]) for _ in inside]
    as_keys = dict(zip(names, inside))
    return rng.choice([inside, tuple(inside), as_keys, _namespace(as_keys), nested(rng.choice([40, 60, 3000]))])


def _namespace(entries: Dict[str, Any]) -> Namespace:
    """With names, too, that no attribute can be given, but a file can have."""
    made = Namespace()
    vars(made).update(entries)
    return made


def nested(depth: int) -> Any:
    """Written by hand: pickle itself follows things so deep by recursion."""
    return Nested(depth)


class Nested:
    """A list in a list in a list, once it was written and read."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def __deepcopy__(self, memo: Any) -> "Nested":
        return self


def write(content: Any, path: Path) -> None:
    """As torch does, with what is nested put in without recursion."""
    import pickle
    import zipfile

    torch.save(_without(content), path)
    deep = list(_nested(content))
    if deep:
        with zipfile.ZipFile(path) as archive:
            parts = {part: archive.read(part) for part in archive.namelist()}
        for i, depth in enumerate(deep):
            mark = pickle.BINUNICODE + len(_mark(i)).to_bytes(4, "little") + _mark(i).encode()
            name = next(part for part in parts if part.endswith("data.pkl"))
            parts[name] = parts[name].replace(mark, b"]" * depth + b"a" * (depth - 1))
        with zipfile.ZipFile(path, "w") as archive:
            for part, found in parts.items():
                archive.writestr(part, found)


def _mark(number: int) -> str:
    return f"<nested {number}>"


def _nested(content: Any) -> Iterator[int]:
    if isinstance(content, Nested):
        yield content.depth
    elif isinstance(content, (dict, Namespace)):
        for x in (content if isinstance(content, dict) else vars(content)).values():
            yield from _nested(x)
    elif isinstance(content, (list, tuple)):
        for x in content:
            yield from _nested(x)


def _without(content: Any, found: Any = None) -> Any:
    found = iter(range(10**6)) if found is None else found
    if isinstance(content, Nested):
        return _mark(next(found))
    if isinstance(content, Namespace):
        return _namespace({key: _without(x, found) for key, x in vars(content).items()})
    if isinstance(content, dict):
        return {key: _without(x, found) for key, x in content.items()}
    if type(content) in (list, tuple):
        return type(content)(_without(x, found) for x in content)
    return content


def mutate(content: Any, rng: random.Random, witness: str) -> List[str]:
    """Change a few entries of a dictionary or Namespace in place; the names of those."""
    names = []
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        entries = content if isinstance(content, dict) else vars(content)
        name = rng.choice(list(entries)) if entries and rng.random() < 0.85 else f"foreign{rng.randrange(3)}"
        if rng.random() < 0.1:
            entries.pop(name, None)
        elif isinstance(entries.get(name), (dict, Namespace)) and rng.random() < 0.7:
            names += mutate(entries[name], rng, witness)
            continue
        else:
            entries[name] = anything(rng, witness)
        names.append(str(name))
    return names


class Fuzzer:
    """Runs trials, and counts what comes of them.

    Args:
        folder: an empty one
        seed: of the mutations
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._witness, self._seed = folder, str(folder / WITNESS), seed
        self.counts: Dict[Tuple[str, str], int] = collections.Counter()
        self.failures: List[str] = []
        self._words = dictionary()
        for side in ("src", "tgt"):
            self._words.save(str(folder / f"dict.{side}.txt"))
        flags = {"encoder_normalize_before": True, "dropout": 0.0}
        self._base = self._state(settings("transformer", **flags), seed=1)
        trained = settings(load_checkpoint_liberally=False, **flags, **adapters(ids="hi,ta", train="hi", gated=True))
        self._trained = self._state(trained, seed=1)
        self._trained["model"].update(  # adapters on that base
            {name: x for name, x in self._base["model"].items() if name in self._trained["model"]}
        )
        write(self._base, folder / "base.pt")
        write(self._trained, folder / "hi.pt")
        tool.export(str(folder / "hi.pt"), "hi", str(folder / "hi.adapter"))
        self._file = load(folder / "hi.adapter")
        tool.merge(str(folder / "base.pt"), [str(folder / "hi.adapter")], str(folder / "merged.pt"))
        fconv = Namespace(
            arch="fconv",
            _name="fconv",
            encoder_embed_dim=16,
            decoder_embed_dim=16,
            decoder_out_embed_dim=16,
            encoder_layers="[(16, 3)] * 2",
            decoder_layers="[(16, 3)] * 2",
        )
        for key, value in {
            "max_source_positions": 99,
            "max_target_positions": 99,
            "share_input_output_embed": False,
        }.items():
            setattr(fconv, key, value)
        self._starts = [self._base, self._trained, self._state(fconv, seed=1)]

    def _state(self, args: Namespace, seed: int) -> Dict[str, Any]:
        task = {"_name": "translation", "data": str(self._folder), "source_lang": "src", "target_lang": "tgt"}
        model = randomize(build_from(args, seed, self._words))
        cfg = {"model": args, "task": task, "common": {"seed": 1}}
        # a part that fairseq upgrades
        state = {"args": None, "cfg": cfg, "model": model.state_dict(), "last_optimizer_state": None}
        history = {"num_updates": 1, "criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}}
        extra = {"train_iterator": {"epoch": 1}, "epoch": 1}
        return {**state, "extra_state": extra, "optimizer_history": [history], "task_state": {}}

    def run(self, trials: int) -> None:
        for number in range(trials):
            if number % 500 == 499:
                print(number + 1, dict(self.counts), len(self.failures), flush=True)
            rng = random.Random(f"{self._seed} {number}")
            trial = rng.choice([self._checkpoint, self._checkpoint, self._adapter])
            kind = trial.__name__[1:]
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(
                nowhere
            ):
                outcome = self._try(trial, rng)
            if os.path.exists(self._witness):
                os.unlink(self._witness)
                outcome = f"FAILED {number}: code has run"
            elif outcome.startswith("FAILED"):
                outcome = outcome.replace("FAILED", f"FAILED {number}", 1)
            if outcome.startswith("FAILED"):
                self.failures.append(outcome)
                print(outcome, flush=True)
            self.counts[kind, outcome.split(":")[0].split(" ")[0]] += 1

    def _try(self, trial: Any, rng: random.Random) -> str:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(4 * SECONDS)
        try:
            return trial(rng)
        except ConfigError as error:
            if "\n" in str(error) or len(str(error)) > 2100:
                return f"FAILED: no line: {str(error)[:300]!r}"
            return "refused"
        except TimeoutError:
            return f"FAILED: hangs\n{traceback.format_exc()[-1500:]}"
        except Exception as error:
            if isinstance(error, (OSError, MemoryError)) or "allocate memory" in str(error):
                return "system: a file that is not there, or no memory"
            return f"FAILED: no line\n{traceback.format_exc()[-1500:]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)

    def _checkpoint(self, rng: random.Random) -> str:
        state = copy.deepcopy(rng.choice(self._starts))
        if rng.random() < 0.05:  # slow to read; as releases before 0.10 have it
            task = state["cfg"]["task"]
            state["args"] = Namespace(**{**task, **vars(state["cfg"]["model"]), "task": task["_name"], "max_update": 1})
            state["cfg"] = None
        part = rng.choice(["cfg", "cfg", "model", "model", "model", ""]) if state["cfg"] else "args"
        if part == "model":
            content = state["cfg"]["model"]
        else:
            content = state[part] if part else {key: state[key] for key in ("cfg", "args", "extra_state")}
        mutate(content, rng, self._witness)
        if not part:
            state.update(content)
        path = self._folder / "checkpoint.pt"
        write(state, path)
        config = TranslationConfig(data=str(self._folder), source_lang="src", target_lang="tgt")
        task = TranslationTask.setup_task(config)
        models, _ = checkpoint_utils.load_model_ensemble([str(path)], {"data": str(self._folder)}, task=task)
        models[0].eval()
        return "accepted"

    def _adapter(self, rng: random.Random) -> str:
        file = copy.deepcopy(self._file)
        if rng.random() < 0.5:
            mutate(rng.choice([file, file["settings"]]), rng, self._witness)
        else:
            self._change_tensors(file["tensors"], rng)
        path, merged = self._folder / "mutated.adapter", self._folder / "merged.pt"
        write(file, path)
        if merged.exists():
            merged.unlink()
        try:
            tool.merge(str(self._folder / "base.pt"), [str(path)], str(merged))
        except ConfigError:
            return "FAILED: something was written" if merged.exists() else "refused"
        read = load(merged)
        model = build_from(read["cfg"]["model"], seed=9, words=self._words)
        model.load_state_dict(read["model"], strict=True)
        # fairseq has a buffer of whatever was in memory
        if any(not torch.isfinite(x).all() for name, x in model.state_dict().items() if is_weight(name)):
            return "FAILED: values that are not finite"
        return "accepted"

    def _change_tensors(self, tensors: Dict[str, Any], rng: random.Random) -> None:
        name = rng.choice(list(tensors))
        changes = [
            lambda t: t.double(),
            lambda t: t.half(),
            lambda t: t.long(),
            lambda t: t * float("nan"),
            lambda t: t + float("inf"),
            lambda t: t[..., :-1],
            lambda t: t.unsqueeze(0),
            lambda t: t.to_sparse(),
            lambda t: t.to(torch.complex64),
            lambda t: torch.zeros(1).expand(2**40),
            lambda t: t.tolist(),
            lambda t: None,
            lambda t: anything(rng, self._witness),
        ]
        kind = rng.randrange(4)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            odd = [name.replace("hi", "ta"), name.replace("layers.0", "layers.7"), "decoder.output_projection.bias"]
            tensors[rng.choice([*odd, name + ".", "", name.replace("encoder", "decoder"), 7])] = tensors[name]
        elif kind == 2:
            for other in rng.sample(list(tensors), len(tensors) // 2):
                del tensors[other]
        else:
            tensors[name] = rng.choice(changes)(tensors[name])


def _stop(*_: Any) -> None:
    raise TimeoutError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        fuzzer = fuzz(Path(name), options.trials, options.seed)
    for (kind, outcome), count in sorted(fuzzer.counts.items()):
        print(f"{kind}: {outcome}: {count}")
    print("\n".join(fuzzer.failures) or "nothing ran, nothing hung")
    sys.exit(bool(fuzzer.failures))


def fuzz(folder: Path, trials: int, seed: int) -> Fuzzer:
    """Run trials in this process."""
    before = {kind: signal.signal(kind, _stop) for kind in (signal.SIGALRM, signal.SIGPROF)}
    logging.disable(logging.CRITICAL)
    try:
        fuzzer = Fuzzer(folder, seed)
        fuzzer.run(trials)
    finally:
        logging.disable(logging.NOTSET)
        for kind, handler in before.items():
            signal.signal(kind, handler)
    return fuzzer


if __name__ == "__main__":
    main()
