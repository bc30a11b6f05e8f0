"""The tasks whose models can teach: what each adds to the dictionaries, and how it has its model asked."""

import os
from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

from fairseq import tasks, utils
from fairseq.data import Dictionary
from fairseq.data.multilingual.multilingual_utils import get_lang_tok
from fairseq.tasks import TASK_REGISTRY
from fairseq.tasks.translation import TranslationTask
from omegaconf import OmegaConf, open_dict

from kd_ext.errors import ConfigError
from kd_ext.files.dictionaries import load_dictionary
from kd_ext.modules.input_format import BEGIN, EOS, HEAD, TAIL, InputFormat, LanguageToken

FLAG = "--teacher-checkpoint-path"
SIDES = ("source_lang", "target_lang")
_MARKS_OF_NLLB = ["<MINED_DATA>", "<MMT_BT_DATA>", "<SMT_BT_DATA>"]


class Pair(NamedTuple):
    """The languages of a student by their names in its teacher's task; None: not one of them."""

    source: Optional[str]
    target: Optional[str]

    def __str__(self) -> str:
        return f"{self.source or '(its own)'}-{self.target or '(its own)'}"


class Kind:
    """``translation``: sentences as they are.

    Args:
        path: of the checkpoint, for messages
        cfg: its task's settings, which are made fit for building a teacher
        student_task: gives the languages and the data
    """

    file_settings: Tuple[str, ...] = ()
    languages_matter = False  # the names of its languages do nothing but name its files

    def __init__(self, path: str, cfg: Any, student_task: Any) -> None:
        self.path, self.cfg = path, cfg
        self._student = student_task.cfg
        if isinstance(cfg, Namespace):
            self._fill_in_defaults()
        self.pair = self._find_pair(student_task.cfg)
        self._find_files()

    def _find_pair(self, student: Any) -> Pair:
        with editable(self.cfg):
            for side in SIDES:
                if side in self.cfg and getattr(self.cfg, side) is None:
                    setattr(self.cfg, side, getattr(student, side))
        return Pair(*(getattr(self.cfg, side, None) or getattr(student, side) for side in SIDES))

    def _fill_in_defaults(self) -> None:
        """Flags of the task that were not there when the teacher was trained."""
        parser = ArgumentParser(allow_abbrev=False, add_help=False)
        TASK_REGISTRY[self.cfg._name].add_args(parser)
        defaults, _ = parser.parse_known_args([""])
        for name, value in vars(defaults).items():
            if not hasattr(self.cfg, name):
                setattr(self.cfg, name, value)

    def _find_files(self) -> None:
        """Where a file of the task's settings is not where it was, it may be beside the checkpoint."""
        for name in self.file_settings:
            recorded = getattr(self.cfg, name, None)
            if not recorded or os.path.isfile(recorded):
                continue
            beside = os.path.join(os.path.dirname(os.path.abspath(self.path)), os.path.basename(recorded))
            if not os.path.isfile(beside):
                raise ConfigError(
                    f"{FLAG} {self.path}: no {recorded}, the {name} of its task, and no {beside}; name the file by "
                    f"--teacher-model-overrides \"{{'{name}': 'file'}}\""
                )
            setattr(self.cfg, name, beside)

    def dictionary_names(self) -> List[str]:
        """The files that the task reads in its folder of data."""
        return [f"dict.{language}.txt" for language in self.pair]

    def students_dictionary_names(self) -> List[str]:
        """The same, named by the student's languages."""
        return [f"dict.{getattr(self._student, side)}.txt" for side in SIDES]

    def name_as_student(self) -> None:
        """Have the task read its dictionaries under those names."""
        self.pair = Pair(*(getattr(self._student, side) for side in SIDES))
        with editable(self.cfg):
            for side, language in zip(SIDES, self.pair):
                setattr(self.cfg, side, language)

    def files(self) -> List[str]:
        """What the task reads beside the checkpoint: dictionaries in its folder of data, and files of its settings."""
        named = (getattr(self.cfg, name, None) for name in self.file_settings)
        return [*(os.path.join(self.cfg.data, name) for name in self.dictionary_names()), *filter(None, named)]

    def setup(self) -> Any:
        """The task.

        Raises:
            ConfigError: a dictionary is damaged
        """
        try:
            return tasks.setup_task(self.cfg)
        except Exception:
            self.read_dictionaries(self.cfg.data, self.dictionary_names())
            raise

    def read_dictionaries(self, folder: str, names: Sequence[str]) -> List[Dictionary]:
        """Those files of a folder.

        Raises:
            ConfigError: one is damaged
        """
        try:
            return [load_dictionary(os.path.join(folder, name)) for name in names]
        except ConfigError as error:
            raise ConfigError(f"{FLAG} {self.path}: its {error}") from error

    def languages(self) -> List[str]:
        """Those that the task has tokens or models for."""
        return []

    def trained_pairs(self) -> List[str]:
        """As ``hi-en``, of a model that could be asked for others; none: not known, or it could not."""
        return []

    def appended_words(self, task: Any) -> List[str]:
        """What the task adds to its dictionaries."""
        return []

    def input_format(self, task: Any, student_task: Any) -> Optional[InputFormat]:
        """How the task lays out a batch; None: as a student's does."""
        return None

    def dictionaries(self, task: Any) -> Tuple[Any, Any]:
        """Of source and target."""
        return task.source_dictionary, task.target_dictionary

    def model_of(self, model: Any) -> Any:
        """What is asked, of what the task built."""
        return model

    def describe(self) -> str:
        """What of the format is not in the weights: it tells apart what one model is asked."""
        return f"asked for {self.pair}" if self.languages_matter else ""

    def _tokens(self, dictionary: Any, words: List[str], student: Any) -> Tuple[int, ...]:
        """Those of the words that a student's sentences can have."""
        return tuple(i for i in map(dictionary.index, words) if i != dictionary.unk() and i < len(student))


class FromPretrainedBart(Kind):
    """``translation_from_pretrained_bart``: mBART, Liu et al. (2020).

    A source ends with its language behind its eos, and the decoder begins with that of the target.
    """

    languages_matter = True

    def languages(self):
        return _words_of(self.cfg.langs)

    def _tokens_of_languages(self) -> List[str]:
        return [f"[{language}]" for language in self.languages()]

    def appended_words(self, task):
        return [*self._tokens_of_languages(), "<mask>"]

    def input_format(self, task, student_task):
        source, target = task.source_dictionary, task.target_dictionary
        known = self.languages()
        of = [d.index(f"[{name}]") if name in known else None for d, name in zip((source, target), self.pair)]
        in_source = self._tokens(source, self._tokens_of_languages(), student_task.source_dictionary)
        in_target = self._tokens(target, self._tokens_of_languages(), student_task.target_dictionary)
        for side, default, own in (("source", of[0], in_source), ("target", of[1], ())):
            _require_language(self, side, default, own, known, student_task)
        return InputFormat(
            source.pad(),
            LanguageToken(TAIL, of[0], in_source),
            LanguageToken(BEGIN, of[1], in_target, ends=True),
            bos=source.bos() if getattr(self.cfg, "prepend_bos", False) else None,
            left_pad_source=utils.eval_bool(self.cfg.left_pad_source),
        )


class MultiSimpleEpoch(Kind):
    """``translation_multi_simple_epoch``: M2M-100, Fan et al. (2021), and NLLB.

    Tokens of languages at the head of sources, targets or both, or in place of a source's eos and of that with which
    a decoder begins.
    """

    languages_matter = True

    file_settings = ("lang_dict", "fixed_dictionary", "source_dict", "target_dict", "sampling_weights_from_file")

    def _find_pair(self, student):
        cfg = self.cfg
        if getattr(cfg, "enable_lang_ids", False):
            raise ConfigError(
                f"{FLAG} {self.path}: its task was told --enable-lang-ids, and the numbers of languages that its model "
                "then reads cannot be given to it; take a teacher that was trained without"
            )
        self._find_files()
        pairs = _words_of(cfg.lang_pairs or [])
        self._trained, self._known = pairs, self._languages_of(pairs)
        found = []
        for side, place in zip(SIDES, (0, 1)):
            name = getattr(cfg, side, None) or getattr(student, side)
            found.append(name if name in self._known else None)
            # one dictionary serves all languages: any of them will do to build the task
            setattr(cfg, side, found[-1] or next((p.split("-")[place] for p in pairs), self._known[0]))
        if cfg.langs:  # by --teacher-model-overrides it may be a text
            cfg.langs = self._known
        cfg.lang_pairs = pairs or [f"{cfg.source_lang}-{cfg.target_lang}"]
        return Pair(*found)

    def languages(self):
        return self._known

    def trained_pairs(self):
        return self._trained

    def _languages_of(self, pairs: List[str]) -> List[str]:
        if self.cfg.lang_dict:
            with open(self.cfg.lang_dict, encoding="utf-8") as file:
                return [line.strip() for line in file if line.strip()]
        if self.cfg.langs:
            return _words_of(self.cfg.langs)
        return sorted({language for pair in pairs for language in pair.split("-")})

    def dictionary_names(self):
        if getattr(self.cfg, "fixed_dictionary", None):
            return []
        pairs = zip(("source_dict", "target_dict"), SIDES)
        return [f"dict.{getattr(self.cfg, side)}.txt" for own, side in pairs if not getattr(self.cfg, own, None)]

    def _words(self) -> List[str]:
        specs, style = _words_of(self.cfg.langtoks_specs), self.cfg.lang_tok_style
        return [get_lang_tok(language, style, spec) for spec in specs for language in self._known]

    def setup(self):
        task = super().setup()
        for words in task.dicts.values():
            for word in self._marks():
                words.add_symbol(word)
        return task

    def _marks(self) -> List[str]:
        """NLLB's own fairseq marks where data came from, behind the languages: no sentence here has them."""
        return _MARKS_OF_NLLB if getattr(self.cfg, "add_data_source_prefix_tags", False) else []

    def appended_words(self, task):
        return [*self._words(), "<mask>", *self._marks()]

    def input_format(self, task, student_task):
        specs = task.args.langtoks["main"]
        names = {"src": self.pair.source, "tgt": self.pair.target}
        replaces, tokens = self.cfg.lang_tok_replacing_bos_eos, []
        sides = (
            ("source", task.source_dictionary, student_task.source_dictionary, EOS if replaces else HEAD),
            ("target", task.target_dictionary, student_task.target_dictionary, BEGIN if replaces else HEAD),
        )
        for spec, (side, words, of_student, place) in zip(specs, sides):
            if not spec:
                tokens.append(None)
                continue
            name, default = names["src" if spec.startswith("src") else "tgt"], None
            if name is not None:
                default = words.index(get_lang_tok(name, self.cfg.lang_tok_style, spec))
                default = None if default == words.unk() else default
            own = self._tokens(words, self._words(), of_student)
            _require_language(self, side, default, () if place == BEGIN else own, self._known, student_task)
            of_target = side == "source" and spec.startswith("tgt")
            tokens.append(LanguageToken(place, default, own, of_target=of_target))
        if tokens == [None, None]:
            return None
        return InputFormat(
            task.source_dictionary.pad(), *tokens, left_pad_source=utils.eval_bool(self.cfg.left_pad_source)
        )


class Multilingual(Kind):
    """``multilingual_translation``: one encoder and decoder for each pair, some of which may be one and the same.

    A language's token may be in place of a source's eos, and of that with which a decoder begins.
    """

    languages_matter = True

    def _find_pair(self, student):
        cfg = self.cfg
        pairs = _words_of(cfg.lang_pairs)
        pair = Pair(*(getattr(cfg, side, None) or getattr(student, side) for side in SIDES))
        if "-".join(pair) not in pairs:
            raise ConfigError(
                f"{FLAG} {self.path}: it has a model for each of {', '.join(pairs)}, and the run is "
                f"{'-'.join(pair)}; name one of them by --source-lang and --target-lang, or by "
                "--teacher-model-overrides \"{'source_lang': ..., 'target_lang': ...}\""
            )
        cfg.source_lang = cfg.target_lang = None  # as in training: a model for each pair is in the file
        self._pairs = pairs
        return pair

    def dictionary_names(self):
        return [f"dict.{language}.txt" for language in self.languages()]

    def languages(self):
        return sorted({language for pair in self._pairs for language in pair.split("-")})

    def appended_words(self, task):
        return [f"__{language}__" for language in self.languages()]

    def dictionaries(self, task):
        return task.dicts[self.pair.source], task.dicts[self.pair.target]

    def input_format(self, task, student_task):
        source, target = self.dictionaries(task)
        tokens = []
        if self.cfg.encoder_langtok:
            own = self._tokens(source, self.appended_words(task), student_task.source_dictionary)
            of_target = self.cfg.encoder_langtok == "tgt"
            tokens.append(LanguageToken(EOS, task.get_encoder_langtok(*self.pair), own, of_target=of_target))
        else:
            tokens.append(None)
        if self.cfg.decoder_langtok:
            own = self._tokens(target, self.appended_words(task), student_task.target_dictionary)
            tokens.append(LanguageToken(BEGIN, task.get_decoder_langtok(self.pair.target), own))
        else:
            tokens.append(None)
        if tokens == [None, None]:
            return None
        return InputFormat(source.pad(), *tokens, left_pad_source=utils.eval_bool(self.cfg.left_pad_source))

    def model_of(self, model):
        return model.models["-".join(self.pair)]


KINDS = {
    "translation_from_pretrained_bart": FromPretrainedBart,
    "translation_multi_simple_epoch": MultiSimpleEpoch,
    "multilingual_translation": Multilingual,
}
# Methods by which a task lays out its batches: one that has them from `translation` has its layout.
_LAYOUT = ("load_dataset", "build_dataset_for_inference", "train_step", "valid_step", "inference_step")


def find_kind(path: str, cfg: Any, student_task: Any) -> Kind:
    """What is known of the task in `cfg`, the settings of a checkpoint's.

    Raises:
        ConfigError: how it has its model asked is not known, or the student's languages are not the teacher's
    """
    name = cfg._name
    if name in KINDS:
        return KINDS[name](path, cfg, student_task)
    task = TASK_REGISTRY[name]
    if issubclass(task, TranslationTask) and (name == "translation_with_kd" or _has_layout_of_translation(task)):
        return Kind(path, cfg, student_task)
    raise ConfigError(
        f"{FLAG} {path}: how its task '{name}' has its model asked is not known here (known: translation, "
        f"{', '.join(KINDS)}); if it is as translation does, --teacher-model-overrides \"{{'task': 'translation'}}\""
    )


def _has_layout_of_translation(task: type) -> bool:
    return all(getattr(task, name) is getattr(TranslationTask, name) for name in _LAYOUT)


def _words_of(setting: Any) -> List[str]:
    """A list that may be a text, with commas."""
    return setting.split(",") if isinstance(setting, str) else list(setting)


def editable(cfg: Any) -> Any:
    """A context in which settings, a Namespace or omegaconf's, may be set."""
    return open_dict(cfg) if OmegaConf.is_config(cfg) else nullcontext()


def _require_language(
    kind: Kind, side: str, default: Optional[int], own: Tuple[int, ...], known: List[str], student_task: Any
) -> None:
    """See that sentences can get the token that the task wants."""
    if default is None and not own:
        given = getattr(student_task.cfg, f"{side}_lang")
        shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        raise ConfigError(
            f"{FLAG} {kind.path}: its task names a {side} language, and --{side}-lang {given} is none of its own "
            f"({shown}); say which by --teacher-model-overrides \"{{'{side}_lang': ...}}\", or have such tokens in the "
            "text, from the dictionary that python -m kd_ext.teacher_dictionary writes"
        )
