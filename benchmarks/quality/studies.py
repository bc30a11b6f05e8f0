"""The studies: which students are compared, and what each is given beside what all have."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Dict, Iterable, List, Mapping, NamedTuple, Tuple

import recipes
from corpora import CORPORA
from recipes import CHECKPOINT, PLAIN, TEACHER, Model


class Size(NamedTuple):
    """What a study is run with.

    Attributes:
        device: flags of every fairseq command
        training: more of every training
        teacher, student: width, encoder layers, decoder layers
        widths: of narrower and wider students
        factorized: what their embeddings are factorized to
        teacher_updates, longer_updates, longest_updates, tuning_updates: how long each is trained
        student_updates: the same, by corpus
        at_once: trainings that run side by side
        threads: of each
    """

    device: Tuple[str, ...]
    training: Tuple[str, ...]
    teacher: Tuple[int, int, int]
    student: Tuple[int, int, int]
    widths: Tuple[int, int]
    factorized: int
    teacher_updates: int
    longer_updates: int
    longest_updates: int
    student_updates: Dict[str, int]
    tuning_updates: int
    at_once: int
    threads: int

    @property
    def environment(self) -> Dict[str, str]:
        """Of every training."""
        return {"OMP_NUM_THREADS": str(self.threads)}


SIZES = {
    # side by side on one thread each, two trainings take 0.7 of the time that they take in turn on two
    "cpu": Size(
        recipes.CPU,
        (),
        (192, 2, 2),
        (96, 2, 1),
        (64, 128),
        32,
        *(1600, 4000, 10000, {"pair": 1000, "languages": 1500}, 200),
        *(2, 1),
    ),
    "gpu": Size(
        ("--fp16",),
        ("--max-tokens", "8000", "--lr", "1e-3", "--warmup-updates", "1000"),
        (512, 6, 6),
        (256, 6, 2),
        (128, 384),
        64,
        *(6000, 20000, 50000, {"pair": 4000, "languages": 4000}, 500),
        *(3, 2),
    ),
}


class Study(NamedTuple):
    """Students that are compared.

    Attributes:
        question: in one line
        corpus: what they are trained on
        variants: what is different about each, by its name
        against: those that the others are tested against
        equal_time: of those, these are trained again, for as long as the last of `against` takes
        times: as many updates as the size says for its corpus
        adapted: the one that gets an adapter for each language on top
        without: where each variant is compared with one of its own: that, by the variant's name
        plot: what the plot has on its axes: ``scores`` by variant, or ``size`` against score
    """

    question: str
    corpus: str
    variants: Dict[str, Model]
    against: Tuple[str, ...]
    equal_time: Tuple[str, ...] = ()
    times: int = 1
    adapted: str = ""
    without: Mapping[str, str] = MappingProxyType({})
    plot: str = "scores"

    @property
    def teachers(self) -> List[str]:
        """Those of all languages that students learn from."""
        read = [name for model in self.variants.values() for name in model.reads]
        names = [CACHES[name].teacher if name in CACHES else name for name in read]
        return [name for name in dict.fromkeys(names) if TEACHERS["cpu"][name].language is None]

    def label(self, variant: str) -> str:
        """What a variant is called beside those of other studies."""
        return variant if self.times == 1 else f"{variant}, {self.times} times the updates"


class Cache(NamedTuple):
    """What a teacher says of the training set, its `words` most probable ones of each token; a step."""

    teacher: str
    words: int

    @property
    def name(self) -> str:
        return f"{self.teacher}-cache-{self.words}"


def _teachers(size: Size) -> Dict[str, Model]:
    """All there are, by their name."""
    arguments = ("--arch", "transformer", *recipes.dimensions(*size.teacher), *size.training, *PLAIN)
    teacher = Model(TEACHER, "teacher_updates", arguments)
    tuned = ("--finetune-from-model", f"{_LONGER}/{CHECKPOINT}", "--lr", "1e-3", "--warmup-updates", "50")
    return {
        TEACHER: teacher,
        f"{TEACHER}-2": replace(teacher, name=f"{TEACHER}-2", seed=2),
        _LONGER: replace(teacher, name=_LONGER, updates="longer_updates"),
        # after so many epochs dropout of 0.1 would be too little
        _LONGEST: replace(
            teacher, name=_LONGEST, updates="longest_updates", arguments=(*arguments, "--dropout", "0.2")
        ),
        f"{TEACHER}-unsmoothed": replace(
            teacher, name=f"{TEACHER}-unsmoothed", arguments=(*arguments, "--label-smoothing", "0")
        ),
        **{
            f"{TEACHER}-{language}": Model(
                f"{TEACHER}-{language}", "tuning_updates", (*arguments, *tuned), (_LONGER,), language
            )
            for language in CORPORA["languages"].languages
        },
    }


def _studies(size: Size) -> Dict[str, Study]:
    width, encoder, decoder = size.student

    def shape(*more: str, arch: str = "transformer", width: int = width, layers: int = encoder) -> Tuple[str, ...]:
        return ("--arch", arch, *recipes.dimensions(width, layers, decoder), *size.training, *more)

    plain = shape()
    # as many depths as the student has layers, one layer's parameters on each side
    stacked = ("--encoder-recurrent-stacking", str(encoder), "--decoder-recurrent-stacking", str(decoder))
    narrow, wide = size.widths
    bottleneck = str(size.factorized)
    factorized = ("--encoder-factorized-embed-dim", bottleneck, "--decoder-factorized-embed-dim", bottleneck)
    base = f"{encoder} + {decoder} layers of {width}"
    selected = ("--kd-rate", "0.5")
    window = ("--kd-queue-size", "30000")

    def alone(*flags: str, sequence: bool = False) -> Model:
        return Model("", "student_updates", (*plain, *PLAIN, *flags), sequence=sequence)

    def taught(
        strategy: str,
        *flags: str,
        teachers: Tuple[str, ...] = (TEACHER,),
        sequence: bool = False,
    ) -> Model:
        arguments = (
            *plain,
            *_DISTILLED,
            *("--teacher-checkpoint-path", ":".join(f"{name}/{CHECKPOINT}" for name in teachers)),
            *("--kd-strategy", strategy, *flags),
        )
        return Model("", "student_updates", arguments, teachers, sequence=sequence)

    def word(*flags: str, teachers: Tuple[str, ...] = (TEACHER,)) -> Model:
        return taught("word_seq_level", "--alpha", "0.5", *flags, teachers=teachers)

    best = (*plain, "--dropout", "0")
    by_longest = {
        f"word from a cache of 32, longest teacher, alpha {alpha}, dropout 0": alpha for alpha in ("0.5", "1")
    }
    by_alpha = (*_DISTILLED, "--kd-strategy", "word_seq_level", "--alpha")

    def cached(
        words: int,
        teacher: str = TEACHER,
        arch: Tuple[str, ...] = plain,
        alpha: str = "0.5",
    ) -> Model:
        """Of the teacher nothing is read but what a cache has of it."""
        cache = Cache(teacher, words).name
        arguments = (*arch, *by_alpha, alpha, "--teacher-cache-dir", f"{cache}/cache")
        return Model("", "student_updates", arguments, (cache,))

    def alpha_0(arch: Tuple[str, ...] = plain) -> Model:
        return Model("", "student_updates", (*arch, *by_alpha, "0"))

    def strategies(teacher: str) -> Dict[str, Model]:
        by = {"teachers": (teacher,)}
        return {
            "alone": alone(),
            "word, alpha 0.5": word(**by),
            "word, alpha 1": taught("word_level", **by),
            "batch, rate 0.5": taught("batch_level", *selected, **by),
            "global, rate 0.5": taught("global_level", *selected, *window, **by),
        }

    of_pair, language_wise = strategies(TEACHER), ("global_language_wise", *selected, *window)
    specialists = tuple(f"{TEACHER}-{language}" for language in CORPORA["languages"].languages)
    by_language = ",".join(f"{name[len(TEACHER) + 1 :]}={name}/{CHECKPOINT}" for name in specialists)
    shapes = {
        base: plain,
        f"{encoder // 2} + {decoder} layers": shape(layers=encoder // 2),
        f"{encoder * 2} + {decoder} layers": shape(layers=encoder * 2),
        f"width {narrow}": shape(width=narrow),
        f"width {wide}": shape(width=wide),
        "recurrent stacking": shape(*stacked, arch="transformer_ext"),
        f"factorized to {bottleneck}": shape(*factorized, arch="transformer_ext"),
        "both": shape(*stacked, *factorized, arch="transformer_ext"),
        f"both, width {wide}": shape(*stacked, *factorized, arch="transformer_ext", width=wide),
    }
    sequence = {
        "sequence": alone(sequence=True),
        "sequence and word, alpha 0.5": taught("word_seq_level", "--alpha", "0.5", sequence=True),
    }
    return {
        "pair": Study(
            "German to English: what distils best into one student?",
            "pair",
            {
                **of_pair,
                **sequence,
                "two teachers, word, alpha 0.5": word(teachers=(TEACHER, f"{TEACHER}-2")),
                "word from a cache of 32": cached(32),
                _ALPHA_0: alpha_0(),
            },
            ("alone", "word, alpha 0.5"),
            equal_time=("alone", _ALPHA_0, "sequence", "two teachers, word, alpha 0.5", "word from a cache of 32"),
        ),
        "longer": Study(
            "German to English: and if students are trained until they hardly get better?",
            "pair",
            {
                **{name: of_pair[name] for name in ("alone", "word, alpha 0.5")},
                "word, alpha 0.5, longer teacher": word(teachers=(_LONGER,)),
                "word from a cache of 32, longer teacher": cached(32, _LONGER),
                _ALPHA_0: alpha_0(),
            },
            ("alone", "word, alpha 0.5"),
            equal_time=("alone", _ALPHA_0, "word from a cache of 32, longer teacher"),
            times=4,
        ),
        "ahead": Study(
            "German to English: and with a teacher that is well ahead of what its student reaches alone?",
            "pair",
            {  # as the other studies advise for a small student
                _BEST_ALONE: alpha_0(best),
                **{name: cached(32, _LONGEST, best, alpha) for name, alpha in by_longest.items()},
            },
            (_BEST_ALONE, next(iter(by_longest))),
            times=4,
        ),
        "languages": Study(
            "Ten languages with 1,000 to 30,000 pairs: what distils best into one student?",
            "languages",
            {
                **strategies(_LONGER),
                "language-wise, each": taught(*language_wise, teachers=(_LONGER,)),
                "language-wise, shared": taught(*language_wise, "--kd-queue-window", "shared", teachers=(_LONGER,)),
                "a teacher for each, word, alpha 0.5": replace(
                    word("--teacher-checkpoint-path", by_language), reads=specialists
                ),
            },
            ("alone", "word, alpha 0.5"),
        ),
        "size": Study(
            "Ten languages: which small model, distilled or not?",
            "languages",
            {  # by what studies one and two found to be worth its time
                **{f"{name}, alone": alpha_0(arch) for name, arch in shapes.items()},
                **{f"{name}, distilled": cached(32, _LONGER, arch) for name, arch in shapes.items()},
            },
            (),
            adapted=f"{base}, distilled",
            without={
                **{f"{name}, distilled": f"{name}, alone" for name in shapes},
                f"{base}, distilled{ADAPTERS}": f"{base}, distilled",
            },
            plot="size",
        ),
        "ablations": Study(
            "German to English: what do the settings do?",
            "pair",
            {
                **{name: of_pair[name] for name in ("alone", "word, alpha 0.5")},
                **{
                    f"global, rate {rate}": taught("global_level", "--kd-rate", rate, *window)
                    for rate in ("0.25", "0.5", "0.75", "1")
                },
                # about 1,000 target tokens a batch
                **{
                    f"global, rate 0.5, window of {batches} batches": taught(
                        "global_level", *selected, "--kd-queue-size", str(1000 * batches)
                    )
                    for batches in (1, 3, 10, 100)
                },
                "word, temperature 2": word("--kd-temperature", "2"),
                **{f"word from a cache of {words}": cached(words) for words in (8, 32, 128)},
                "word, unsmoothed teacher": word(teachers=(f"{TEACHER}-unsmoothed",)),
                **{f"alone, dropout {rate}": alone("--dropout", rate) for rate in ("0", "0.3")},
                **{f"word, dropout {rate}": word("--dropout", rate) for rate in ("0", "0.3")},
            },
            ("alone", "word, alpha 0.5"),
        ),
    }


_LONGER = "teacher-longer"
_LONGEST = "teacher-longest"
# the loss of those that are distilled, without a teacher: it takes less time than fairseq's
_ALPHA_0 = "alone, alpha 0"
_BEST_ALONE = f"{_ALPHA_0}, dropout 0"
_DISTILLED = ("--task", "translation_with_kd", "--criterion", "label_smoothed_cross_entropy_with_kd")
ADAPTERS = ", an adapter for each language"
CACHES = {cache.name: cache for cache in map(Cache, [TEACHER] * 3 + [_LONGER, _LONGEST], [8, 32, 128, 32, 32])}
TEACHERS = {name: _teachers(size) for name, size in SIZES.items()}
STUDIES = {name: _studies(size) for name, size in SIZES.items()}


class Run(NamedTuple):
    """One training of a variant."""

    variant: str
    model: Model
    updates: int


def named(variant: str, model: Model, seed: int) -> Model:
    """One run of a variant; of what two studies have in common there is one."""
    name = "-".join("".join(c if c.isalnum() or c == "." else " " for c in variant).split())
    return replace(model, name=f"{name}-seed{seed}", seed=seed)


def runs(study: Study, size: Size, seeds: Iterable[int]) -> List[Run]:
    """All of equal updates, each seed of every variant before the next seed."""
    updates = size.student_updates[study.corpus] * study.times
    return [
        Run(study.label(variant), named(study.label(variant), model, seed), updates)
        for seed in seeds
        for variant, model in study.variants.items()
    ]


def in_equal_time(label: str) -> str:
    """What a variant is called that is trained for as long as the others, not for as many updates."""
    return f"{label}, equal time"


def longer(study: Study, size: Size, seeds: Iterable[int], speeds: Dict[str, float]) -> List[Run]:
    """All of equal time.

    Args:
        study: whose
        size: what it is run with
        seeds: of the runs
        speeds: updates a second of each variant
    """
    found = []
    for seed in seeds:
        for variant in (name for name in study.equal_time if name in speeds):
            name = in_equal_time(study.label(variant))
            updates = size.student_updates[study.corpus] * study.times * speeds[variant] / speeds[study.against[-1]]
            # of 0 updates fairseq never ends
            found.append(Run(name, named(name, study.variants[variant], seed), max(round(updates / 10), 1) * 10))
    return found


def adapters(study: Study, size: str, seeds: Iterable[int]) -> List[Run]:
    """One for each language, on top of what has been trained."""
    found = []
    for seed in seeds if study.adapted else ():
        base = named(study.adapted, study.variants[study.adapted], seed).name
        for language in CORPORA[study.corpus].languages:
            arguments = (
                *("--arch", "transformer_ext", *recipes.dimensions(*SIZES[size].student), *PLAIN),
                *(*SIZES[size].training, "--lr", "1e-3", "--warmup-updates", "50"),
                *("--load-checkpoint-liberally", "--finetune-from-model", f"{base}/{CHECKPOINT}"),
                *("--encoder-add-adapters", "--encoder-adapter-ids", language, "--encoder-train-adapter", language),
                *("--decoder-add-adapters", "--decoder-adapter-ids", language, "--decoder-train-adapter", language),
            )
            variant = f"{study.adapted}{ADAPTERS}"
            model = named(f"{variant} {language}", Model("", "tuning_updates", arguments, (base,), language), seed)
            found.append(Run(variant, model, SIZES[size].tuning_updates))
    return found


def teachers(those: Iterable[Run], size: str) -> List[Model]:
    """All that the students read, each after those that it reads itself."""
    found: Dict[str, Model] = {}
    read = [name for run in those for name in (*run.model.reads, *([TEACHER] if run.model.sequence else []))]
    for name in [CACHES[name].teacher if name in CACHES else name for name in read]:
        for each in (*TEACHERS[size][name].reads, name):
            found.setdefault(each, TEACHERS[size][each])
    return list(found.values())
