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
        if name not in ("fairseq", "hydra") and "fairseq" not in sys.modules and "hydra" not in sys.modules:
            return None
        finders = sys.meta_path
        is_fairseq = name == "fairseq" or "fairseq" in sys.modules
        if cls not in finders or not (is_fairseq or _is_hydra(name)):
            return None
        # Out of the list itself: others may hold it, and put finders into it. Whoever goes through it at this moment
        # passes over the next one, which is therefore asked here.
        place = finders.index(cls)
        del finders[place]
        following = finders[place] if place < len(finders) else None
        try:
            _apply()
        except Exception as error:  # never break another program: fairseq's own error comes next
            print(f"kd_ext: the start-up remedies for fairseq failed: {type(error).__name__}: {error}", file=sys.stderr)
        find = getattr(following, "find_spec", None)
        return find(name, path, target) if find else None


def _is_hydra(name):
    """Whether the package hydra is Facebook's, and not one that the user has given that name."""
    from importlib.machinery import PathFinder

    if "hydra" in sys.modules:
        folders = getattr(sys.modules["hydra"], "__path__", ())
    else:
        spec = PathFinder.find_spec("hydra") if name == "hydra" else None
        folders = spec.submodule_search_locations or () if spec else ()
    return any(os.path.isfile(os.path.join(folder, "_internal", "hydra.py")) for folder in folders)


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
