"""``python -m kd_ext.export``: a student as something else can read it, and a check that two models are one.

Nothing of the teacher is in the result, and of this project no more than a mark: upstream's own ``transformer``, or a
folder of CTranslate2 or of Hugging Face transformers.
"""

import argparse
import math
import os
from typing import Any, List, Optional, Sequence, Tuple

import kd_ext  # noqa: F401  registers the architectures, and lets fairseq's checkpoints be read
from kd_ext.errors import ConfigError
from kd_ext.exporting import ctranslate2_format, fairseq_format, huggingface_format, refusals, sizes
from kd_ext.exporting.comparison import compare
from kd_ext.exporting.huggingface_translator import HuggingFaceTranslator, require_transformers
from kd_ext.exporting.plain import TOLERANCE, as_upstream
from kd_ext.exporting.sentences import Sentences, random_sentences, sentences_for
from kd_ext.exporting.student import Student, load_student
from kd_ext.exporting.translators import (
    BEAM,
    LONGEST,
    CTranslate2Translator,
    FairseqTranslator,
    is_ctranslate2,
    require_ctranslate2,
)
from kd_ext.files.writing import check_output
from kd_ext.models.extension_flags import NO_ADAPTER, SIDES, activation_key
from kd_ext.parsing import Parser

FORMATS = ("fairseq", "ctranslate2", "huggingface")
SENTENCES = 100


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Export a student, or compare two models.

    Raises:
        ConfigError: where a file or an argument cannot be used
    """
    options = _parse(arguments)
    if options.check:
        print(_check(options))
    elif options.format == "fairseq":
        _export_fairseq(options)
    elif options.format == "huggingface":
        _export_huggingface(options)
    else:
        _export_ctranslate2(options)


def _parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = Parser(prog="python -m kd_ext.export", description=__doc__)
    parser.add_argument("checkpoint", nargs="?", help="of a student")
    parser.add_argument("output", nargs="?", help="the file to write with --format fairseq, else the folder")
    parser.add_argument("--format", choices=FORMATS)
    parser.add_argument(
        "--check",
        nargs=2,
        metavar=("A", "B"),
        help="compare two models, each a checkpoint or a folder that was exported",
    )
    parser.add_argument(
        "--quantization",
        choices=ctranslate2_format.QUANTIZATIONS,
        help="with --format ctranslate2, how weights are stored; default: float32",
    )
    parser.add_argument(
        "--int8-bits",
        type=int,
        choices=(7, 8),
        help="of weights in int8; 8 only for CPUs with VNNI, others saturate; default: 7",
    )
    parser.add_argument("--data", metavar="FOLDER", help="of the dictionaries, and maybe of data to compare models on")
    parser.add_argument("-s", "--source-lang", metavar="SOURCE", help="if neither the checkpoint nor the data says it")
    parser.add_argument("-t", "--target-lang", metavar="TARGET", help="if neither the checkpoint nor the data says it")
    for side in SIDES:
        parser.add_argument(
            _flag(activation_key(side)),
            metavar="ID",
            help=f"the {side}'s adapter to write as layers; 'none': no adapter; default: the one that was trained",
        )
    options = parser.parse_args(arguments)
    _check_arguments(options)
    return options


def _check_arguments(options: argparse.Namespace) -> None:
    exporting = ("checkpoint", "output", "format", "quantization", "int8_bits")
    if options.check:
        for name in exporting:
            if getattr(options, name) is not None:
                given = getattr(options, name)
                shown = given if name in exporting[:2] else f"{_flag(name)} {given}"
                raise ConfigError(f"{shown}: not with --check, which writes nothing; leave one of them out")
        return
    if options.checkpoint is None or options.output is None:
        raise ConfigError("what to export is missing: CHECKPOINT OUTPUT --format FORMAT, or --check A B to compare two")
    if options.format is None:
        raise ConfigError("--format is missing: fairseq, ctranslate2 or huggingface")
    if options.format != "ctranslate2" and options.quantization is not None:
        raise ConfigError(
            f"--quantization {options.quantization}: --format {options.format} writes float32; use it with "
            "--format ctranslate2"
        )
    if options.int8_bits is not None and not str(options.quantization).startswith("int8"):
        raise ConfigError(f"--int8-bits {options.int8_bits}: of weights in int8; add --quantization int8")


def _export_fairseq(options: argparse.Namespace) -> None:
    target = check_output(options.output, [options.checkpoint], fairseq_format.check_is_exported)
    folder = os.path.dirname(target)
    student = _load(options)
    refusals.check_upstream(student)
    fairseq_format.check_dictionaries(student, folder)
    plain = as_upstream(student, folder)
    written = fairseq_format.write_files(student, plain, target)
    _report(student, plain.done, [options.output, *written])
    _warn_of_attention(student)
    _print_sizes(student, options.output, sizes.of_model(plain.model))


def _export_ctranslate2(options: argparse.Namespace) -> None:
    require_ctranslate2()
    ctranslate2_format.check_folder(options.output)
    student = _load(options)
    refusals.check_upstream(student)
    refusals.check_ctranslate2(student)
    quantization, bits = options.quantization or "float32", options.int8_bits or 7
    plain = ctranslate2_format.write_folder(student, options.output, quantization, bits)
    precision = f"{quantization}, of {bits} bits" if quantization.startswith("int8") else quantization
    _report(student, [*plain.done, f"weights in {precision}"], [options.output])
    _print_sizes(student, options.output, os.path.getsize(os.path.join(options.output, "model.bin")))
    ours, theirs = FairseqTranslator(student.model, student.task), CTranslate2Translator(options.output)
    if ours.longest_translation < LONGEST:
        print(
            f"it has {ours.longest_translation + 1} positions: give CTranslate2 max_decoding_length="
            f"{ours.longest_translation} or less"
        )
    sentences = _sentences(student, min(ours.longest, theirs.longest))
    print(_compared(ours, theirs, sentences, exact=quantization == "float32"))


def _export_huggingface(options: argparse.Namespace) -> None:
    huggingface_format.check_folder(options.output)
    student = _load(options)
    refusals.check_upstream(student)
    refusals.check_huggingface(student)
    plain = huggingface_format.write_folder(student, options.output)
    _report(student, [*plain.done, f"as {huggingface_format.class_for(student)}"], [options.output])
    _print_sizes(student, options.output, sizes.of_model(plain.model))
    try:
        require_transformers()
    except ConfigError as error:
        print(f"not compared: {error}")
        return
    ours, theirs = FairseqTranslator(student.model, student.task), HuggingFaceTranslator(options.output)
    print(_compared(ours, theirs, _sentences(student, min(ours.longest, theirs.longest)), exact=True))


def _load(options: argparse.Namespace) -> Student:
    adapters = {side: getattr(options, activation_key(side)) for side in SIDES}
    languages = (options.source_lang, options.target_lang)
    student = load_student(options.checkpoint, options.data, languages, adapters)
    refusals.check_adapters(student)
    return student


def _report(student: Student, done: List[str], written: List[str]) -> None:
    parameters = sum(p.numel() for p in student.model.parameters())
    print(f"{student.path}: {parameters:,} parameters, dictionaries of {student.folder}")
    for phrase in done:
        print(f"  {phrase}")
    print(f"wrote {', '.join(written)}")


def _warn_of_attention(student: Student) -> None:
    adapters = student.extensions.decoder.adapters
    if adapters is not None and adapters.active is not None:
        print("--print-alignment and --replace-unk look at the last layer's attention, which is an adapter's now: none")


def _print_sizes(student: Student, output: str, memory: int) -> None:
    before = (student.path, sizes.of_path(student.path), sizes.of_model(student.model))
    for line in sizes.table([before, (output, sizes.of_path(output), memory)]):
        print(line)


def _sentences(student: Student, longest: int) -> Sentences:
    task = student.task
    words = task.source_dictionary
    return sentences_for(student.folder, task.cfg.source_lang, task.cfg.target_lang, words, SENTENCES, longest)


def _check(options: argparse.Namespace) -> str:
    """Compare two models; what was found, in a line."""
    loaded = [_open(path, options) for path in options.check]
    (ours, student), (theirs, other) = loaded
    _check_used(options, [found for found in (student, other) if found])
    for side, a, b in zip(("source", "target"), ours.vocabularies, theirs.vocabularies):
        if a != b:
            raise ConfigError(f"--check {' '.join(options.check)}: their {side} dictionaries are not the same words")
    longest = min(ours.longest, theirs.longest)
    if student or other:
        sentences = _sentences(student or other, longest)
    else:
        sentences = random_sentences(ours.vocabularies[0], SENTENCES, longest)
    return _compared(ours, theirs, sentences)


def _check_used(options: argparse.Namespace, students: List[Student]) -> None:
    """See that there is a checkpoint, of those that were opened, for whatever was said about one."""
    models = f"neither {options.check[0]} nor {options.check[1]}"
    for key in ("data", "source_lang", "target_lang", *map(activation_key, SIDES)):
        asked = getattr(options, key)
        if asked is not None and not students:
            raise ConfigError(f"{_flag(key)} {asked}: for a checkpoint, and {models} is one; leave it out")
    for side in SIDES:
        key = activation_key(side)
        asked = getattr(options, key)
        if asked not in (None, NO_ADAPTER) and not any(getattr(x.extensions, side).adapters for x in students):
            raise ConfigError(f"{_flag(key)} {asked}: {models} has adapters in its {side}; leave it out")


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _open(path: str, options: argparse.Namespace) -> Tuple[Any, Optional[Student]]:
    """A translator, and the student behind it, where it is one of fairseq."""
    if is_ctranslate2(path):
        return CTranslate2Translator(path), None
    if huggingface_format.is_huggingface(path):
        return HuggingFaceTranslator(path), None
    adapters = {side: getattr(options, activation_key(side)) for side in SIDES}
    languages = (options.source_lang, options.target_lang)
    student = load_student(path, options.data, languages, adapters, may_lack_adapters=True)
    return FairseqTranslator(student.model, student.task), student


def _compared(ours: Any, theirs: Any, sentences: Sentences, exact: bool = False) -> str:
    """What was found, in a line; `exact`: they are to be one model but for rounding in float32."""
    found = compare(ours, theirs, sentences.tokens, "translating with both")
    if math.isnan(found.score):
        raise ConfigError(
            "the models cannot be compared: a log-probability is not a number; weights are damaged, or too large for "
            "the precision that they are stored in"
        )
    if exact and found.score > TOLERANCE:
        raise ConfigError(
            f"what was written is another model, do not use it: {found}, where rounding makes less than {TOLERANCE}; "
            "try another release of the library that reads it"
        )
    return f"{found} ({len(sentences.tokens)} sentences {sentences.origin}, beam {BEAM})"


if __name__ == "__main__":
    main()
