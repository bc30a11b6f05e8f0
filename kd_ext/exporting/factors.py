"""Matrices in two factors as one, or as upstream's ``decoder_output_dim`` holds them; in float64."""

from typing import Dict, Tuple

from torch import Tensor

from kd_ext.models.extension_flags import SIDES

OUTPUT, OUTPUT_DOWN = "decoder.output_projection.weight", "decoder.output_projection.down.weight"
PROJECT_OUT = "decoder.project_out_dim.weight"  # upstream's, where decoder_output_dim is another than the width


def without_factors(weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Factorized embeddings (V x k, k x d) as tables of V x d, and their projection as upstream has it.

    A tied projection stays tied: it is the table. Of an untied one upstream can hold the factors, which costs
    k (d + V) a token in place of dV: ``project_out_dim`` and a projection of V x k.

    Args:
        weights: by name, any floating dtype

    Returns:
        products in float64, not rounded; what was one tensor is one tensor. All else is as it was
    """
    found = dict(weights)
    products: Dict[Tuple[int, int], Tensor] = {}
    for side in SIDES:
        name = f"{side}.embed_tokens.weight"
        up = found.pop(f"{side}.embed_tokens.up.weight", None)
        if up is None:
            continue
        key = (found[name].data_ptr(), up.data_ptr())
        if key not in products:
            products[key] = found[name].double() @ up.double().t()  # V x k times k x d
        found[name] = products[key]
        if side == "decoder":
            found.setdefault(OUTPUT, products[key])
    down = found.pop(OUTPUT_DOWN, None)
    if down is not None:
        out = found.get(PROJECT_OUT)
        found[PROJECT_OUT] = down if out is None else down.double() @ out.double()  # k x o times o x d
    return found


def with_one_projection(weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The output projection as one matrix of V x d, where it was two; the product in float64, not rounded."""
    found = dict(weights)
    out = found.pop(PROJECT_OUT, None)
    if out is not None:
        found[OUTPUT] = found[OUTPUT].double() @ out.double()  # V x k times k x d
    return found
