"""What int8 loses and wins: BLEU, chrF and sentences a second of one student in CTranslate2, by weights and by CPU.

``python benchmarks/int8.py CHECKPOINT DATA SOURCE REFERENCE``; the latter two are texts as pieces of sentencepiece.
A CPU without VNNI is had by forbidding oneDNN, whose product CTranslate2 takes on most CPUs, to use it.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from common import measure, save

VARIANTS = {
    "float32": ["float32"],
    "int8, 8 bits": ["int8", "--int8-bits", "8"],
    "int8, 7 bits": ["int8", "--int8-bits", "7"],
}
CPUS = {"VNNI": "ALL", "no VNNI": "AVX2"}
BATCHES, BEAM, LONGEST, ROUNDS = (1, 32), 5, 200, 3


def main(checkpoint: str, data: str, source: str, reference: str) -> None:
    from kd_ext.export import main as export

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, flags in enumerate(VARIANTS.values()):
            output = str(Path(folder, str(number)))
            export([checkpoint, output, "--format", "ctranslate2", "--data", data, "--quantization", *flags])
        for cpu, isa in CPUS.items():
            os.environ["ONEDNN_MAX_CPU_ISA"] = isa
            for _ in range(ROUNDS):
                for number, variant in enumerate(VARIANTS):
                    found = measure("int8.py", Path(folder, str(number)), source, reference)
                    rows.append({"cpu": cpu, "weights": variant, **found})
    save("int8", [_best(rows, cpu, variant) for cpu in CPUS for variant in VARIANTS], beam=BEAM, rounds=ROUNDS)


def _best(rows, cpu, variant):
    """The fastest round: what slows one down is not the model."""
    found = [row for row in rows if (row["cpu"], row["weights"]) == (cpu, variant)]
    return {key: max(row[key] for row in found) for key in found[0]}


def translate(folder: str, source: str, reference: str) -> None:
    """Print the figures of one model, in a process whose CPU has what it is said to have."""
    import json

    import ctranslate2
    import sacrebleu

    translator = ctranslate2.Translator(folder, intra_threads=1)
    sentences = [line.split() for line in Path(source).read_text().splitlines()]
    references = [_text(line.split()) for line in Path(reference).read_text().splitlines()]
    found = {"megabytes": os.path.getsize(Path(folder, "model.bin")) / 1e6}
    for batch in BATCHES:
        some = sentences if batch > 1 else sentences[:200]
        options = {"beam_size": BEAM, "max_batch_size": batch, "max_decoding_length": LONGEST}
        options["suppress_sequences"] = [["<blank>"]]  # padding, which fairseq never says
        translator.translate_batch(some[:batch], **options)
        start = time.perf_counter()
        results = translator.translate_batch(some, **options)
        found[f"sentences_per_second_{batch}"] = len(some) / (time.perf_counter() - start)
    hypotheses = [_text(result.hypotheses[0]) for result in results]
    found["bleu"] = sacrebleu.corpus_bleu(hypotheses, [references]).score
    found["chrf"] = sacrebleu.corpus_chrf(hypotheses, [references]).score
    print(json.dumps(found))


def _text(pieces) -> str:
    return "".join(pieces).replace("\u2581", " ").strip()


if __name__ == "__main__":
    (translate if len(sys.argv) == 4 else main)(*sys.argv[1:])
