"""A teacher that translates batches, in its own task's format."""

import math
from typing import Any, Dict, List, Sequence

import torch
from torch import Tensor

from kd_ext.errors import ConfigError
from kd_ext.modules.input_format import Beginning
from kd_ext.sequences.choosing import Hypothesis
from kd_ext.teachers.load import Loaded


class Decoder:
    """fairseq's generator with the models of a teacher.

    Args:
        models: of one teacher; they are asked in one way
        task: fairseq's, of the data
        cfg: fairseq's configuration of a generation command
        device: where the models are
        dtype: in which they run

    Raises:
        ConfigError: the models of an ensemble are asked in different ways
    """

    def __init__(self, models: Sequence[Loaded], task: Any, cfg: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._layout = models[0].layout
        self._device, self._prefix_size = device, cfg.generation.prefix_size
        words = models[0].target_dictionary
        if any(one.layout != self._layout or one.target_dictionary.symbols != words.symbols for one in models):
            raise ConfigError(f"--path {cfg.common_eval.path}: its models are asked in different ways; name them apart")
        if self._layout is not None and self._prefix_size > 0:
            raise ConfigError(
                f"--prefix-size {self._prefix_size}: the teacher's task begins its translations by itself; leave it out"
            )
        self._words = task.target_dictionary
        self._models = [one.model for one in models]
        for model in self._models:
            model.prepare_for_inference_(cfg)
            model.to(device=device, dtype=dtype)
        # the student's task for the flags, the teacher's words
        self._task = _WithWords(task, models[0].target_dictionary)
        self._generation = cfg.generation
        self._generators: Dict[Any, Any] = {}

    def translate(self, sample: Dict[str, Any]) -> List[List[Hypothesis]]:
        """The n-best of each sentence of a batch, the best first."""
        net_input = {key: value.to(self._device) for key, value in sample["net_input"].items()}
        begin = self._begin(net_input)
        generator = self._generator(begin.eos)
        found = generator.generate(
            self._models,
            {"net_input": begin.net_input},
            prefix_tokens=begin.prefix if begin.prefix.size(1) else None,
            bos_token=begin.bos,
        )
        longest = min(
            int(generator.max_len_a * begin.net_input["src_tokens"].size(1) + generator.max_len_b),
            generator.max_len - 1,
        )
        own = self._own_heads(net_input, begin)
        return [
            [self._hypothesis(one, longest, begin, head) for one in n_best[: self._generation.beam]]
            for n_best, head in zip(found, own)
        ]

    def _begin(self, net_input: Dict[str, Tensor]) -> Beginning:
        if self._layout is not None:
            return self._layout.beginning(net_input)
        prefix = net_input["prev_output_tokens"][:, 1 : 1 + self._prefix_size]
        plain = {key: net_input[key] for key in ("src_tokens", "src_lengths")}
        return Beginning(plain, prefix, None, None)

    def _generator(self, eos: Any) -> Any:
        if eos not in self._generators:
            more = {} if eos is None else {"eos": eos}
            generator = self._task.build_generator(self._models, self._generation, more)
            if generator.max_len - 1 < generator.min_len:
                raise ConfigError(
                    f"--min-len {generator.min_len}: the teacher's translations have at most {generator.max_len - 1} "
                    "tokens; give a lower one"
                )
            self._generators[eos] = generator
        return self._generators[eos]

    def _own_heads(self, net_input: Dict[str, Tensor], begin: Beginning) -> List[int]:
        """How many of the tokens that a translation was made to begin with are its reference's, and stay."""
        width = begin.prefix.size(1)
        if self._layout is None or width == 0:
            return [width] * len(begin.prefix)
        same = net_input["prev_output_tokens"][:, 1:2].eq(begin.prefix[:, -1:])
        return [int(is_own) for is_own in same.flatten().tolist()]

    def _hypothesis(self, found: Dict[str, Any], longest: int, begin: Beginning, own: int) -> Hypothesis:
        tokens: List[int] = found["tokens"].tolist()
        at_limit = len(tokens) > longest
        if begin.eos is not None and tokens and tokens[-1] == begin.eos:
            tokens.pop()
        if tokens and tokens[-1] == self._words.eos():
            tokens.pop()
        tokens = tokens[begin.prefix.size(1) - own :]
        return Hypothesis(tokens, float(found["score"]) / math.log(2), at_limit)  # as fairseq-generate prints it


class _WithWords:
    """A task with another target dictionary, as it builds a generator."""

    def __init__(self, task: Any, words: Any) -> None:
        self._task, self.target_dictionary = task, words

    def build_generator(self, models: Any, args: Any, more: Dict[str, Any]) -> Any:
        from fairseq.tasks import FairseqTask

        return FairseqTask.build_generator(self, models, args, extra_gen_cls_kwargs=more)
