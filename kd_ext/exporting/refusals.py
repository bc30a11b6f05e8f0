"""What cannot be exported exactly, feature by feature, each with its reason."""

from argparse import Namespace
from typing import List, Sequence

from kd_ext.errors import ConfigError
from kd_ext.exporting.student import Student
from kd_ext.models.extension_flags import NO_ADAPTER, SIDES, AdapterSettings, activation_key

# of CTranslate2's converter
_ACTIVATIONS = ("relu", "gelu", "gelu_accurate", "gelu_fast")

# of Hugging Face transformers, the name for what upstream computes
HUGGINGFACE_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "tanh": "tanh",
    "linear": "linear",
}


def check_adapters(student: Student) -> None:
    """See that the active adapters of a student can be layers of upstream's.

    Raises:
        ConfigError: with all the reasons for the first side where they cannot
    """
    for side in SIDES:
        found = getattr(student.extensions, side).adapters
        if found is None or found.active is None:
            continue
        reasons = _reasons_of_adapter(side, found, student.settings)
        if reasons:
            flag = f"--{activation_key(side).replace('_', '-')}"
            raise ConfigError(
                f"{flag} {found.active}: no layer of upstream's transformer computes what this adapter of "
                f"{student.path} does: {'; '.join(reasons)}; '{flag} {NO_ADAPTER}' leaves it out"
            )


def _reasons_of_adapter(side: str, found: AdapterSettings, settings: Namespace) -> List[str]:
    reasons = []
    if found.gated:
        reasons.append(f"--{side}-adapter-use-gating: a layer has no gate on what it adds")
    if found.activation != settings.activation_fn:
        reasons.append(
            f"--adapter-activation-fn {found.activation}: all layers of a model have one activation, and this one's is "
            f"{settings.activation_fn}"
        )
    if not getattr(settings, f"{side}_normalize_before"):
        reasons.append(
            f"no --{side}-normalize-before: a post-norm layer ends with a layer norm, and an adapter does not"
        )
    return reasons


def check_upstream(student: Student) -> None:
    """See that upstream's own ``transformer`` can hold a student.

    Raises:
        ConfigError: with all the reasons
    """
    reasons = []
    if student.settings.base_layers:
        reasons.append(f"--base-layers {student.settings.base_layers}: experts are spread over several processes")
    if getattr(student.settings, "quant_noise_scalar", 0):
        reasons.append(
            f"--quant-noise-scalar {student.settings.quant_noise_scalar}: its weights are rounded as they are used"
        )
    _refuse(student.path, "--format fairseq", reasons)


def check_ctranslate2(student: Student) -> None:
    """See that CTranslate2's transformer computes what a student does.

    Raises:
        ConfigError: with all the reasons
    """
    settings = student.settings
    reasons = _of_unlike_sides(settings, "normalize_before", "attention_heads")
    if settings.activation_fn not in _ACTIVATIONS:
        reasons.append(f"--activation-fn {settings.activation_fn}: it has {', '.join(_ACTIVATIONS)}")
    for key, reason in (
        ("adaptive_softmax_cutoff", "it has no adaptive softmax"),
        ("no_token_positional_embeddings", "it always adds positions"),
        ("no_cross_attention", "its decoder always attends to the source"),
        ("cross_self_attention", "its decoder attends to the source and to itself one after the other"),
        ("no_decoder_final_norm", "its pre-norm decoder ends with a layer norm"),
        ("quant_noise_pq", "it has no place for the matrix that this puts behind the embeddings"),
    ):
        _add(reasons, settings, key, reason)
    for side, words in (("source", student.task.source_dictionary), ("target", student.task.target_dictionary)):
        if "<blank>" in words.symbols:
            reasons.append(f"a word <blank> in the {side} dictionary: that is what it calls padding")
    _refuse(student.path, "--format ctranslate2", reasons)


def check_huggingface(student: Student) -> None:
    """See that a class of Hugging Face transformers computes what a student does: FSMT post-norm, M2M100 pre-norm.

    Raises:
        ConfigError: with all the reasons
    """
    settings = student.settings
    reasons = _of_unlike_sides(settings, "normalize_before", "embed_dim")
    for side in SIDES:
        if getattr(settings, f"{side}_learned_pos"):
            reasons.append(f"--{side}-learned-pos: both classes have sinusoidal positions")
    if settings.activation_fn not in HUGGINGFACE_ACTIVATIONS:
        known = ", ".join(HUGGINGFACE_ACTIVATIONS)
        reasons.append(f"--activation-fn {settings.activation_fn}: of upstream's they have {known}")
    for key, reason in (
        ("layernorm_embedding", "neither class has a layer norm behind the embeddings"),
        ("adaptive_softmax_cutoff", "neither has an adaptive softmax"),
        ("no_token_positional_embeddings", "both always add positions"),
        ("no_cross_attention", "their decoders always attend to the source"),
        ("cross_self_attention", "their decoders attend to the source and to themselves one after the other"),
        ("quant_noise_pq", "neither has a place for the matrix that this puts behind the embeddings"),
    ):
        _add(reasons, settings, key, reason)
    if settings.encoder_normalize_before:
        _add(reasons, settings, "no_decoder_final_norm", "M2M100's decoder ends with a layer norm")
        source, target = len(student.task.source_dictionary), len(student.task.target_dictionary)
        if source > target:
            reasons.append(
                f"a pre-norm model with more words in the source dictionary ({source}) than in the target's "
                f"({target}): M2M100 has one number of words, and its softmax would have more than the student's"
            )
    _refuse(student.path, "--format huggingface", reasons)


def _of_unlike_sides(settings: Namespace, *keys: str) -> List[str]:
    """The reasons against settings that differ between encoder and decoder."""
    reasons = []
    for key in keys:
        values = [getattr(settings, f"{side}_{key}") for side in SIDES]
        if values[0] != values[1]:
            flag = key.replace("_", "-")
            reasons.append(f"--encoder-{flag} {values[0]} and --decoder-{flag} {values[1]}: they must be the same")
    return reasons


def _add(reasons: List[str], settings: Namespace, key: str, reason: str) -> None:
    """Add the reason against a setting that is off unless it was asked for."""
    value = getattr(settings, key, None)
    if value:
        shown = "" if value is True else f" {value}"
        reasons.append(f"--{key.replace('_', '-')}{shown}: {reason}")


def _refuse(path: str, flag: str, reasons: Sequence[str]) -> None:
    if reasons:
        raise ConfigError(f"{flag}: {path} cannot be exported so: {'; '.join(reasons)}")
