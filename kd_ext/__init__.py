"""Knowledge distillation for fairseq. Importing the package registers its task and criterion."""

from kd_ext.upstream import early

early.apply()

try:
    import fairseq  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "fairseq":
        raise
    raise ImportError(
        "kd_ext is a plugin of fairseq, which is not installed: pip install 'pip<24.1' && pip install fairseq==0.12.2"
    ) from error

from kd_ext import upstream  # noqa: E402
from kd_ext.upstream import user_dir  # noqa: E402

upstream.apply()
__path__ = user_dir.spellings(__path__[0])

from kd_ext import criterions, models, tasks  # noqa: E402, F401
