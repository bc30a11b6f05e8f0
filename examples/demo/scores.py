"""How good a model is, how large and how fast; and the table that says so."""

from __future__ import annotations

import json
import logging
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List

from catalogues import Pair

# fairseq 0.12.2's encoder layers hold these beside the parameters that they use, and never train them
_DEAD = re.compile(r"encoder\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)")
BATCHES = ("1", "32")


def hypotheses(output: str) -> List[str]:
    """The translations in what fairseq-generate printed, in the order of the test set."""
    found = {}
    for line in output.splitlines():
        if line.startswith("D-"):
            sentence, _, text = line.split("\t")
            found[int(sentence[2:])] = text
    return [found[index] for index in sorted(found)]


def score(translations: List[str], pairs: List[Pair]) -> Dict[str, Any]:
    """BLEU and chrF of each language's translations, and of all where there are several languages."""
    from sacrebleu.metrics import BLEU, CHRF

    bleu, chrf = BLEU(), CHRF()
    scores: Dict[str, Any] = {}
    languages = sorted({pair.language for pair in pairs})
    for language in ["all", *languages] if len(languages) > 1 else languages:
        chosen = [i for i, pair in enumerate(pairs) if language in ("all", pair.language)]
        texts = [translations[i] for i in chosen]
        references = [[pairs[i].english for i in chosen]]
        scores[language] = {
            "sentences": len(chosen),
            "bleu": bleu.corpus_score(texts, references).score,
            "chrf": chrf.corpus_score(texts, references).score,
        }
    return {
        "scores": scores,
        "signatures": {"BLEU": str(bleu.get_signature()), "chrF": str(chrf.get_signature())},
    }


def parameters(checkpoint: Path, data: Path, user_dir: Path) -> int:
    """The parameters of a trained model, each once, without fairseq's dead ones."""
    for name in ("fairseq", "kd_ext"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from fairseq import checkpoint_utils, utils

    utils.import_user_module(Namespace(user_dir=str(user_dir)))
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], arg_overrides={"data": str(data)})
    return sum(value.numel() for name, value in models[0].named_parameters() if not _DEAD.fullmatch(name))


def render(results: Dict[str, Dict[str, Any]]) -> str:
    """The results of each model, by its name, as Markdown that also reads well on a terminal."""
    first = next(iter(results.values()))
    languages = [language for language in first["scores"] if language != "all"]
    head = ["model", "parameters", "MB", "BLEU", "chrF", *(f"sentences/s, {size} at once" for size in BATCHES)]
    head += [f"{language} ({first['scores'][language]['sentences']})" for language in languages]
    rows = [head]
    for name, result in results.items():
        scores = result["scores"]
        row = [name, f"{result['parameters']:,}", f"{result['bytes'] / 1e6:.1f}"]
        row += [f"{scores['all'][metric]:.1f}" if "all" in scores else "" for metric in ("bleu", "chrf")]
        for size in BATCHES:
            speed, of_first = result["speeds"].get(size), first["speeds"].get(size)
            row.append(f"{speed:.0f} ({speed / of_first:.1f}x)" if speed and of_first else "")
        row += [
            f"{scores[language]['bleu']:.1f} / {scores[language]['chrf']:.1f}" if language in scores else ""
            for language in languages
        ]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    rows.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines += [
        "",
        f"To English, {first['scores']['all']['sentences']} test sentences, beam 5, on one CPU core; "
        "in parentheses the speed over the teacher's.",
        "MB are of the file or folder that translates: fairseq's checkpoints have the optimizer's state in them.",
        "The last columns are BLEU / chrF by source language, with the number of sentences in parentheses: "
        "scores of few sentences vary.",
        "The parameters that fairseq 0.12.2's encoder layers hold but never use are not counted.",
        "",
    ]
    lines += [f"- {metric}: `{signature}`" for metric, signature in first["signatures"].items()]
    return "\n".join(lines) + "\n"


def write_results(folder: Path, results: Dict[str, Dict[str, Any]]) -> str:
    """Write ``results.json`` and ``results.md``; returns the latter."""
    table = render(results)
    for name, text in (("results.json", json.dumps(results, indent=1) + "\n"), ("results.md", table)):
        temporary = folder / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)
    return table
