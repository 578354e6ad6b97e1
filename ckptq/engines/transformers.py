"""What transformers cannot load from compressed-tensors checkpoints (from its source, 5.15 to
5.17).

Experts that it fuses into one parameter are dequantized before they are stacked
(`integrations/compressed_tensors.py`, DecompressExperts): FP8 with scales per row or tensor, and
symmetric packed integers. Everything else fails while loading, or silently leaves the
experts random (NVFP4 and the other FP4 and MX formats: their further scales are "unexpected keys").
"""

from __future__ import annotations

from collections.abc import Collection

from ckptq.recipes.args import Args
from ckptq.recipes.scheme import Group

IN_BFLOAT16 = frozenset(("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"))
"""Formats whose weights compressed-tensors decompresses into bfloat16, whatever the model's dtype:
their scales have no dtype of their own that says it."""


def dtype_clash(formats: Collection[str | None], dtype: str | None) -> str | None:
    """Why a model of this dtype ("float16"; None where config.json has none) fails when it runs."""
    clashing = sorted(IN_BFLOAT16.intersection(formats))
    if not clashing or dtype in (None, "bfloat16"):
        return None
    return (
        f"decompresses {clashing[0]} into bfloat16, and config.json has dtype {dtype}: its forward "
        "pass fails unless it is loaded with dtype=torch.bfloat16"
    )


def loads_fused_experts(group: Group) -> bool:
    """Whether transformers can load fused experts with the scheme of this group."""
    weights = group.weights or Args()
    if group.format == "pack-quantized":
        return weights.symmetric
    fp8 = weights.type == "float" and weights.num_bits == 8
    return fp8 and weights.strategy in ("tensor", "channel")
