"""(d) The decoding speed of each architecture, as words per second over upstream's transformer.

``python benchmarks/decoding.py`` decodes one batch by beam search with fairseq's generator, the architectures by turns,
on a GPU in half precision too.
"""

import statistics
import time

import torch
from common import DEVICE, PRECISIONS, THREADS, save, wait_for_device
from fairseq.sequence_generator import SequenceGenerator
from models import build, dictionary
from tqdm import tqdm

SIZE, VOCABULARY, SENTENCES, LENGTH, BEAM, ROUNDS = "_iwslt_de_en", 32_000, 8, 16, 5, 3
SIDES = ("encoder", "decoder")
ADAPTERS = {
    **{f"{side}_add_adapters": True for side in SIDES},
    **{f"{side}_adapter_ids": "hi,ta" for side in SIDES},
    **{f"activate_{side}_adapter": "hi" for side in SIDES},
}
FACTORIZED = {f"{side}_factorized_embed_dim": 128 for side in SIDES}
VARIANTS = {
    "upstream": ("transformer", {}),
    "transformer_ext": ("transformer_adapter", {}),
    "adapters active": ("transformer_adapter", ADAPTERS),
    "recurrent stacking": ("transformer_recurrent_stacking", {}),
    "factorized embeddings": ("transformer_factorized_embedding", {}),
    "all together": ("transformer_recurrent_stacking", {**ADAPTERS, **FACTORIZED}),
}


def main() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(1)
    words = dictionary(VOCABULARY)
    sample = {
        "net_input": {
            "src_tokens": torch.randint(4, VOCABULARY, (SENTENCES, LENGTH), device=DEVICE),
            "src_lengths": torch.full((SENTENCES,), LENGTH, device=DEVICE),
        }
    }
    rows = [
        {"precision": precision, "variant": variant, "words_per_second": SENTENCES * LENGTH / statistics.median(taken)}
        for precision in PRECISIONS
        for variant, taken in decode(words, sample, getattr(torch, precision)).items()
    ]
    save("decoding", rows, size=SIZE, vocabulary=VOCABULARY, sentences=SENTENCES, length=LENGTH, beam=BEAM)


def decode(words, sample, dtype):
    """The seconds that each variant takes for the batch, in each round."""
    generators, taken = {}, {variant: [] for variant in VARIANTS}
    for variant, (family, settings) in VARIANTS.items():
        model = build(family + SIZE, words, share_all_embeddings=True, **settings).eval().to(DEVICE, dtype)
        # every sentence as long as the next, whatever the random weights say
        lengths = {"max_len_a": 0, "max_len_b": LENGTH, "min_len": LENGTH}
        generators[variant] = SequenceGenerator([model], words, beam_size=BEAM, **lengths)
    for turn in tqdm(range(ROUNDS + 1)):
        for variant, generator in generators.items():
            wait_for_device()
            start = time.perf_counter()
            generator.generate([], sample)
            wait_for_device()
            if turn > 0:  # the first warms up
                taken[variant].append(time.perf_counter() - start)
    return taken


if __name__ == "__main__":
    main()
