"""A student as upstream's ``transformer``: its weights by name, and the settings that they go with."""

import re
from argparse import Namespace
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from fairseq.models import build_model
from fairseq.tasks.translation import TranslationTask
from torch import Tensor, nn

from kd_ext.errors import ConfigError, in_short
from kd_ext.exporting.adapter_layers import with_adapters_as_layers, without_adapters
from kd_ext.exporting.factors import with_one_projection, without_factors
from kd_ext.exporting.settings import checkpoint_settings, model_settings
from kd_ext.exporting.student import Student
from kd_ext.exporting.unroll import unrolled
from kd_ext.models.extension_flags import SIDES, Extensions
from kd_ext.models.layers import is_dead
from kd_ext.modules.random_state import random_state_kept

# Between log-probabilities: what a rounding more or less comes to in a deep model is less, what is lost is more.
TOLERANCE = 1e-3
_UNSET = re.compile(r"\._float_tensor$")  # a buffer of fairseq's of which the dtype matters; it is never given a value


class Plain(NamedTuple):
    """What is written.

    Attributes:
        weights: by name, float32
        groups: of settings, as a checkpoint has them
        done: what was done to the student's weights, a phrase for each thing
        model: upstream's, with them, in evaluation mode
    """

    weights: Dict[str, Tensor]
    groups: Dict[str, Any]
    done: List[str]
    model: nn.Module


def upstream_weights(
    weights: Dict[str, Tensor], extensions: Extensions, dtype: torch.dtype, one_projection: bool = False
) -> Tuple[Dict[str, Tensor], List[str]]:
    """The weights of a ``transformer_ext`` as upstream's ``transformer`` has them.

    Args:
        weights: by name, as a student's ``state_dict`` has them
        extensions: what is on; the active adapters become layers, and the others are left out
        dtype: of the result. Products are computed in float64, and rounded to it once
        one_projection: also multiply out what upstream's ``decoder_output_dim`` holds in two factors

    Returns:
        tensors by name, of which those that are one in the student, or came of one, are one; and what was done
    """
    done = []
    found = {name: tensor.detach() for name, tensor in weights.items() if not is_dead(name)}
    for side in SIDES:
        settings = getattr(extensions, side)
        if settings.depths:
            found = unrolled(found, side, settings.depths)
            done.append(f"the {side}'s layer written out {settings.depths} times")
        if settings.adapters is not None and settings.adapters.active is not None:
            found = with_adapters_as_layers(found, side, settings.adapters.active)
            done.append(f"the {side}'s adapters {settings.adapters.active} as layers")
        elif settings.adapters is not None:
            done.append(f"the {side}'s adapters left out")
        if settings.factorized_dim:
            done.append(f"the {side}'s embeddings multiplied out")
    found = without_factors(without_adapters(found))
    if one_projection:
        found = with_one_projection(found)
    found.update({name: torch.zeros(1) for name in found if _UNSET.search(name)})
    return _rounded(found, dtype), done


def _rounded(weights: Dict[str, Tensor], dtype: torch.dtype) -> Dict[str, Tensor]:
    """In `dtype`; what was one tensor is one tensor, which a file then has once."""
    rounded: Dict[Tuple[int, torch.Size], Tensor] = {}
    for tensor in weights.values():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in rounded:
            rounded[key] = tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor
    return {name: rounded[tensor.data_ptr(), tensor.shape] for name, tensor in weights.items()}


def as_upstream(student: Student, data: str, one_projection: bool = False) -> Plain:
    """A student's weights and settings as upstream's own.

    Args:
        data: the folder in which the dictionaries are to be looked for
        one_projection: as in :func:`upstream_weights`

    Raises:
        ConfigError: upstream's model computes something else with them
    """
    weights, done = upstream_weights(student.model.state_dict(), student.extensions, torch.float32, one_projection)
    settings = model_settings(student.settings, weights)
    try:
        model = build_plain(settings, weights, student.task)
    except Exception as error:  # whatever upstream's class answers to weights that do not suit it
        said = in_short(error)
        raise ConfigError(f"{student.path}: upstream's transformer has no place for its weights ({said})") from error
    _check_same(student, model)
    return Plain(weights, checkpoint_settings(settings, student.task.cfg, data), done, model)


def build_plain(settings: Dict[str, Any], weights: Dict[str, Tensor], task: TranslationTask) -> nn.Module:
    """Upstream's model with these settings and weights, in evaluation mode."""
    with random_state_kept():
        model = build_model(Namespace(**settings), task)
    model.load_state_dict(dict(weights), strict=True)
    return model.eval()


def _check_same(student: Student, model: nn.Module) -> None:
    """Ask both for one batch: what no file of this folder knows of must not be lost without a word."""
    batch = _probe(student)
    with torch.no_grad():
        ours, theirs = (m.get_normalized_probs(m(**batch), log_probs=True) for m in (student.model, model))
    difference = (ours - theirs).abs().max()
    if not difference <= TOLERANCE:  # nor NaN
        raise ConfigError(
            f"{student.path}: upstream's transformer computes something else with its weights (log-probabilities "
            f"differ by {float(difference):.2g}): it was trained with what this command does not know"
        )


def _probe(student: Student) -> Dict[str, Tensor]:
    """A batch of random words, with padding."""
    source, target = student.task.source_dictionary, student.task.target_dictionary
    generator = torch.Generator().manual_seed(1)
    longest = min(9, *student.model.max_positions())
    src = torch.randint(source.nspecial, max(len(source), source.nspecial + 1), (3, longest), generator=generator)
    prev = torch.randint(target.nspecial, max(len(target), target.nspecial + 1), (3, longest), generator=generator)
    src.clamp_(max=len(source) - 1)
    prev.clamp_(max=len(target) - 1)
    src[1, : longest // 2] = source.pad()
    prev[:, 0] = target.eos()
    return {"src_tokens": src, "src_lengths": src.ne(source.pad()).sum(1), "prev_output_tokens": prev}
