"""Translation with a teacher: the flags of the task, the teacher's owner, and what is saved of a run."""

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Union

import torch
from fairseq import utils
from fairseq.models import BaseFairseqModel
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from kd_ext.errors import ConfigError
from kd_ext.files import trained_with
from kd_ext.modules.teacher import Teacher
from kd_ext.modules.token_selection import STRATEGIES, TokenSelector
from kd_ext.parsing import check_path, warn_of_repeated
from kd_ext.tasks.checks import check_parts, check_student
from kd_ext.tasks.languages import SIDE_FLAG, SIDES, Languages, find_languages
from kd_ext.tasks.word_numbers import check_binarized
from kd_ext.teachers.assignment import is_by_language, named_paths, read_assignment, require_any
from kd_ext.teachers.by_language import BringsParts, SplitByTeacher, TeachersByLanguage
from kd_ext.teachers.cached import BringsOutput, CachedTeacher, TeacherSource
from kd_ext.teachers.load import Source, identify_teacher, load_teacher
from kd_ext.upstream.command_line import list_flags
from kd_ext.upstream.held_folder import list_inputs

logger = logging.getLogger(__name__)

CRITERION = "label_smoothed_cross_entropy_with_kd"
DTYPES = ("float32", "float16", "bfloat16")
_OF_TEACHERS = ("--teacher-model-overrides", "--teacher-user-dir", "--teacher-ema", "--teacher-dtype")


@dataclass
class TranslationWithKDConfig(TranslationConfig):
    kd_strategy: str = field(
        default="word_seq_level",
        metadata={"help": "what is distilled: " + ", ".join(STRATEGIES)},
    )
    teacher_checkpoint_path: Optional[str] = field(
        default=None,
        metadata={
            "help": "checkpoint of the teacher; several joined by ':' are an ensemble; hi=a.pt,ta=b.pt,...=c.pt, or a "
            "file of such lines: a teacher for each language, and for the rest"
        },
    )
    teacher_model_overrides: str = field(
        default="{}",
        metadata={"help": "a dictionary that overrides the teacher's saved settings, as --model-overrides"},
    )
    teacher_user_dir: Optional[str] = field(
        default=None,
        metadata={"help": "a second user module, in which the teacher's architecture is registered"},
    )
    teacher_ema: bool = field(
        default=False,
        metadata={"help": "use the averaged weights that a teacher's --store-ema kept"},
    )
    teacher_dtype: Optional[str] = field(
        default=None,
        metadata={"help": "precision of the teacher: float32, float16 or bfloat16; default: the student's"},
    )
    kd_language_tag: str = field(
        default="__src__",
        metadata={
            "help": "prefix of the token that names a sentence's language, for global_language_wise and for teachers "
            "by language; '__tgt__' for one-to-many models"
        },
    )
    kd_language_tags: Optional[str] = field(
        default=None,
        metadata={"help": "in place of a prefix, the tags: joined by commas, or a file with one in each line"},
    )
    kd_language_side: str = field(
        default="source",
        metadata={"help": "where the tags are: source or target"},
    )
    teacher_cache_dir: Optional[str] = field(
        default=None,
        metadata={"help": "folder of what the teacher said of each training sentence: it is asked once"},
    )
    teacher_cache_top_k: Optional[int] = field(
        default=None,
        metadata={"help": "how many of the most probable words are kept of each token; 32 for a new cache"},
    )


list_flags(TranslationWithKDConfig, "--task translation_with_kd")
list_inputs("--teacher-checkpoint-path", lambda cfg: named_paths(getattr(cfg, "teacher_checkpoint_path", None)))


def given_flags(cfg: Any) -> List[str]:
    """Those of this task's own flags that ask for something, with their values, as they are typed."""
    fields = TranslationWithKDConfig.__dataclass_fields__
    values = {name: getattr(cfg, name) for name in TranslationWithKDConfig.__annotations__}
    return [
        f"--{name.replace('_', '-')}{'' if value is True else f' {value}'}"
        for name, value in values.items()
        if value not in (None, "", fields[name].default)
    ]


@register_task("translation_with_kd", dataclass=TranslationWithKDConfig)
class TranslationWithKDTask(TranslationTask):
    """Translation whose training is guided by a frozen teacher.

    The task owns the teacher, which is in no checkpoint, and the token selector, whose queues are in every one.
    Nothing of the teacher is needed to validate a student or to translate with it.

    Attributes:
        trained_with: what must not change in mid-training, as :mod:`kd_ext.files.trained_with` has it
        split: which sentences of a batch are of which teacher, where there are several by language

    Raises:
        ConfigError: from ``setup_task`` or ``build_criterion`` where a flag cannot be used
    """

    # read by kd_ext.upstream.resume
    restores_state = True

    def __init__(self, cfg, src_dict, tgt_dict):
        super().__init__(cfg, src_dict, tgt_dict)
        self.selector: Optional[TokenSelector] = None
        self._languages: Optional[Languages] = None
        self._builds_student = False
        self._student: Optional[BaseFairseqModel] = None
        self._architecture: Optional[str] = None
        self._cached_teacher: Optional[CachedTeacher] = None
        self.split: Optional[SplitByTeacher] = None
        self._prepare_cache: Optional[Callable[[], None]] = None
        self.trained_with = trained_with.of_dictionaries(src_dict, tgt_dict)

    @classmethod
    def setup_task(cls, cfg, **kwargs):
        warn_of_repeated()
        if cfg.kd_strategy not in STRATEGIES:
            raise ConfigError(f"--kd-strategy {cfg.kd_strategy}: unknown; one of {', '.join(STRATEGIES)}")
        if cfg.teacher_cache_top_k is not None and not cfg.teacher_cache_dir:
            raise ConfigError(
                f"--teacher-cache-top-k {cfg.teacher_cache_top_k}: there is no cache; name a --teacher-cache-dir"
            )
        if cfg.kd_language_side not in SIDES:
            raise ConfigError(f"{SIDE_FLAG} {cfg.kd_language_side}: unknown; one of {', '.join(SIDES)}")
        if cfg.teacher_dtype not in (None, *DTYPES):
            raise ConfigError(f"--teacher-dtype {cfg.teacher_dtype}: unknown; one of {', '.join(DTYPES)}")
        task = super().setup_task(cfg, **kwargs)
        check_parts(task)
        return task

    def build_model(self, cfg, from_checkpoint=False):
        # validation and generation build their models from a checkpoint: only training needs a teacher
        self._builds_student = not from_checkpoint
        self._student = super().build_model(cfg, from_checkpoint)
        self._architecture = getattr(cfg, "arch", None) or getattr(cfg, "_name", None)
        return self._student

    def load_dataset(self, split, epoch=1, combine=False, **kwargs):
        super().load_dataset(split, epoch, combine, **kwargs)
        if self.trains or self._cached_teacher is not None:
            pairs, folders = self.datasets[split], utils.split_paths(self.cfg.data)
            name = f"{folders[(epoch - 1) % len(folders)]}: the {{}} of its {split} set"
            check_binarized(pairs.src, len(self.source_dictionary), name.format("source"))
            check_binarized(pairs.tgt, len(self.target_dictionary), name.format("target"))

    def build_criterion(self, cfg):
        # validation takes the settings of the checkpoint, and any criterion
        unused = given_flags(self.cfg) if self.trains and cfg._name != CRITERION else []
        if unused:
            raise ConfigError(
                f"{', '.join(unused)}: --criterion {cfg._name} distils nothing, and has no use for that; use "
                f"--criterion {CRITERION}, or leave it out"
            )
        if self.trains and cfg._name == CRITERION and self._student is not None:
            check_student(self._student, self._architecture)
        return super().build_criterion(cfg)

    @property
    def trains(self) -> bool:
        """Whether there is training to come."""
        return self._builds_student

    @property
    def languages(self) -> Languages:
        """Those of the training set, which is looked at when they are asked for first.

        Raises:
            ConfigError: the tags that the settings name cannot be used
        """
        if self._languages is None:
            self._languages = find_languages(self)
        return self._languages

    def load_teacher(self, temperature: float) -> Union[Teacher, TeachersByLanguage, CachedTeacher, None]:
        """Load what ``--teacher-checkpoint-path`` names; None if there is no training to come."""
        if not self.trains:
            return None
        if self.cfg.left_pad_target and self.cfg.num_batch_buckets:  # every word then follows padding (0.12.2)
            raise ConfigError(
                f"--left-pad-target --num-batch-buckets {self.cfg.num_batch_buckets}: fairseq then puts what a decoder "
                "begins with before a target's padding, where no teacher was trained; leave one of the two out"
            )
        teacher = self.open_cache(temperature) if self.cfg.teacher_cache_dir else self._teacher_source().load()
        self.trained_with[trained_with.TEACHER] = teacher.identity
        return teacher

    def open_cache(self, temperature: float, mends: bool = False) -> CachedTeacher:
        """The cache in ``--teacher-cache-dir``. Its teacher is loaded together with the training set, if need be."""
        unused = [flag for flag in given_flags(self.cfg) if flag.split()[0] in _OF_TEACHERS]
        if unused and not self.cfg.teacher_checkpoint_path:
            raise ConfigError(
                f"{', '.join(unused)}: there is no teacher to load beside --teacher-cache-dir "
                f"{self.cfg.teacher_cache_dir}; name one by --teacher-checkpoint-path, or leave it out"
            )
        check_path("--teacher-cache-dir", self.cfg.teacher_cache_dir)
        source = self._teacher_source(one_by_one=mends)
        folder, top_k = self.cfg.teacher_cache_dir, self.cfg.teacher_cache_top_k
        self._cached_teacher = CachedTeacher(folder, top_k, temperature, source, student_task=self, mends=mends)
        return self._cached_teacher

    def teacher_dtype(self, of_student: torch.dtype) -> torch.dtype:
        """In which the teacher runs."""
        return getattr(torch, self.cfg.teacher_dtype) if self.cfg.teacher_dtype else of_student

    @property
    def names_teachers_by_language(self) -> bool:
        return is_by_language(self.cfg.teacher_checkpoint_path)

    def _teacher_source(self, one_by_one: bool = False) -> TeacherSource:
        """What ``--teacher-checkpoint-path`` names; of several teachers one after the other is in memory, if asked."""
        path = self.cfg.teacher_checkpoint_path
        if not self.names_teachers_by_language:
            return TeacherSource(path, partial(self._identify, path), partial(self._load, path))
        require_any(path)
        languages = self.languages
        assignment = read_assignment(path, languages.pools, languages.names, languages.counts)
        identify = partial(assignment.identity, languages.identity)
        self.split = split = SplitByTeacher(assignment.of_pools, languages.of_batch, self.source_dictionary.pad())
        load = [partial(self._load, of_one) for of_one in assignment.paths]
        return TeacherSource(
            path,
            lambda: identify([self._identify(of_one) for of_one in assignment.paths]),
            lambda: TeachersByLanguage(load, split, identify, keeps_all=not one_by_one),
        )

    def _identify(self, path: str) -> str:
        return identify_teacher(self._source(path), self)

    def _load(self, path: Optional[str]) -> Teacher:
        return load_teacher(self._source(path), self)

    def _source(self, path: Optional[str]) -> Source:
        cfg = self.cfg
        return Source(path, cfg.teacher_model_overrides, cfg.teacher_user_dir, cfg.teacher_ema)

    def get_batch_iterator(self, dataset, max_tokens=None, max_sentences=None, max_positions=None, **kwargs):
        get_batches = partial(super().get_batch_iterator, dataset, max_tokens, max_sentences, max_positions, **kwargs)
        if dataset is not self.datasets.get(self.cfg.train_subset):
            return get_batches()
        if self._cached_teacher is None:
            batches = get_batches()
            if self.split is not None and not isinstance(batches.collate_fn, BringsParts):
                batches.collate_fn = BringsParts(batches.collate_fn, self.split)
            return batches
        if self._student is not None:
            # of a model that is sharded nothing is left in the student, whose weights are float32
            of_student = next((parameter.dtype for parameter in self._student.parameters()), torch.float32)
            self._cached_teacher.place(torch.device("cpu"), self.teacher_dtype(of_student))  # the criterion moves it
        prepare = partial(self._cached_teacher.prepare, dataset, max_positions, kwargs.get("epoch", 1))
        is_first = not self._cached_teacher.is_prepared
        if is_first:
            prepare()  # before there are batches: a flag may be wrong
        batches = get_batches()
        if not isinstance(batches.collate_fn, BringsOutput):  # fairseq keeps it from one epoch to the next
            batches.collate_fn = BringsOutput(batches.collate_fn, self.target_dictionary.pad())
        # Files of other data are opened when they are used: after the last epoch fairseq asks for more data.
        self._prepare_cache = partial(self._open_for, batches.collate_fn, None if is_first else prepare)
        return batches

    def _open_for(self, collate: BringsOutput, prepare: Optional[Callable[[], None]]) -> None:
        if prepare is not None:
            prepare()
        if not self._cached_teacher.mends:  # that reads by itself
            collate.files = self._cached_teacher.files

    def begin_epoch(self, epoch, model):
        super().begin_epoch(epoch, model)
        if self._prepare_cache is not None:
            self._prepare_cache()
            self._prepare_cache = None

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        if ignore_grad:  # a worker whose shard has run out repeats a batch of others
            sample = {**sample, "is_dummy": True}
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)

    def optimizer_step(self, optimizer, model, update_num):
        # --fp16 raises an error on overflow and never comes here; --amp skips the update and lowers its scale
        scaler = optimizer.scaler if isinstance(optimizer, AMPOptimizer) else None
        scale = scaler.get_scale() if scaler is not None else None
        super().optimizer_step(optimizer, model, update_num)
        if self.selector is not None and (scaler is None or scaler.get_scale() >= scale):
            self.selector.commit()

    def state_dict(self) -> Dict[str, Any]:
        state = {**super().state_dict(), trained_with.KEY: self.trained_with}
        if self.selector is not None and self.selector.needs_queue:
            state["kd"] = {"strategy": self.cfg.kd_strategy, "queues": self.selector.state_dict()}
            if self.selector.window != "each":
                state["kd"].update(window=self.selector.window, pools=self.selector.pools)
            if self.selector.by_language:
                state["kd"]["languages"] = self.languages.identity
        return state

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        state = dict(state_dict)
        trained_with.check_same(state.pop(trained_with.KEY, {}), self.trained_with, self.cfg)
        saved = state.pop("kd", None)
        super().load_state_dict(state)
        if self.selector is None or not self.selector.needs_queue:
            return
        kind = _kind_of_queues(self.cfg.kd_strategy, self.selector.window)
        saved_kind = _kind_of_queues(saved["strategy"], saved.get("window", "each")) if saved else "none"
        if saved is None or saved_kind != kind:
            logger.warning(
                "the checkpoint has no queues of --kd-strategy %s (its own: %s); they start empty", kind, saved_kind
            )
            return
        if self.selector.by_language:
            self._load_queues_by_language(saved)
        else:
            self.selector.load_state_dict(saved["queues"])
        logger.info("restored the queues of --kd-strategy %s: %s tokens", kind, self.selector.sizes())

    def _load_queues_by_language(self, saved: Dict[str, Any]) -> None:
        """By name, as the training set can have other languages by now, and its tags other names."""
        now, before = self.languages, saved.get("languages", self.languages.identity)
        if not now.has_identity(before):
            logger.warning(
                "the queues of the checkpoint are of languages by other tags (%s; now %s); they start empty",
                *(before, now.identity),
            )
            return
        pools = {**{name: now.pools[i] for name, i in now.names.items()}, now.pools[-1]: now.pools[-1]}
        queues = saved["queues"]
        if self.selector.window == "each":
            gone = [name for name in queues if name not in pools]
            if gone:
                logger.warning("the training set has no sentence of %s: what their queues hold is left out", gone)
            queues = {pools[name]: values for name, values in queues.items() if name in pools}
        self.selector.load_state_dict(queues, [pools.get(name, name) for name in saved.get("pools", now.pools)])


def _kind_of_queues(strategy: str, window: str) -> str:
    return strategy + (f" --kd-queue-window {window}" if window != "each" else "")
