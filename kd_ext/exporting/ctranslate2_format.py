"""The folder that CTranslate2 reads, made by its own converter of fairseq's checkpoints."""

import inspect
import os
import tempfile
from typing import Any, Dict, Optional, Set

import torch

from kd_ext.errors import ConfigError, in_short
from kd_ext.exporting import folders, seven_bits
from kd_ext.exporting.brought_json import CONFIG
from kd_ext.exporting.fairseq_format import write_checkpoint, write_dictionaries
from kd_ext.exporting.plain import Plain, as_upstream
from kd_ext.exporting.student import Student
from kd_ext.exporting.translators import require_ctranslate2
from kd_ext.files.safe_loading import HAS_SAFE_GLOBALS

# what CTranslate2 can store weights in; on a machine that lacks a kind it takes another when it loads them
QUANTIZATIONS = ("float32", "float16", "bfloat16", "int16", "int8", "int8_float32", "int8_float16", "int8_bfloat16")
# what its converter writes
_FILES = {"model.bin", CONFIG, *(f"{kind}_vocabulary.json" for kind in ("source", "target", "shared"))}
# in config.json, where CTranslate2 passes over it: other folders of its converter's have files of the same names
_MARK, _OURS = "exported_by", "kd_ext.export"
_REST = {"int8_float16": torch.float16, "int8_bfloat16": torch.bfloat16}


def check_folder(path: str) -> None:
    """See that a folder can be written: there is none, or an empty one, or an older one of this format.

    Raises:
        ConfigError: something else is there
    """
    folders.check_folder(path, _written)


def _written(config: Dict[str, Any]) -> Set[str]:
    return _FILES if config.get(_MARK) == _OURS else set()


def write_folder(student: Student, path: str, quantization: str, int8_bits: int) -> Plain:
    """Convert a student, and write the folder whole or not at all; returns what was converted.

    Args:
        quantization: one of :data:`QUANTIZATIONS`
        int8_bits: 7 or 8, of weights in int8

    Raises:
        ConfigError: CTranslate2 refuses it, or it cannot be written
    """
    with folders.folder_written_whole(path) as part, tempfile.TemporaryDirectory() as folder:
        plain = as_upstream(student, folder, one_projection=True)
        checkpoint = os.path.join(folder, "model.pt")
        write_dictionaries(student, folder)
        write_checkpoint(student, plain, checkpoint)
        _convert(student, checkpoint, part, quantization, int8_bits)
    return plain


def _convert(student: Student, checkpoint: str, output: str, quantization: str, int8_bits: int) -> None:
    require_ctranslate2()
    from ctranslate2.converters import FairseqConverter

    rest: Optional[torch.dtype] = None
    if quantization.startswith("int8") and int8_bits == 7:
        rest = _REST.get(quantization, torch.float32)

    class Converter(FairseqConverter):
        """Its own, with a mark, and with weights that are quantized already where they are to have 7 bits."""

        def _load(self):
            spec = super()._load()
            spec.config.add_attribute(_MARK, _OURS)
            if rest is not None:
                seven_bits.quantize(spec, rest)
            return spec

    task = student.task.cfg
    options = {"source_lang": task.source_lang, "target_lang": task.target_lang}
    if not HAS_SAFE_GLOBALS and "unsafe_deserialization" in inspect.signature(FairseqConverter.__init__).parameters:
        # these releases of torch refuse to load any class safely; the file was written a moment ago
        options["unsafe_deserialization"] = True
    converter = Converter(checkpoint, os.path.dirname(checkpoint), **options)
    try:
        converter.convert(output, quantization=None if rest is not None else quantization)
    except OSError:
        raise
    except Exception as error:  # whatever it has against a model
        said = in_short(error)
        raise ConfigError(f"--format ctranslate2: CTranslate2 does not convert {student.path} ({said})") from error
