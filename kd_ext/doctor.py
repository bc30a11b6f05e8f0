"""``python -m kd_ext.doctor``: what this environment has, what is repaired in it, and whether training will work.

Only the standard library is imported here, so that ``python .../kd_ext/doctor.py`` has an answer where fairseq is
missing or broken too; the rest of the package needs fairseq.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from typing import Dict, List, NamedTuple, Optional, Tuple

PACKAGES = ("torch", "numpy", "fairseq", "omegaconf", "hydra-core", "sacrebleu", "pip")
INSTALL = "pip install 'pip<24.1' && pip install fairseq==0.12.2"

# What fairseq-train does, up to its settings, and what can be seen then.
PROBE = """
import fairseq.dataclass.utils, fairseq_cli.train, fairseq_cli.hydra_train
import fairseq.data.data_utils_fast, fairseq.data.token_block_utils_fast
import dataclasses, json, sys
from argparse import Namespace
from importlib.machinery import FileFinder
import torch
from fairseq import options
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from fairseq.utils import import_user_module

import_user_module(Namespace(user_dir=sys.argv[1]))
settings = options.parse_args_and_arch(options.get_training_parser(), ["data", "--arch", "transformer"])
fairseq.dataclass.utils.convert_namespace_to_omegaconf(settings)
safe_globals = getattr(torch.serialization, "get_safe_globals", list)()
active = {
    "A": hasattr(dataclasses._get_field, "_kd_ext"),
    "B": hasattr(FileFinder, "find_module"),
    "C": "typing.io" in sys.modules,
    "D": (Namespace, "argparse.Namespace") in safe_globals,
    "E": hasattr(TransformerEncoderLayerBase.__init__, "_kd_ext"),
    "F": hasattr(fairseq.dataclass.utils.interpret_dc_type, "_kd_ext"),
    "G": fairseq.data.data_utils.np is not sys.modules["numpy"],
}
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print("\\n" + json.dumps({"active": active, "devices": devices}))
"""


class Remedy(NamedTuple):
    """A repair of fairseq, and from which version of what on it is needed."""

    package: str
    since: Tuple[int, int]
    why: str


REMEDIES = {
    "A": Remedy("python", (3, 11), "refuses the configuration classes of fairseq and Hydra"),
    "B": Remedy("python", (3, 12), "has no FileFinder.find_module, by which Hydra looks for plugins"),
    "C": Remedy("python", (3, 13), "has no typing.io, which Hydra's parser imports"),
    "D": Remedy("torch", (2, 6), "refuses the types that fairseq's checkpoints hold"),
    "E": Remedy("torch", (1, 13), "refuses the mask of fairseq's fused encoder"),
    "F": Remedy("python", (3, 14), "shows optional types in a way that fairseq does not know"),
    "G": Remedy("numpy", (1, 24), "has lost names that fairseq uses, for --num-batch-buckets among others"),
}

# a part of the error with which fairseq-train ends: what to do
MENDS = {
    "mutable default": "its start-up hook is not at work: unset KD_EXT_STARTUP, and pip install this package",
    "typing.io": "its start-up hook is not at work: unset KD_EXT_STARTUP, and pip install this package",
    "_fast'": "build fairseq's extensions: in its checkout pip install 'pip<24.1' && pip install --editable .",
    "No module named 'fairseq": INSTALL,
    "No module named 'torch'": "pip install torch",
}


def main() -> int:
    """Print the report; 0 if training will work, 1 if not."""
    versions = find_versions()
    for name, version in versions.items():
        print(f"{name:12}{version or 'not installed'}")
    state, error = probe()
    if state is not None:
        for line in describe(state, versions):
            print(line)
    for note in notes(versions):
        print(f"note: {note}")
    if error is not None:
        mend = next((mend for part, mend in MENDS.items() if part in error), f"install fairseq anew: {INSTALL}")
        print(f"problem: fairseq-train would end with: {error}\nremedy: {mend}")
    inactive = [name for name in REMEDIES if state is not None and is_needed(name, versions) and not state[0][name]]
    if inactive:
        print(f"problem: remedies not at work: {', '.join(inactive)}\nremedy: pip install this package anew")
    works = error is None and not inactive
    print("training will work" if works else "training will not work")
    return 0 if works else 1


def find_versions() -> Dict[str, Optional[str]]:
    versions: Dict[str, Optional[str]] = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def probe() -> Tuple[Optional[Tuple[Dict[str, bool], List[str]]], Optional[str]]:
    """Start as fairseq-train does: which remedies are at work and the names of the GPUs, or the error's last line."""
    package = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(
        [sys.executable, "-c", PROBE, package],
        cwd=os.path.dirname(sys.executable),  # where a command finds no module but the installed ones either
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        return None, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    found = json.loads(done.stdout.splitlines()[-1])
    return (found["active"], found["devices"]), None


def describe(state: Tuple[Dict[str, bool], List[str]], versions: Dict[str, Optional[str]]) -> List[str]:
    active, devices = state
    lines = [f"{'GPUs':12}{', '.join(devices) or 'none seen: train with --cpu'}"]
    for name, remedy in REMEDIES.items():
        word = "not needed" if not is_needed(name, versions) else "active" if active[name] else "NOT ACTIVE"
        since = ".".join(map(str, remedy.since))
        lines.append(f"{'remedy ' + name:12}{word}: {remedy.package} >= {since} {remedy.why}")
    return lines


def is_needed(name: str, versions: Dict[str, Optional[str]]) -> bool:
    return at_least(versions[REMEDIES[name].package], REMEDIES[name].since)


def notes(versions: Dict[str, Optional[str]]) -> List[str]:
    """What goes wrong here without keeping anyone from training."""
    found = []
    if versions["fairseq"] not in (None, "0.12.2"):
        found.append(f"this package is made for fairseq 0.12.2, not {versions['fairseq']}")
    if at_least(versions["pip"], (24, 1)):
        found.append(f"pip {versions['pip']} installs neither fairseq nor what requires it: pip install 'pip<24.1'")
    if at_least(versions["sacrebleu"], (2, 6)):
        found.append("fairseq-score --sacrebleu fails with sacrebleu >= 2.6: use fairseq-generate --scoring sacrebleu")
    return found


def at_least(version: Optional[str], least: Tuple[int, int]) -> bool:
    """Whether a version such as 2.13.0+cpu or 24.1b1 is `least` or newer; False for none."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return numbers is not None and tuple(map(int, numbers.groups())) >= least


if __name__ == "__main__":
    shown = (__doc__ or "").split("\n")[0]  # none with python -OO
    argparse.ArgumentParser(prog="python -m kd_ext.doctor", description=shown).parse_args()
    sys.exit(main())
