"""The doors to INT4: Triton for CUDA tensors (`gpu.on_gpu`), plain torch for others.

Both give the same bits. Arguments are those of the functions of the same name in this folder, which
have the documentation; input is finite. Triton is imported by the first call that needs it.
"""

from torch import Tensor

from ckptq.kernels.gpu import on_gpu
from ckptq.kernels.int4 import reference
from ckptq.rope_order import Heads, RopeOrder

Packed = tuple[Tensor, Tensor, Tensor | None]


def quantize_int4(
    x_RC: Tensor,
    group: int | None = 128,
    symmetric: bool = True,
    heads: Heads | None = None,
    to: RopeOrder = RopeOrder.HALF_SPLIT,
) -> Packed:
    """Packed codes [R, C / 8], scales [R, G], packed zero points [R / 8, G] or None."""
    if on_gpu(x_RC):
        from ckptq.kernels.int4.quantize_int4 import quantize_int4 as fast

        return fast(x_RC, group, symmetric, heads, to)
    return reference.quantize_int4(x_RC, group, symmetric, heads, to)


def dequantize_int4(
    packed_RP: Tensor, scale_RG: Tensor, columns: int, zero_ZG: Tensor | None = None
) -> Tensor:
    """Values [R, columns] in the scale's dtype."""
    if on_gpu(packed_RP):
        from ckptq.kernels.int4.quantize_int4 import dequantize_int4 as fast

        return fast(packed_RP, scale_RG, columns, zero_ZG)
    return reference.dequantize_int4(packed_RP, scale_RG, columns, zero_ZG)
