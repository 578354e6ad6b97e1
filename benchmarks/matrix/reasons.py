"""Why an engine does not read a cell, in one line, and whose word it is."""

from __future__ import annotations

import re

REASONS = (
    (r"Unsupported quant type uint8b128", "no CPU kernel for packed INT8"),
    (r"Humming is not installed", "only Humming, not installed, has a kernel for these bits"),
    (r"Forced NVFP4 kernel|NVFP4 linear layer", "no CPU kernel for NVFP4"),
    (r"MXFP4 linear layer", "no CPU kernel for MXFP4"),
    (r"MXFP8 linear layer", "no CPU kernel for MXFP8"),
    (r"symmetric quantization is supported for MoE", "its kernel for such experts is symmetric"),
    (r"not supported between.*marlin_utils", "0.25 expects a group size; 0.32 knows channels"),
    (r"compressed_tensors_moe_wna16", "its kernel for such experts takes groups, no channels"),
    (r"shape '\[\d+, 0, 2, \d+\]' is invalid", "cannot permute block scales of q/k"),
    (
        r"unexpected_keys.*input_scale",
        "fuses these experts, without a place for static input scales",
    ),
    (
        r"unexpected_keys.*weight_global_scale",
        "fuses these experts, without a place for global scales",
    ),
    (r"missing_keys.*unexpected_keys", "knows this family's experts by other names"),
    (r"automatic conversion of the weights", "cannot decompress fused experts of this format"),
)
"""Of an error's text or place -> what it means. vLLM 0.32 on a CPU, 0.25 on a GPU; transformers
5.17 with compressed-tensors 0.19."""


def reason(error: str, where: str = "") -> str:
    """The meaning of an engine's error, or its own words."""
    for pattern, meaning in REASONS:
        if re.search(pattern, f"{error} {where}", re.DOTALL):
            return meaning
    return error.replace("\n", " ").replace("|", "/")[:90]
