"""``python -m kd_ext.teacher_dictionary TEACHER DESTDIR``: the dictionaries of a teacher as files.

They have the words that its task appends, the tokens of languages and ``<mask>``, so that a student's text can have
them. ``fairseq-preprocess`` takes them by ``--srcdict`` and ``--tgtdict``.
"""

import argparse
import os
from argparse import Namespace
from types import SimpleNamespace
from typing import Any, List, Optional, Sequence, Tuple

import kd_ext  # noqa: F401  lets fairseq's checkpoints be read
from kd_ext.files.dictionaries import load_dictionary
from kd_ext.files.writing import check_output, make_folder, written_whole
from kd_ext.parsing import Parser
from kd_ext.teachers import reading
from kd_ext.teachers.dictionaries import point_at_dictionaries
from kd_ext.teachers.kinds import find_kind
from kd_ext.teachers.load import Source, import_user_dir

NAMES = ("dict.source.txt", "dict.target.txt")


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Write the two files.

    Raises:
        ConfigError: the teacher's dictionaries cannot be read, or the files cannot be written
    """
    options = _parser().parse_args(arguments)
    source = Source(options.teacher, options.teacher_model_overrides, options.teacher_user_dir)
    dictionaries, read = read_dictionaries(source, options.source_lang, options.target_lang)
    make_folder(options.destdir, "DESTDIR")
    paths = [os.path.join(options.destdir, name) for name in NAMES]
    targets = [check_output(path, [options.teacher, *read], load_dictionary) for path in paths]
    for path, target, words in zip(paths, targets, dictionaries):
        with written_whole(target) as file:
            seen = set(words.symbols[: words.nspecial])
            for index in range(words.nspecial, len(words)):
                # fairseq's mark of a word that is there twice, without which it does not read the file
                again = " #fairseq:overwrite" if words[index] in seen else ""
                file.write(f"{words[index]} {words.count[index]}{again}\n".encode())
                seen.add(words[index])
        print(f"{path}: {len(words)} words")
    same = dictionaries[0].symbols == dictionaries[1].symbols
    print(f"fairseq-preprocess --srcdict {paths[0]} " + ("--joined-dictionary" if same else f"--tgtdict {paths[1]}"))


def read_dictionaries(
    source: Source, source_lang: Optional[str], target_lang: Optional[str]
) -> Tuple[Sequence[Any], List[str]]:
    """Those of source and target, as the teacher's task makes them, and the files that it makes them of."""
    import_user_dir(source.user_dir)
    settings = source.settings()
    state = reading.read(source.path, settings)
    run = SimpleNamespace(cfg=Namespace(source_lang=source_lang, target_lang=target_lang))
    kind = find_kind(source.path, state["cfg"].task, run)
    point_at_dictionaries(kind, settings, run, state)
    reading.let_go(state)
    return kind.dictionaries(kind.setup()), kind.files()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m kd_ext.teacher_dictionary", description=__doc__)
    parser.add_argument("teacher", help="its checkpoint")
    parser.add_argument("destdir", help=f"the folder for {' and '.join(NAMES)}")
    parser.add_argument("-s", "--source-lang", help="for a teacher of several pairs, one of them")
    parser.add_argument("-t", "--target-lang", help="the same")
    parser.add_argument("--teacher-model-overrides", default="{}", help="as for fairseq-train")
    parser.add_argument("--teacher-user-dir", help="as for fairseq-train")
    return parser


if __name__ == "__main__":
    main()
