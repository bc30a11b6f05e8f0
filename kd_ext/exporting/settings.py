"""Settings under which upstream alone builds the exported model: nothing in them is of this project."""

from argparse import Namespace
from collections import OrderedDict
from typing import Any, Dict

from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.translation import TranslationConfig
from omegaconf import OmegaConf
from torch import Tensor

from kd_ext.exporting.factors import PROJECT_OUT
from kd_ext.models.extension_flags import SIDES
from kd_ext.models.same_function import settings_read
from kd_ext.upstream.added_flags import ADDED

ARCHITECTURE, TASK = "transformer", "translation"
# of training alone, or about what the weights already are
_LEFT_OUT = ("encoder_embed_path", "decoder_embed_path", "encoder_layers_to_keep", "decoder_layers_to_keep")
_OFF = ("checkpoint_activations", "offload_activations")


def model_settings(model: Namespace, weights: Dict[str, Tensor]) -> Dict[str, Any]:
    """What upstream's ``transformer`` is built from.

    Args:
        model: the student's own settings, every one that its class reads
        weights: the exported ones, by name
    """
    known = settings_read(Namespace(_name=ARCHITECTURE)) - set(_LEFT_OUT)
    values = {key: getattr(model, key) for key in sorted(known) if hasattr(model, key)}
    values.update(dict.fromkeys(_OFF, False))
    for side in SIDES:
        layers = {name.split(".")[2] for name in weights if name.startswith(f"{side}.layers.")}
        values[f"{side}_layers"] = len(layers)
        values[f"{side}_ffn_embed_dim"] = weights[f"{side}.layers.0.fc1.bias"].size(0)
    out = weights.get(PROJECT_OUT)
    values["decoder_output_dim"] = values["decoder_embed_dim"] if out is None else out.size(0)
    return {**values, "arch": ARCHITECTURE, "_name": ARCHITECTURE}


def checkpoint_settings(model: Dict[str, Any], task: Any, data: str) -> Dict[str, Any]:
    """The groups of settings of a checkpoint, as fairseq from 0.10 on saves them.

    Args:
        model: from :func:`model_settings`
        task: the student's task's, with languages
        data: the folder in which its dictionaries are to be looked for
    """
    of_task = {key: task.get(key) for key in TranslationConfig.__dataclass_fields__ if not _is_of_a_run(key)}
    values = {**model, **of_task, "task": TASK, "data": data}
    groups = OmegaConf.to_container(convert_namespace_to_omegaconf(Namespace(**values)), resolve=True, enum_to_str=True)
    for group in groups.values():
        for key in ADDED if isinstance(group, dict) else ():
            group.pop(key, None)
    groups["model"] = _both_ways(values)
    return groups


def _is_of_a_run(key: str) -> bool:
    return key.startswith(("_", "eval_")) or key in ("train_subset", "dataset_impl", "required_seq_len_multiple")


def _both_ways(values: Dict[str, Any]) -> "OrderedDict[str, Any]":
    """Settings that are read as entries and as attributes.

    fairseq takes either, other readers of its checkpoints attributes alone. A Namespace has them; but torch, from 2.6
    on, loads none unless it is told to, which fairseq does not. This class it loads, attributes too: state dictionaries
    keep their metadata so.
    """
    settings = OrderedDict(values)
    vars(settings).update(values)
    return settings
