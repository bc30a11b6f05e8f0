"""The one place that touches fairseq at run time: a file a touch, each with its reason and versions.

``early`` comes before ``import fairseq`` and is also run by ``kd_ext_startup``; the rest comes with the plugin.
"""


def apply() -> None:
    """Apply every touch that this environment needs; safe to call twice."""
    from kd_ext.upstream import checkpoints, fast_path, one_line_errors, resume

    for touch in (checkpoints, fast_path, one_line_errors, resume):
        touch.apply()
