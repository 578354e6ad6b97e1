"""What transformers cannot load from compressed-tensors checkpoints (from its source, 5.15 to
5.17).

Experts that it fuses into one parameter are dequantized before they are stacked
(`integrations/compressed_tensors.py`, DecompressExperts): FP8 with scales per row or tensor, and
symmetric packed integers. Everything else fails while loading, or silently leaves the
experts random (NVFP4 and the other FP4 and MX formats: their further scales are "unexpected keys").
"""

from __future__ import annotations

from ckptq.recipes.args import Args
from ckptq.recipes.scheme import Group


def loads_fused_experts(group: Group) -> bool:
    """Whether transformers can load fused experts with the scheme of this group."""
    weights = group.weights or Args()
    if group.format == "pack-quantized":
        return weights.symmetric
    fp8 = weights.type == "float" and weights.num_bits == 8
    return fp8 and weights.strategy in ("tensor", "channel")
