"""``--user-dir kd_ext`` under every spelling of the same folder."""

import os
from typing import List

import fairseq


def spellings(package_dir: str) -> List[str]:
    """The names under which fairseq may come to `package_dir`, for the package's ``__path__``.

    fairseq (0.12.2) refuses a user module that was already imported from a path spelled otherwise, and itself
    spells an installed one ``.../fairseq/../kd_ext``.
    """
    beside = os.path.join(os.path.dirname(fairseq.__file__), "..", os.path.basename(package_dir))
    candidates = [package_dir, os.path.abspath(package_dir), os.path.realpath(package_dir), beside]
    same = [path for path in candidates if os.path.exists(path) and os.path.samefile(path, package_dir)]
    return list(dict.fromkeys(same))
