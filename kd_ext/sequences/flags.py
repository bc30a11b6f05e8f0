"""The command line of ``python -m kd_ext.sequence_distillation``."""

import argparse
import os
from typing import Any, Callable, Sequence, Tuple

from fairseq import options as fairseq_options
from fairseq.data import data_utils

from kd_ext.errors import ConfigError
from kd_ext.sequences.choosing import CHOICES, CLOSENESS
from kd_ext.upstream import torch_compile
from kd_ext.upstream.added_flags import unfold
from kd_ext.upstream.command_line import list_alone

TASK = "translation_with_kd"
_OWN = ("destdir", "subset", "processes", "choose", "closest-by", "with-references", "max-ratio", "min-score")
_OWN += ("rescore", "drop-worst", "teacher-user-dir", "kd-language-tag", "kd-language-tags", "kd-language-side")
_OF_GENERATE = {  # flags of fairseq-generate that would do nothing here, and what to do
    "gen_subset": "this command's flag is --subset",
    "nbest": "what is chosen from are all of --beam; leave it out",
    "num_shards": "--processes share the work; leave it out",
    "score_reference": "translations are made here, none is scored; leave it out",
    "constraints": "no sentence here has constraints; leave it out",
    "lm_path": "the teacher alone translates here; leave it out",
    "replace_unk": "targets are words of the dictionary; leave it out",
}


def _is_known(symbol: Any) -> bool:
    try:
        data_utils.post_process("", symbol)
    except NotImplementedError:
        return False
    return True


# a flag, what its value has to be where it has one, and the end of the line otherwise
_RANGES: Tuple[Tuple[str, Callable[[Any], bool], str], ...] = (
    ("processes", lambda value: value >= 1, "out of range; a number over 0"),
    ("beam", lambda value: value >= 1, "out of range; a number over 0"),
    ("max_tokens", lambda value: value >= 1, "out of range; a number over 0"),
    ("batch_size", lambda value: value >= 1, "out of range; a number over 0"),
    ("prefix_size", lambda value: value >= 0, "out of range; 0 for none"),
    ("min_score", lambda value: value == value, "not a number to compare scores with; such as -2.5"),
    ("post_process", _is_known, "unknown to fairseq; such as sentencepiece, or subword_nmt"),
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
    parser.add_argument("--drop-worst", type=float, default=0.0, metavar="SHARE", help="by --rescore's scores")
    parser.add_argument("--teacher-user-dir", metavar="DIR", help="as for fairseq-train")
    list_alone(parser, [f"--{name}" for name in _OWN])
    args = fairseq_options.parse_args_and_arch(parser, list(arguments))
    for flag, meaning in (("path", "the teacher"), ("destdir", "the folder to make")):
        if not getattr(args, flag):
            raise ConfigError(f"--{flag} is missing: {meaning}")
    args.destdir = args.destdir.rstrip(os.sep) or os.sep
    unfold(args, ("bf16", torch_compile.OPTION))
    _check(args, parser)
    if args.max_tokens is None and args.batch_size is None:
        args.max_tokens = 4000
    return args


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    for name, remedy in _OF_GENERATE.items():
        value = getattr(args, name)
        if value != parser.get_default(name):
            shown = "" if value is True else f" {value}"
            raise ConfigError(f"--{name.replace('_', '-')}{shown}: not used here; {remedy}")
    for name, is_right, remedy in _RANGES:
        value = getattr(args, name)
        if value is not None and not is_right(value):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: {remedy}")
    if args.drop_worst and not args.rescore:
        raise ConfigError(f"--drop-worst {args.drop_worst}: by which scores? name a model by --rescore")
    if args.rescore and not args.drop_worst:
        raise ConfigError(f"--rescore {args.rescore}: nothing is dropped; say which share by --drop-worst")
    if args.max_len_a == 0 and args.max_len_b < args.min_len:
        raise ConfigError(f"--max-len-b {args.max_len_b}: under --min-len {args.min_len}; no translation would do")
