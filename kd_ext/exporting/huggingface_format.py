"""The folder that Hugging Face transformers loads: FSMT for a post-norm student, M2M100 for a pre-norm one.

Both classes compute what upstream's ``transformer`` does. Writing needs nothing of the library: settings are JSON.
"""

import json
import os
import re
from typing import Any, Dict, List, Set

import torch
from torch import Tensor

from kd_ext.errors import ConfigError
from kd_ext.exporting import folders
from kd_ext.exporting.brought_json import CONFIG, read_config
from kd_ext.exporting.factors import OUTPUT
from kd_ext.exporting.fairseq_format import write_dictionaries
from kd_ext.exporting.plain import Plain, as_upstream
from kd_ext.exporting.refusals import HUGGINGFACE_ACTIVATIONS
from kd_ext.exporting.student import Student
from kd_ext.exporting.translators import BEAM, longest_translation
from kd_ext.files.writing import written_whole
from kd_ext.models.extension_flags import SIDES

POST_NORM, PRE_NORM = "FSMTForConditionalGeneration", "M2M100ForConditionalGeneration"
_TYPES = {POST_NORM: "fsmt", PRE_NORM: "m2m_100"}

_GENERATION, _SAFE, _PICKLED = "generation_config.json", "model.safetensors", "pytorch_model.bin"

_TABLES = tuple(f"{side}.embed_tokens.weight" for side in SIDES)
# a layer's, and the layer norm behind the last of a pre-norm side: they have the same names there
_LAYER = re.compile(
    r"(encoder|decoder)\.(layer_norm|layers\.\d+\.(self_attn_layer_norm|encoder_attn_layer_norm|final_layer_norm|fc[12]"
    r"|(self_attn|encoder_attn)\.[kvq]_proj|(self_attn|encoder_attn)\.out_proj))\.(weight|bias)"
)
_UNSET = re.compile(r"(encoder\.|decoder\.)?(version|embed_positions\._float_tensor)")  # they hold nothing


def class_for(student: Student) -> str:
    return PRE_NORM if student.settings.encoder_normalize_before else POST_NORM


def is_huggingface(path: str) -> bool:
    """Whether a folder is one that this command wrote, or could have.

    Raises:
        ConfigError: its ``config.json`` cannot be read
    """
    return _is_of_a_class(read_config(path))


def _is_of_a_class(config: Dict[str, Any]) -> bool:
    return config.get("architectures") in ([POST_NORM], [PRE_NORM])


def dictionary_names(config: Dict[str, Any]) -> List[str]:
    """Of the files with the source and target words, by ``config.json``; none, if that does not name two languages."""
    languages = config.get("langs")
    if not isinstance(languages, list) or len(languages) != 2:
        return []
    return [f"dict.{language}.txt" for language in languages]


def check_folder(path: str) -> None:
    """See that a folder can be written: there is none, or an empty one, or an older one of this format.

    Raises:
        ConfigError: something else is there
    """
    folders.check_folder(path, lambda config: _written(path, config))


def _written(path: str, config: Dict[str, Any]) -> Set[str]:
    """The files of a folder that is as this command left it, not as the library saved whoever's fine-tuned model."""
    dictionaries = dictionary_names(config)
    there = dictionaries and all(os.path.isfile(os.path.join(path, name)) for name in dictionaries)
    if not there or not _is_of_a_class(config) or "transformers_version" in config:
        return set()
    return {CONFIG, _GENERATION, _SAFE, _PICKLED, *dictionaries}


def write_folder(student: Student, path: str) -> Plain:
    """Write the folder whole or not at all; returns what was converted.

    Raises:
        ConfigError: a weight has no place in the class, or it cannot be written
    """
    with folders.folder_written_whole(path) as part:
        plain = as_upstream(student, path, one_projection=True)
        tied = is_tied(plain.weights)
        weights = named(plain.weights, class_for(student), tied)
        os.mkdir(part)
        write_dictionaries(student, part)
        _write_json(os.path.join(part, CONFIG), config_of(student, plain.weights, tied))
        _write_json(os.path.join(part, _GENERATION), generation_of(student))
        _write_weights(part, weights)
    return plain


def is_tied(weights: Dict[str, Tensor]) -> bool:
    """Whether both sides' embeddings and the output projection are one table."""
    return len({weights[name].data_ptr() for name in (*_TABLES, OUTPUT)}) == 1


def named(weights: Dict[str, Tensor], architecture: str, tied: bool) -> Dict[str, Tensor]:
    """The weights of upstream's ``transformer``, with one output projection, by the names of a class.

    Args:
        weights: by upstream's names
        architecture: :data:`POST_NORM` or :data:`PRE_NORM`
        tied: the tables are one

    Raises:
        ConfigError: for one of them the class has no name
    """
    found: Dict[str, Tensor] = {}
    unknown: List[str] = []
    for name, tensor in weights.items():
        if _LAYER.fullmatch(name):
            found[f"model.{name}"] = tensor
        elif name not in (*_TABLES, OUTPUT) and not _UNSET.fullmatch(name):
            unknown.append(name)
    if unknown:
        raise ConfigError(f"--format huggingface: {architecture} has no place for {', '.join(unknown)}")
    source, target = (weights[name] for name in _TABLES)
    if architecture == POST_NORM:
        tables = {"model.encoder.embed_tokens.weight": source, "model.decoder.embed_tokens.weight": target,
                  "model.decoder.output_projection.weight": weights[OUTPUT]}  # fmt: skip
        kept = "model.decoder.embed_tokens.weight"
    else:
        # it has one number of words: more rows for the source are never looked up
        source = torch.cat([source, source.new_zeros(len(target) - len(source), source.size(1))])
        tables = {"model.shared.weight": source, "model.encoder.embed_tokens.weight": source,
                  "model.decoder.embed_tokens.weight": target, "lm_head.weight": weights[OUTPUT]}  # fmt: skip
        kept = "model.shared.weight"
    return {**found, **({kept: tables[kept]} if tied else tables)}


def config_of(student: Student, weights: Dict[str, Tensor], tied: bool) -> Dict[str, Any]:
    """What ``config.json`` says."""
    settings, task = student.settings, student.task
    architecture = class_for(student)
    rows = [len(weights[name]) for name in _TABLES]
    words = {"src_vocab_size": rows[0], "tgt_vocab_size": rows[1]}
    config = {
        "architectures": [architecture],
        "model_type": _TYPES[architecture],
        "langs": [task.cfg.source_lang, task.cfg.target_lang],
        **(words if architecture == POST_NORM else {"vocab_size": rows[1]}),
        "d_model": settings.encoder_embed_dim,
        "max_position_embeddings": max(student.model.max_positions()),
        "activation_function": HUGGINGFACE_ACTIVATIONS[settings.activation_fn],
        "scale_embedding": not settings.no_scale_embedding,
        "tie_word_embeddings": tied,
        "dropout": settings.dropout,
        "attention_dropout": settings.attention_dropout,
        "activation_dropout": settings.activation_dropout,
        "is_encoder_decoder": True,
        **_SYMBOLS,
        "torch_dtype": "float32",
    }
    for side in SIDES:
        layers = {name.split(".")[2] for name in weights if name.startswith(f"{side}.layers.")}
        config[f"{side}_layers"] = len(layers)
        config[f"{side}_ffn_dim"] = len(weights[f"{side}.layers.0.fc1.bias"])
        config[f"{side}_attention_heads"] = getattr(settings, f"{side}_attention_heads")
        config[f"{side}_layerdrop"] = 0.0
    return config


# fairseq's dictionaries begin with <s>, <pad>, </s>, <unk>; its decoders begin with the end
_SYMBOLS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
OTHERS = 2  # tokens of ``max_length`` that are no words: the first, and the end


def generation_of(student: Student) -> Dict[str, Any]:
    """What ``generation_config.json`` says: to translate as ``fairseq-generate`` does when told nothing.

    It forces the end behind 200 words, or where there are no more positions, forbids padding and nothing at all, and
    stops as soon as a beam is full of ended translations.
    """
    # with its cache FSMT of transformers 5.0 to 5.17 takes every word for the first
    cache = {"use_cache": False} if class_for(student) == POST_NORM else {}
    return {
        **cache,
        **_SYMBOLS,
        "num_beams": BEAM,
        "early_stopping": True,
        "length_penalty": 1.0,
        "max_length": longest_translation(student.model) + OTHERS,
        "min_new_tokens": 1,
        "forced_eos_token_id": 2,
        "suppress_tokens": [1],
    }


def _write_json(path: str, values: Dict[str, Any]) -> None:
    with written_whole(path) as file:
        file.write((json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


def _write_weights(folder: str, weights: Dict[str, Tensor]) -> None:
    """As safetensors, where there is that library."""
    try:
        from safetensors.torch import save
    except ImportError:
        with written_whole(os.path.join(folder, _PICKLED)) as file:
            torch.save(weights, file)
        return
    # it refuses tensors that share memory
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    with written_whole(os.path.join(folder, _SAFE)) as file:
        file.write(save(copies, metadata={"format": "pt"}))
