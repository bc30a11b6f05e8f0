"""One process's part in translating a training set."""

import hashlib
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import numpy as np
import torch
from fairseq import tasks, utils
from fairseq.data import data_utils

from kd_ext.errors import ConfigError
from kd_ext.files.trained_with import of_dictionaries
from kd_ext.modules.chunked_logits import spans
from kd_ext.modules.compiled_layers import compile_layers
from kd_ext.sequences.blame import REVERSE, TEACHER, blamed
from kd_ext.sequences.choosing import Hypothesis, Taken, choose, failure_of, sentence_metric
from kd_ext.sequences.decoding import Decoder
from kd_ext.sequences.reverse_scores import ReverseScores
from kd_ext.tasks.word_numbers import check_binarized
from kd_ext.teachers.assignment import Assignment, is_by_language, read_assignment, require_any
from kd_ext.teachers.check import in_a_line
from kd_ext.teachers.load import Source, identify_teacher, load_models, load_teacher
from kd_ext.upstream import torch_compile
from kd_ext.upstream.flat_tokens import sentences_of

FORMAT = "kd_ext sequence distillation 2"
TOO_LONG = "long"


class Work:
    """A part A of the data ``A:B`` and what is made of it.

    Args:
        cfg: fairseq's configuration of a generation command
        options: this command's own flags
        part: which of the folders that ``data`` names, from 0
    """

    def __init__(self, cfg: Any, options: Any, part: int) -> None:
        self.cfg, self.options = cfg, options
        self.folder = utils.split_paths(cfg.task.data)[part]
        cfg.task.train_subset = options.subset  # whose tags are looked at
        try:
            self.task = tasks.setup_task(cfg.task)
            self.task.load_dataset(options.subset, epoch=part + 1, combine=True)
        except ConfigError:
            raise
        except Exception as error:  # of many kinds: no folder, no languages in the names of its files, no such set
            raise ConfigError(
                f"{self.folder} --subset {options.subset}: cannot be read ({in_a_line(error)}); name the folder that "
                "fairseq-preprocess wrote, and a set in it"
            ) from error
        self.dataset = self.task.dataset(options.subset)
        if self.dataset.tgt is None:
            raise ConfigError(f"{self.folder}: --subset {options.subset} has no targets; name data with both sides")
        for side, sentences, words in (
            ("source", self.dataset.src, self.task.source_dictionary),
            ("target", self.dataset.tgt, self.task.target_dictionary),
        ):
            check_binarized(sentences, len(words), f"{self.folder}: the {side} of its {options.subset} set")
        self.source, self.target = self.task.cfg.source_lang, self.task.cfg.target_lang
        use_cuda = torch.cuda.is_available() and not cfg.common.cpu
        self.device = torch.device("cuda" if use_cuda else "cpu")
        self.dtype = torch.half if cfg.common.fp16 else torch.bfloat16 if cfg.common.bf16 else torch.float32
        self._assignment = self._read_assignment()
        self._reverse: Optional[Source] = None
        if options.rescore:
            self._reverse = Source(options.rescore, options.rescore_model_overrides, options.teacher_user_dir)
        # of each teacher its own, one teacher after the other
        self.batches, self._teachers = [], []
        for teacher, sentences in enumerate(self._sentences_of_teachers()):
            batches = self._batches(sentences)
            self.batches += batches
            self._teachers += [teacher] * len(batches)
        self._check_lengths()

    def _read_assignment(self) -> Optional[Assignment]:
        """Which teacher a language has; None: all have the same."""
        path = self.cfg.common_eval.path
        if not is_by_language(path):
            return None
        with blamed(TEACHER):
            require_any(path)
            languages = self.task.languages
            return read_assignment(path, languages.pools, languages.names, languages.counts)

    def _sentences_of_teachers(self) -> List[np.ndarray]:
        """Which sentences of the set each teacher translates."""
        everything = np.arange(len(self.dataset))
        if self._assignment is None:
            return [everything]
        of_pools = np.array([-1 if teacher is None else teacher for teacher in self._assignment.of_pools])
        found = [everything[:0]]
        for first, last in spans(0, len(everything), 1000):
            sample = self.dataset.collater([self.dataset[i] for i in range(first, last)])
            pools = self.task.languages.of_batch(sample)[sample["id"].argsort()]
            found.append(of_pools[pools.numpy()])
        teachers = np.concatenate(found)
        return [everything[teachers == number] for number in range(len(self._assignment.paths))]

    def _sources(self) -> List[Source]:
        """Of each teacher what the flags say."""
        common, options = self.cfg.common_eval, self.options
        paths = [common.path] if self._assignment is None else self._assignment.paths
        return [Source(path, common.model_overrides, options.teacher_user_dir, options.teacher_ema) for path in paths]

    def _batches(self, sentences: np.ndarray) -> List[np.ndarray]:
        """All of them, the longest sources first: the slowest batch, and the largest, is the first."""
        if len(sentences) == 0:
            return []
        lengths = np.asarray(self.dataset.src_sizes, dtype=np.int64)
        order = sentences[np.lexsort((sentences, -lengths[sentences]))]
        limits = self.cfg.dataset.max_tokens, self.cfg.dataset.batch_size
        # at least one sentence is in a batch
        longest = max(int(lengths[order].max()), limits[0] or 0)
        return data_utils.batch_by_size(
            order,
            num_tokens_fn=lambda i: lengths[i],
            num_tokens_vec=lengths[order],
            max_tokens=longest if limits[0] else None,
            max_sentences=limits[1],
        )

    def _check_lengths(self) -> None:
        """See that in each batch a translation may be as long as it has to be: fairseq's limit goes by its sources."""
        generation, multiple = self.cfg.generation, self.cfg.task.required_seq_len_multiple
        lengths = np.asarray(self.dataset.src_sizes, dtype=np.int64)
        for batch in self.batches:
            width = -(-int(lengths[batch].max()) // multiple) * multiple
            limit = int(generation.max_len_a * width + generation.max_len_b)
            if limit < generation.min_len:
                raise ConfigError(
                    f"--max-len-a {generation.max_len_a} --max-len-b {generation.max_len_b}: {limit} tokens for a "
                    f"source of {width}, under --min-len {generation.min_len}; no translation would do"
                )

    def manifest(self) -> Dict[str, Any]:
        """What tells this work from other work."""
        options, dataset = self.options, self.cfg.dataset
        generation = {_flag(key): str(value) for key, value in sorted(dict(self.cfg.generation).items())}
        return {
            "format": FORMAT,
            "data": self._digest(),
            **of_dictionaries(self.task.source_dictionary, self.task.target_dictionary),
            "teacher": self._identity(),
            "--rescore": self._identity_of_reverse(),
            "--max-tokens": dataset.max_tokens,
            "--batch-size": dataset.batch_size,
            "--seed": self.cfg.common.seed,
            "--left-pad-source": self.cfg.task.left_pad_source,
            "--required-seq-len-multiple": self.cfg.task.required_seq_len_multiple,
            "precision": str(self.dtype),
            **{_flag(key): getattr(options, key) for key in ("choose", "closest_by", "max_ratio")},
            "--post-process": self.cfg.common_eval.post_process,
            **generation,
        }

    def later_flags(self) -> Dict[str, Any]:
        """What decides what is made of the translations: from one start to the next it may be another."""
        names = ("subset", "with_references", "min_score", "drop_worst")
        return {_flag(name): getattr(self.options, name) for name in names}

    def _identity(self) -> str:
        with blamed(TEACHER):
            teachers = [identify_teacher(source, self._student()) for source in self._sources()]
        return (
            teachers[0]
            if self._assignment is None
            else self._assignment.identity(self.task.languages.identity, teachers)
        )

    def _identity_of_reverse(self) -> Optional[str]:
        if self._reverse is None:
            return None
        with blamed(REVERSE):
            return identify_teacher(self._reverse, self._student(True))

    def _digest(self) -> str:
        """Of all sentences, source and target."""
        digest = hashlib.sha256()
        for dataset in (self.dataset.src, self.dataset.tgt):
            for sentences in sentences_of(dataset):
                digest.update(sentences.sizes.astype(np.int64).tobytes())
                digest.update(sentences.tokens.astype(np.int64).tobytes())
        return digest.hexdigest()[:16]

    def _student(self, reverse: bool = False) -> Any:
        """What a teacher is loaded for: the data's words and languages, and no limit of its own to lengths."""
        sides = [(self.source, self.task.source_dictionary), (self.target, self.task.target_dictionary)]
        (source, source_words), (target, target_words) = sides[::-1] if reverse else sides
        cfg = SimpleNamespace(source_lang=source, target_lang=target, kd_strategy="", data=self.cfg.task.data)
        return SimpleNamespace(
            cfg=cfg,
            source_dictionary=source_words,
            target_dictionary=target_words,
            max_positions=lambda: (0, 0),
        )

    def run(self, index: int, processes: int, done: Set[int]) -> Iterator[Any]:
        """Translate every so many-th batch that is not done; gives each one's number and what became of it."""
        if self.device.type == "cuda":
            torch.cuda.set_device(index % torch.cuda.device_count())
        else:
            torch.set_num_threads(max(1, torch.get_num_threads() // processes))
        pending = [number for number in range(len(self.batches)) if number not in done][index::processes]
        if not pending:
            return
        scores, loaded = self._load_reverse(), -1
        for number in pending:
            if self._teachers[number] != loaded:
                loaded = self._teachers[number]
                decoder, longest = self._load(self._sources()[loaded])
            torch.manual_seed(self.cfg.common.seed * 1_000_003 + number)  # --sampling: the same in any process
            yield number, self._batch(self.batches[number], decoder, scores, longest)

    def _load(self, source: Source) -> Tuple[Decoder, int]:
        """What translates, and how long a source may be."""
        with blamed(TEACHER):
            models = load_models(source, self._student())
        added = models[0].layout.added if models[0].layout is not None else (0, 0)
        longest = min(one.model.max_positions()[0] for one in models) - added[0]
        if getattr(self.cfg.common, torch_compile.OPTION, False):
            for one in models:
                compile_layers(one.model)
        return Decoder(models, self.task, self.cfg, self.device, self.dtype), longest

    def _load_reverse(self) -> Optional[ReverseScores]:
        if self._reverse is None:
            return None
        with blamed(REVERSE):
            teacher = load_teacher(self._reverse, self._student(True))
        teacher.place(self.device, self.dtype)
        return ReverseScores(teacher, self.task.source_dictionary, self.device)

    def _batch(
        self, ids: Sequence[int], decoder: Decoder, scores: Optional[ReverseScores], longest: int
    ) -> List[Dict[str, Any]]:
        """What became of each sentence of a batch, in JSON's types."""
        lengths = np.asarray(self.dataset.src_sizes, dtype=np.int64)
        short = [int(i) for i in ids if lengths[i] <= longest]
        found: Dict[int, List[Taken]] = {int(i): [] for i in ids}
        if short:
            sample = self.dataset.collater([self.dataset[i] for i in short])
            for i, n_best in zip(sample["id"].tolist(), decoder.translate(sample)):
                found[i] = self._choose(i, n_best)
        reverse = self._reverse_scores(found, scores)
        return [
            {
                "id": i,
                "taken": [
                    [taken.choice, taken.failure, taken.hypothesis.score, taken.hypothesis.tokens, reverse.get((i, n))]
                    for n, taken in enumerate(kept)
                ],
            }
            for i, kept in found.items()
        ]

    def _choose(self, i: int, n_best: List[Hypothesis]) -> List[Taken]:
        options, reference = self.options, self.tokens_of("target", i)
        source_length, vocabulary = len(self.tokens_of("source", i)), len(self.task.target_dictionary)
        closeness: Optional[Callable[[List[int]], float]] = None
        if options.choose == "closest":
            metric, wanted = sentence_metric(options.closest_by), self.text(reference)

            def closeness(tokens: List[int]) -> float:
                return metric(self.text(tokens), wanted)

        return choose(
            n_best, options.choose, closeness, lambda h: failure_of(h, source_length, options.max_ratio, vocabulary)
        )

    def _reverse_scores(self, found: Dict[int, List[Taken]], scores: Optional[ReverseScores]) -> Dict[Any, float]:
        if scores is None:
            return {}
        pairs = {
            (i, n): (taken.hypothesis.tokens, self.tokens_of("source", i))
            for i, kept in found.items()
            for n, taken in enumerate(kept)
            if not taken.failure
        }
        # the longest first, as a recurrent encoder wants them
        places = sorted((place for place in pairs if scores.takes(*pairs[place])), key=lambda p: -len(pairs[p][0]))
        if not places:
            return {}
        return dict(zip(places, scores(*zip(*(pairs[place] for place in places)))))

    def tokens_of(self, side: str, i: int) -> List[int]:
        """A sentence of the data, without its eos."""
        dataset, words = (
            (self.dataset.src, self.task.source_dictionary)
            if side == "source"
            else (self.dataset.tgt, self.task.target_dictionary)
        )
        tokens: List[int] = dataset[i].tolist()
        return tokens[:-1] if tokens and tokens[-1] == words.eos() else tokens

    def text(self, tokens: List[int]) -> str:
        """Of a target, as ``--post-process`` has it."""
        words = self.task.target_dictionary
        known = torch.tensor([token if token < len(words) else words.unk() for token in tokens], dtype=torch.long)
        return words.string(known, self.cfg.common_eval.post_process)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
