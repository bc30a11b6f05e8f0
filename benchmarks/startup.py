"""What the start-up hook adds to the start of an interpreter, against one without it.

``python benchmarks/startup.py`` makes two bare environments of the same Python, one of which has the hook, and starts
both in turn. The hook's own time is the one that ``-X importtime`` reports for it. Seconds.
"""

import os
import re
import shutil
import statistics
import subprocess
import tempfile
import venv
from pathlib import Path

from common import save

ROOT = Path(__file__).resolve().parent.parent
RUNS = 200


def make_environment(folder):
    """An interpreter without any package; returns its path and where its packages go."""
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python", next(folder.glob("lib/python*/site-packages"))


def time_start(python):
    """Processor time in seconds, which other work on the machine changes less than it does the clock's."""
    process = os.posix_spawn(python, [str(python), "-c", "pass"], os.environ)
    used = os.wait4(process, 0)[2]
    return used.ru_utime + used.ru_stime


def time_hook(python):
    """In seconds."""
    done = subprocess.run([python, "-X", "importtime", "-c", "pass"], check=True, stderr=subprocess.PIPE, text=True)
    return int(re.search(r"\| +(\d+) \| +kd_ext_startup\n", done.stderr)[1]) / 1e6


def main():
    with tempfile.TemporaryDirectory() as name:
        without, _ = make_environment(Path(name, "without"))
        with_hook, packages = make_environment(Path(name, "with"))
        for file in ROOT.glob("kd_ext_startup.*"):
            shutil.copy(file, packages)
        subprocess.run([with_hook, "-m", "compileall", "-q", packages], check=True)  # as pip does
        times = {without: [], with_hook: []}
        for _ in range(RUNS):
            for python, taken in times.items():
                taken.append(time_start(python))
        hook = statistics.median(time_hook(with_hook) for _ in range(RUNS))
    plain, hooked = (statistics.median(taken) for taken in times.values())
    row = {"ratio": hooked / plain, "difference": hooked - plain, "hook": hook}
    print(row)
    save("startup", [row], runs=RUNS)


if __name__ == "__main__":
    main()
