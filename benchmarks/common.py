"""What the benchmarks share: a fresh process for every measurement, memory, and where results go."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import torch

HERE = Path(__file__).resolve().parent
RESULTS = Path(os.environ.get("KD_EXT_RESULTS", HERE / "results"))
THREADS = 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = ["float32", "float16", "bfloat16"] if DEVICE == "cuda" else ["float32"]


def measure(script: str, *arguments: object) -> Dict[str, Any]:
    """Run a script of this folder in a process of its own; the JSON object that it prints last."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")
    return json.loads(done.stdout[done.stdout.rindex("{") :])


def save(name: str, rows: List[Dict[str, Any]], **settings: Any) -> None:
    """Write ``results/NAME.json``: what was measured, and where."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    machine = {"device": device, "torch": torch.__version__, "threads": THREADS, "load": os.getloadavg()[0]}
    text = json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")


def peak_gb() -> float:
    """The most memory that this process has held so far, of the GPU where there is one, in 10^9 bytes."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def wait_for_device() -> None:
    """A GPU works on after a function has returned: to be called before a clock is read."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def available_gb() -> float:
    """Memory that a new process could have, of the GPU where there is one, in 10^9 bytes."""
    if DEVICE == "cuda":
        return torch.cuda.mem_get_info()[0] / 1e9
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
