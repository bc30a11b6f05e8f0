"""Text as sentencepieces, the source with its language tags."""

from __future__ import annotations

from pathlib import Path
from typing import Collection, Iterator, List

import sentencepiece
from catalogues import LANGUAGES, Pair, read_pairs, write_pairs
from splitting import SPLITS

VOCABULARY = 4000
MAX_PIECES = 24


def tags(languages: Collection[str]) -> List[str]:
    """Of sources in these languages, and of the target."""
    return [f"__src__{language}" for language in languages] + ["__tgt__en"]


def tagged(pair: Pair) -> str:
    """The source side: the tags name the languages that it is to be translated from and to."""
    return f"__src__{pair.language} __tgt__en {pair.foreign}"


def cut(text: Path, alone: Collection[str], folder: Path, languages: Collection[str] = LANGUAGES) -> None:
    """Learn one sentencepiece model of both sides of the training text, and cut every split with it.

    Writes ``sentencepiece.model``, and for each split ``<split>.src`` and ``<split>.en`` of pieces and
    ``<split>.tsv`` of the pairs that were short enough, line by line; the sentences of the languages
    `alone` also by themselves, ``<language>.<split>.*``.
    """
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(text / "train.tsv"),
        model_prefix=str(folder / "sentencepiece"),
        vocab_size=VOCABULARY,
        user_defined_symbols=tags(languages),
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))
    for name in SPLITS:
        pairs = list(read_pairs(text / f"{name}.tsv"))
        _write(model, pairs, folder, name)
        for language in alone:
            _write(model, [pair for pair in pairs if pair.language == language], folder, f"{language}.{name}")


def _write(model: sentencepiece.SentencePieceProcessor, pairs: List[Pair], folder: Path, name: str) -> None:
    kept = []
    with (folder / f"{name}.src").open("w", encoding="utf-8") as source:
        with (folder / f"{name}.en").open("w", encoding="utf-8") as target:
            for pair in pairs:
                foreign, english = model.encode([pair.foreign, pair.english], out_type=str)
                if max(len(foreign), len(english)) <= MAX_PIECES:
                    kept.append(pair)
                    print(*model.encode(tagged(pair), out_type=str), file=source)
                    print(*english, file=target)
    write_pairs(folder / f"{name}.tsv", kept)


def _sentences(train: Path) -> Iterator[str]:
    for pair in read_pairs(train):
        yield pair.foreign
        yield pair.english
