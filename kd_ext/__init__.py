"""Knowledge distillation for fairseq. Importing the package registers its task and criterion."""

import os
import sys

if __name__ != "kd_ext":  # a link or a copy: its modules, which import each other as kd_ext, would register twice
    _real = os.path.realpath(__path__[0])
    _remedy = f"name {_real}" if os.path.basename(_real) == "kd_ext" else "rename it"
    print(f"kd_ext: error: --user-dir {__path__[0]}: the folder must be called kd_ext; {_remedy}", file=sys.stderr)
    sys.exit(2)

from kd_ext.upstream import early

early.apply()

try:
    import fairseq  # noqa: F401
except Exception as error:
    # python -m kd_ext.doctor ends here as well: Python imports a package before what is in it
    missing = isinstance(error, ModuleNotFoundError) and error.name == "fairseq"
    raise ImportError(
        f"kd_ext is a plugin of fairseq, which {'is not installed' if missing else f'does not import ({error})'}: "
        f"pip install 'pip<24.1' && pip install fairseq==0.12.2; to see what else is wrong: "
        f"python {__path__[0]}/doctor.py"
    ) from error

from kd_ext import upstream  # noqa: E402
from kd_ext.upstream import user_dir  # noqa: E402

upstream.apply()
__path__ = user_dir.spellings(__path__[0])

from kd_ext import criterions, models, tasks  # noqa: E402, F401
