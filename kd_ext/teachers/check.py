"""What is asked of a teacher before there is any training."""

import logging
from typing import Any, Dict, Optional

import torch

from kd_ext.errors import ConfigError, in_short
from kd_ext.modules.input_format import InputFormat
from kd_ext.modules.positions import Positions
from kd_ext.teachers.kinds import FLAG, SIDES, Kind

logger = logging.getLogger(__name__)

_SENTENCES, _LENGTH = 2, 4


def in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {in_short(error)}"


def check_direction(kind: Kind, student_task: Any) -> None:
    """Refuse one that translates the other way: with a joined dictionary nothing else would show it."""
    own = tuple(getattr(kind.cfg, side, None) for side in SIDES)
    wanted = tuple(getattr(student_task.cfg, side, None) for side in SIDES)
    if None not in own and own[0] != own[1] and own == wanted[::-1]:
        raise ConfigError(
            f"{FLAG} {kind.path}: it translates from {own[0]} to {own[1]}, and is wanted from {wanted[0]} to "
            f"{wanted[1]}; name a model of that direction"
        )
    pair, reverse = "-".join(map(str, kind.pair)), "-".join(map(str, kind.pair[::-1]))
    pairs = kind.trained_pairs()
    if pairs and None not in kind.pair and pair not in pairs:
        if reverse in pairs:
            raise ConfigError(
                f"{FLAG} {kind.path}: it translates {', '.join(pairs[:8])}{', ...' if len(pairs) > 8 else ''}, and is "
                f"wanted for {pair}; name a model of that direction"
            )
        logger.warning("%s: it was not trained on %s itself, for which it is asked", kind.path, pair)
    for asked, of_run in zip(kind.pair, wanted):
        if asked is not None and asked != of_run and of_run in kind.languages():
            logger.warning(
                "%s: asked for %s, by its file or an override, in a run of %s, a language that it has as well",
                *(kind.path, asked, of_run),
            )


def check_lengths(path: str, model: Any, layout: Optional[InputFormat], student_task: Any) -> None:
    """See that no sentence of the student is too long for the teacher."""
    added = layout.added if layout is not None else (0, 0)
    limits = [most - more for most, more in zip(model.max_positions(), added)]
    sides = list(zip(("source", "target"), limits, student_task.max_positions()))
    if any(theirs < ours for _, theirs, ours in sides):
        given = " ".join(f"--max-{side}-positions {ours}" for side, theirs, ours in sides if theirs < ours)
        wanted = " ".join(f"--max-{side}-positions {theirs}" for side, theirs, ours in sides if theirs < ours)
        raise ConfigError(f"{given}: more than the teacher {path} takes; use {wanted}")


def check_is_encoder_decoder(path: str, model: Any, arch: str) -> None:
    if not all(hasattr(model, part) for part in ("encoder", "decoder")):
        raise ConfigError(
            f"{FLAG} {path}: its architecture {arch} has no encoder and decoder, which a student learns from; name the "
            "checkpoint of a translation model"
        )


def look(path: str, model: Any, arch: str, layout: Optional[InputFormat], student_task: Any) -> None:
    """Ask a model once, about a few words, as it will be asked in training.

    Raises:
        ConfigError: it wants other inputs, or what it says are not probabilities of the student's words
    """
    sample = _few_words(student_task, layout)
    words = len(student_task.target_dictionary)
    everywhere = torch.ones_like(sample["net_input"]["prev_output_tokens"], dtype=torch.bool)
    try:
        asked = sample["net_input"]
        if layout is not None:
            asked, _ = layout.apply(asked, Positions(everywhere))
        with torch.inference_mode():
            output = model.eval()(**asked)
            probs = model.get_normalized_probs(output, log_probs=False)
    except ConfigError:
        raise
    except Exception as error:  # whatever a model has against it
        raise ConfigError(
            f"{FLAG} {path}: its architecture {arch} cannot be asked for the next word by src_tokens, src_lengths and "
            f"prev_output_tokens alone ({in_a_line(error)}); name an autoregressive encoder-decoder"
        ) from error
    shape = tuple(probs.shape) if torch.is_tensor(probs) else None
    wanted = tuple(asked["prev_output_tokens"].shape)
    if shape is None or shape[:2] != wanted or shape[2] < words:
        raise ConfigError(
            f"{FLAG} {path}: for {wanted[0]} x {wanted[1]} target tokens and {words} words its architecture {arch} "
            f"gives probabilities of shape {shape}; name a model that gives one for each word of the dictionary"
        )
    total = probs.float().sum(2)
    if not bool(torch.isfinite(total).all()) or not torch.allclose(total, torch.ones_like(total), atol=1e-2):
        raise ConfigError(
            f"{FLAG} {path}: its probabilities are not numbers that add up to 1 (sums: {total.flatten()[:3].tolist()} "
            "...); its weights are damaged, or it is not a model of translation"
        )


def _few_words(student_task: Any, layout: Optional[InputFormat]) -> Dict[str, Any]:
    """Sentences of the first words of the dictionaries, as ``translation`` lays them out."""
    source, target = student_task.source_dictionary, student_task.target_dictionary
    languages = layout.languages if layout is not None else set()

    def sentences(words: Any) -> torch.Tensor:
        some = [i for i in range(words.nspecial, len(words)) if i not in languages][: _SENTENCES * _LENGTH]
        some = some or [words.unk()]
        return torch.tensor([some[i % len(some)] for i in range(_SENTENCES * _LENGTH)]).view(_SENTENCES, _LENGTH)

    eos = torch.full((_SENTENCES, 1), source.eos())
    src = torch.cat([sentences(source), eos], 1)
    prev = torch.cat([eos.new_full((_SENTENCES, 1), target.eos()), sentences(target)], 1)
    for wanted, place in zip(layout.wanted if layout is not None else (), (src[:, 0], prev[:, 1])):
        if wanted is not None:
            place.fill_(wanted)
    lengths = torch.full((_SENTENCES,), src.size(1))
    return {"net_input": {"src_tokens": src, "src_lengths": lengths, "prev_output_tokens": prev}}
