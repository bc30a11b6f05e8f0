"""The one place that touches fairseq at run time: a file a touch, each with its reason and versions.

``early`` comes before ``import fairseq`` and is also run by ``kd_ext_startup``; the rest comes with the plugin, but for
``mapped_checkpoints``, which whoever reads a checkpoint asks for.
"""

from importlib import import_module

TOUCHES = (
    "adapter_activation",
    "adaptive_softmax",
    "atomic_saving",
    "bf16",
    "checkpoints",
    "command_line",
    "damaged_checkpoints",
    "data_files",
    "eval_bleu",
    "evaluated_settings",
    "fast_path",
    "fetched_files",
    "first_validation",
    "flat_bf16",
    "held_folder",  # after atomic_saving, which removes what a killed run has left
    "layers_to_keep",
    "loaded_models",
    "misspelt_settings",
    "numpy_names",
    "one_line_errors",
    "patience",
    "resume",
    "sanity_validation",
    "several_parts",
    "torch_compile",
    "runs_that_ended",  # after the pass before the first update
    "validated_training_set",
    "same_files",  # before all that looks at a checkpoint
)


def apply() -> None:
    """Apply every touch that this environment needs; safe to call twice."""
    for name in TOUCHES:  # imported here, as most of them import fairseq
        import_module(f"kd_ext.upstream.{name}").apply()
