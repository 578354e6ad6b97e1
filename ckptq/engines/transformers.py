"""What transformers' reader of compressed-tensors cannot load, from its source (5.15 to 5.17).

Experts that it fuses into one parameter are dequantized on the way, before they are stacked
(`integrations/compressed_tensors.py`, DecompressExperts): FP8 with scales per row or tensor, and
symmetric packed integers. Everything else fails while loading, or, without a word, leaves the
experts random (NVFP4 and the other FP4 and MX formats: their further scales are "unexpected keys").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def loads_fused_experts(weights: Mapping[str, Any], format: str | None) -> bool:
    """Whether experts that it fuses while loading may have this scheme.

    `weights` are the QuantizationArgs of a config group, `format` its stored format.
    """
    if format == "pack-quantized":
        return weights.get("symmetric", True) is True
    fp8 = weights.get("type") == "float" and weights.get("num_bits") == 8
    return fp8 and weights.get("strategy") in ("tensor", "channel")
