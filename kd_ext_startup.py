"""Runs at interpreter start: waits for ``import fairseq`` and repairs it just before.

On Python 3.11 and later fairseq 0.12.2 does not import, so a module that fairseq loads itself (``--user-dir``)
comes too late. This one only puts a watcher on ``sys.meta_path``; nothing else happens, and nothing is
imported, until ``fairseq`` or ``hydra`` is. ``KD_EXT_STARTUP=0`` in the environment switches it off.
"""

import os
import sys


class _Watcher:
    """A meta path finder that finds nothing, and applies the remedies on the first import they are for."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        # in sys.modules: another finder came first for the package itself (pytest has such a one)
        if name in ("fairseq", "hydra") or "fairseq" in sys.modules or "hydra" in sys.modules:
            try:
                # a new list: in one that is gone through at this moment the next finder would be passed over
                if cls in sys.meta_path:
                    sys.meta_path = [finder for finder in sys.meta_path if finder is not cls]
                    _apply()
            except Exception as error:  # never break another program: fairseq's own error comes next
                print(f"kd_ext: the start-up remedies for fairseq failed: {error!r}", file=sys.stderr)
        return None


def _apply():
    # By file, not as kd_ext.upstream.early: the package imports fairseq, and must not be loaded here.
    from importlib.util import find_spec, module_from_spec, spec_from_file_location

    package = find_spec("kd_ext").submodule_search_locations[0]
    spec = spec_from_file_location("_kd_ext_early", os.path.join(package, "upstream", "early.py"))
    early = module_from_spec(spec)
    spec.loader.exec_module(early)
    early.apply()


if os.environ.get("KD_EXT_STARTUP", "1") != "0" and _Watcher not in sys.meta_path:
    sys.meta_path.insert(0, _Watcher)
