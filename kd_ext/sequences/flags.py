"""The command line of ``python -m kd_ext.sequence_distillation``."""

import argparse
import os
from typing import Any, Callable, Dict, Sequence, Tuple

from fairseq import options as fairseq_options

from kd_ext.errors import ConfigError
from kd_ext.parsing import check_path, warn_of_repeated
from kd_ext.sequences.choosing import CHOICES, CLOSENESS
from kd_ext.teachers.assignment import is_by_language
from kd_ext.upstream import torch_compile
from kd_ext.upstream.added_flags import unfold
from kd_ext.upstream.command_line import list_alone
from kd_ext.upstream.eval_bleu import is_post_process

TASK = "translation_with_kd"
_OWN = ("destdir", "subset", "processes", "choose", "closest-by", "with-references", "max-ratio", "min-score")
_OWN += ("rescore", "rescore-model-overrides", "drop-worst", "teacher-user-dir", "teacher-ema")
_OWN += ("kd-language-tag", "kd-language-tags", "kd-language-side")
_USED = {  # of fairseq's flags: the data, the teacher, how it runs, batches, decoding
    *("data", "source_lang", "target_lang", "task", "dataset_impl", "left_pad_source", "required_seq_len_multiple"),
    *("truncate_source", "max_source_positions", "upsample_primary"),
    *("path", "model_overrides", "user_dir", "activate_encoder_adapter", "activate_decoder_adapter", "post_process"),
    *("cpu", "fp16", "bf16", "memory_efficient_fp16", "memory_efficient_bf16", torch_compile.OPTION, "seed"),
    *("max_tokens", "batch_size", "no_progress_bar"),
    *("beam", "max_len_a", "max_len_b", "min_len", "unnormalized", "lenpen", "unkpen"),
    *("temperature", "prefix_size", "no_repeat_ngram_size", "sampling", "sampling_topk", "sampling_topp"),
    *("no_beamable_mm", "diverse_beam_groups", "diverse_beam_strength", "diversity_rate"),
    *("retain_dropout", "retain_dropout_modules"),
    *(name.replace("-", "_") for name in _OWN),
}
_INSTEAD = {  # of those that would do nothing here, what to do
    "gen_subset": "this command's flag is --subset",
    "train_subset": "this command's flag is --subset",
    "nbest": "what is chosen from are all of --beam; leave it out",
    "num_shards": "--processes share the work; leave it out",
    "shard_id": "--processes share the work; leave it out",
    "score_reference": "translations are made here, none is scored; leave it out",
    "constraints": "no sentence here has constraints; leave it out",
    "lm_path": "the teacher alone translates here; leave it out",
    "match_source_len": "each translation would end where its source does, cut off or not; leave it out",
    "replace_unk": "targets are words of the dictionary; leave it out",
    "results_path": "this command's flag is --destdir",
    "max_target_positions": "the teacher's own limit counts; leave it out",
    "skip_invalid_size_inputs_valid_test": "a source too long for the teacher keeps its reference; leave it out",
    "num_batch_buckets": "sentences are read without padding; leave it out",
    "left_pad_target": "sentences are read without padding; leave it out",
    "teacher_checkpoint_path": "this command's flag is --path",
    "teacher_model_overrides": "this command's flag is --model-overrides",
    "teacher_dtype": "this command's flags are --fp16 and --bf16",
    "teacher_cache_dir": "what is kept is in --destdir; leave it out",
    "kd_strategy": "all sentences are translated; give it to fairseq-train",
}
_ONLY_WITH: Dict[str, Tuple[Callable[[argparse.Namespace], bool], str]] = {  # whether it does something, and by what
    "closest_by": (lambda args: args.choose == "closest", "--choose closest"),
    "rescore_model_overrides": (lambda args: args.rescore is not None, "--rescore"),
    "max_source_positions": (lambda args: args.truncate_source, "--truncate-source, as the teacher's own limit counts"),
    **dict.fromkeys(
        ("kd_language_tag", "kd_language_tags", "kd_language_side"),
        (lambda args: is_by_language(args.path), "a teacher for each language, --path hi=a.pt,...=base.pt"),
    ),
}


# a flag, what its value has to be where it has one, and the end of the line otherwise
_RANGES: Tuple[Tuple[str, Callable[[Any], bool], str], ...] = (
    ("processes", lambda value: value >= 1, "out of range; a number over 0"),
    ("beam", lambda value: value >= 1, "out of range; a number over 0"),
    ("max_tokens", lambda value: value >= 1, "out of range; a number over 0"),
    ("batch_size", lambda value: value >= 1, "out of range; a number over 0"),
    ("prefix_size", lambda value: value >= 0, "out of range; 0 for none"),
    ("min_score", lambda value: value == value, "not a number to compare scores with; such as -2.5"),
    ("post_process", is_post_process, "unknown to fairseq; such as sentencepiece, or subword_nmt"),
    ("max_ratio", lambda value: value >= 1, "out of range; a number from 1 on"),
    ("drop_worst", lambda value: 0 <= value < 1, "out of range; a share from 0 to under 1"),
    ("sampling_topp", lambda value: value <= 1, "out of range; a share of the probability"),
    ("task", lambda value: value == TASK, "the data is read as by translation; leave the flag out"),
)


def parse(arguments: Sequence[str], description: str) -> argparse.Namespace:
    """The flags of fairseq-generate and this command's own.

    Args:
        arguments: of the command
        description: for ``--help``

    Raises:
        ConfigError: one is missing or out of range
    """
    parser = fairseq_options.get_generation_parser(default_task=TASK)
    parser.prog, parser.description = "python -m kd_ext.sequence_distillation", description
    parser.add_argument("--destdir", metavar="DIR", help="the folder to make")
    parser.add_argument("--subset", default="train", metavar="NAME", help="the set to translate")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="each on a GPU of its own")
    parser.add_argument("--choose", default="best", choices=CHOICES, help="what is taken of the n-best")
    parser.add_argument("--closest-by", default="chrf", choices=CLOSENESS, help="to the reference, a sentence")
    parser.add_argument("--with-references", action="store_true", help="add the pairs of the data themselves")
    parser.add_argument("--max-ratio", type=float, default=9.0, metavar="R", help="of the tokens of the two sides")
    parser.add_argument("--min-score", type=float, metavar="S", help="drop translations with a lower score")
    parser.add_argument("--rescore", metavar="PATH", help="a model of the reverse direction")
    parser.add_argument("--rescore-model-overrides", default="{}", metavar="DICT", help="as --model-overrides, of it")
    parser.add_argument("--drop-worst", type=float, default=0.0, metavar="SHARE", help="by --rescore's scores")
    parser.add_argument("--teacher-user-dir", metavar="DIR", help="as for fairseq-train")
    parser.add_argument("--teacher-ema", action="store_true", help="as for fairseq-train")
    list_alone(parser, [f"--{name}" for name in _OWN])
    warn_of_repeated(arguments)
    args = fairseq_options.parse_args_and_arch(parser, list(arguments))
    check_used(parser.parse_args(list(arguments)), parser)  # as given: fairseq sets some flags by others
    for flag, meaning in (("path", "the teacher"), ("destdir", "the folder to make")):
        if not getattr(args, flag):
            raise ConfigError(f"--{flag} is missing: {meaning}")
    check_path("--destdir", args.destdir)
    args.destdir = args.destdir.rstrip(os.sep) or os.sep
    unfold(args, ("bf16", torch_compile.OPTION))
    _check(args)
    if args.max_tokens is None and args.batch_size is None:
        args.max_tokens = 4000
    return args


def check_used(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse flags that do nothing here: all that are not known to do something.

    Raises:
        ConfigError: there is one
    """
    names = {action.dest for action in parser._actions}
    changed = {name for name in names if getattr(given, name, None) != parser.get_default(name)}
    shown = {name: _shown(name, getattr(given, name)) for name in changed - {"help"}}
    for name, remedy in _INSTEAD.items():
        if name in shown:
            raise ConfigError(f"{shown[name]}: not used here; {remedy}")
    unused = [shown[name] for name in sorted(shown.keys() - _USED)]
    if unused:
        raise ConfigError(f"{' '.join(unused)}: not used here; leave {'it' if len(unused) == 1 else 'them'} out")
    for name, (does_something, needed) in _ONLY_WITH.items():
        if name in shown and not does_something(given):
            raise ConfigError(f"{shown[name]}: does nothing without {needed}")


def _shown(name: str, value: Any) -> str:
    """A flag as it is typed."""
    flag = f"--{name.replace('_', '-')}"
    return flag if isinstance(value, bool) else f"{flag} {value}"


def _check(args: argparse.Namespace) -> None:
    for name, is_right, remedy in _RANGES:
        value = getattr(args, name)
        if value is not None and not is_right(value):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: {remedy}")
    if args.drop_worst and not args.rescore:
        raise ConfigError(f"--drop-worst {args.drop_worst}: by which scores? name a model by --rescore")
    if args.rescore and not args.drop_worst:
        raise ConfigError(f"--rescore {args.rescore}: nothing is dropped; say which share by --drop-worst")
