"""Parameters of upstream's transformer and of the same size with this project's extensions, as a table.

python benchmarks/model_sizes.py
"""

from argparse import Namespace

from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

import kd_ext  # noqa: F401  registers the architectures

VOCABULARY = 32000
STACKED = ("encoder_recurrent_stacking", "decoder_recurrent_stacking")
FACTORIZED = ("encoder_factorized_embed_dim", "decoder_factorized_embed_dim")


def main() -> None:
    print("| size | upstream | `transformer_ext` | stacked | factorized | both |\n|---|---|---|---|---|---|")
    for size in ("_iwslt_de_en", "_wmt_en_de_big"):
        depth = {name: 6 for name in STACKED}
        factor = {name: 128 for name in FACTORIZED}
        ours = f"transformer_adapter{size}"
        models = [(f"transformer{size}", {}), (ours, {}), (ours, depth), (ours, factor), (ours, {**depth, **factor})]
        print(f"| `{size}` | " + " | ".join(f"{count(*model) / 1e6:.1f}M" for model in models) + " |")


def count(architecture: str, flags: dict) -> int:
    args = Namespace(share_all_embeddings=True, **flags)
    ARCH_CONFIG_REGISTRY[architecture](args)
    words = Dictionary()
    for i in range(VOCABULARY - len(words)):
        words.add_symbol(f"w{i}")
    task = Namespace(source_dictionary=words, target_dictionary=words)
    return sum(p.numel() for p in ARCH_MODEL_REGISTRY[architecture].build_model(args, task).parameters())


if __name__ == "__main__":
    main()
