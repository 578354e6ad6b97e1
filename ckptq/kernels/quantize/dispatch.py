"""The doors to quantization: Triton for CUDA tensors (`gpu.on_gpu`), plain torch for others.

Both give the same bits. Arguments are those of the functions of the same name in this folder, which
have the documentation; input is finite. Triton is imported by the first call that needs it.
"""

import torch
from torch import Tensor

from ckptq.kernels.gpu import on_gpu
from ckptq.kernels.quantize import reference
from ckptq.rope_order import Heads, RopeOrder

FP8 = torch.float8_e4m3fn
Scaled = tuple[Tensor, Tensor]


def quantize_rows(
    x_RC: Tensor,
    dtype: torch.dtype = FP8,
    heads: Heads | None = None,
    to: RopeOrder = RopeOrder.HALF_SPLIT,
) -> Scaled:
    """Per output channel or per token: codes [R, C], scales [R, 1]."""
    if on_gpu(x_RC):
        from ckptq.kernels.quantize.quantize_rows import quantize_rows as fast

        return fast(x_RC, dtype, heads, to)
    return reference.quantize_rows(x_RC, dtype, heads, to)


def quantize_blocks(
    x_RC: Tensor,
    dtype: torch.dtype = FP8,
    block: tuple[int, int] = (128, 128),
    heads: Heads | None = None,
    to: RopeOrder = RopeOrder.HALF_SPLIT,
) -> Scaled:
    """Per block: codes [R, C], scales [ceil(R / 128), ceil(C / 128)].

    The kernel takes blocks that a program holds: sides of powers of two, 32768 values at most.
    """
    held = block[0] * block[1] <= 1 << 15 and not any(side & (side - 1) for side in block)
    if on_gpu(x_RC) and held:
        from ckptq.kernels.quantize.quantize_blocks import quantize_blocks as fast

        return fast(x_RC, dtype, block, heads, to)
    return reference.quantize_blocks(x_RC, dtype, block, heads, to)


def quantize_static(
    x_RC: Tensor,
    scale_GK: Tensor,
    tile: tuple[int, int],
    dtype: torch.dtype = FP8,
    heads: Heads | None = None,
    to: RopeOrder = RopeOrder.HALF_SPLIT,
) -> Tensor:
    """Codes [R, C] under scales that each cover a tile of rows x columns."""
    if on_gpu(x_RC):
        from ckptq.kernels.quantize.quantize_static import quantize_static as fast

        return fast(x_RC, scale_GK, tile, dtype, heads, to)
    return reference.quantize_static(x_RC, scale_GK, tile, dtype, heads, to)


def dequantize(code_RC: Tensor, scale_GK: Tensor, tile: tuple[int, int]) -> Tensor:
    """Values [R, C] in the scale's dtype."""
    if on_gpu(code_RC):
        from ckptq.kernels.quantize.dequantize_codes import dequantize as fast

        return fast(code_RC, scale_GK, tile)
    return reference.dequantize(code_RC, scale_GK, tile)
