"""The matrix of environments: each session makes one, runs the tests in it, and adds a line to .nox/table.md.

``nox`` runs all of them, ``nox --list`` names them, ``nox -s "tests(3.8-1.13.1)"`` runs one; what follows ``--`` goes
to pytest. Interpreters that this machine does not have are passed over. pip takes torch from where its own settings
say: with PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS at builds for CPUs an environment has 1 GB, otherwise 4 to 7 GB.
"""

import shutil
from pathlib import Path
from xml.etree import ElementTree

import nox

# the oldest and the newest torch of the oldest Python, what `make` takes, and the newest that each other Python has
VERSIONS = [
    ("3.8", "1.13.1"),
    ("3.8", "2.4.1"),
    ("3.9", "2.8.0"),
    ("3.10", "2.14.1"),
    ("3.11", "2.13.0"),
    ("3.12", "2.15.0"),
    ("3.13", "2.15.0"),
    ("3.14", "2.15.0"),
]
COLUMNS = ["torch", "numpy", "fairseq", "sacrebleu"]
TABLE = Path(".nox", "table.md")

nox.options.default_venv_backend = "venv"


@nox.session
@nox.parametrize(
    ["python", "torch"],
    [nox.param(*pair, id="-".join(pair), tags=["ci"] if pair == VERSIONS[0] else []) for pair in VERSIONS],
)
def tests(session, torch):
    """All tests but those of the demo and of what is made of it, whose own requirements are more."""
    session.install("pip<24.1")  # later ones refuse fairseq's requirements
    # in one command: by itself, fairseq's torchaudio brings another torch
    session.install(f"torch=={torch}", "--editable", ".[fairseq]", "pytest>=8", "pytest-xdist")
    session.run("python", "-m", "kd_ext.doctor")
    report = Path(session.create_tmp(), "report.xml").resolve()
    selection = ["--ignore=tests/test_demo.py", "--ignore=tests/test_quality.py", *session.posargs]
    session.run("python", "-m", "pytest", "-n", "auto", f"--junitxml={report}", *selection)
    note(session, report)
    shutil.rmtree(session.virtualenv.location)  # one that failed is left, to be looked into


def note(session, report):
    """Add the versions and the counts to the table."""
    code = (
        "import platform; from importlib.metadata import version; print(platform.python_version(), *map(version, {}))"
    )
    versions = session.run("python", "-c", code.format(COLUMNS), silent=True).split()
    counts = ElementTree.parse(report).find("testsuite").attrib
    skipped = int(counts["skipped"])
    cells = [*versions, str(int(counts["tests"]) - skipped), str(skipped)]
    if not TABLE.exists():
        heads = ["Python", *COLUMNS, "passed", "skipped"]
        TABLE.write_text(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n")
    with TABLE.open("a") as table:
        table.write(f"| {' | '.join(cells)} |\n")
