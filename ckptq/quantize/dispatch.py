"""The doors to weights in any format, on any device: a kernel for CUDA tensors where there is one
(`gpu.on_gpu`), else the same in torch's own operations. Both give the same bits.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

from ckptq.kernels.gpu import on_gpu
from ckptq.quantize import formats
from ckptq.quantize.formats import NonFinite, WeightScheme, constants
from ckptq.quantize.scratch import Scratch
from ckptq.spec import spec_of

Made = dict[str, Tensor]
"""Stored tensors by local name."""

Kernel = Callable[[Tensor, WeightScheme, Tensor | None], Made]
"""(finite rows on a GPU, scheme, statistic) -> the stored tensors of these rows, on the GPU."""

Inverse = Callable[[Mapping[str, Tensor], WeightScheme, tuple[int, int]], Tensor]
"""(all stored tensors on a GPU, scheme, shape) -> the weight [R, C] in the dtype of its scales."""

KERNEL_SCALES = (torch.bfloat16, torch.float16, torch.float32)


def _at_once(finite: Tensor) -> None:
    if not finite:
        raise NonFinite("NaN or Inf")


def quantize(
    w_RC: Tensor,
    scheme: WeightScheme,
    statistic: Tensor | None = None,
    check: Callable[[Tensor], None] = _at_once,
) -> Made:
    """`formats.quantize` and `formats.constants`: everything that is stored for a weight, on its
    device (except "weight_shape"). `NonFinite` on NaN or Inf.

    Where a kernel quantizes, `check` gets whether all is finite, on the device: it may read that
    later, as reading makes the host wait for everything before it.
    """
    made = constants(spec_of(w_RC), scheme, statistic)
    return made | quantize_some(w_RC, scheme, statistic, check=check)


def quantize_some(
    w_RC: Tensor,
    scheme: WeightScheme,
    statistic: Tensor | None = None,
    scratch: Scratch | None = None,
    check: Callable[[Tensor], None] = _at_once,
) -> Made:
    """`quantize` without the constants: what is stored for these rows of a weight.

    With `scratch`, codes that no kernel makes are in its memory.
    """
    kernel = kernel_of(scheme) if on_gpu(w_RC) and w_RC.dtype in KERNEL_SCALES else None
    if kernel is None:
        at_hand = None if statistic is None else statistic.to(w_RC.device)
        return formats.quantize(w_RC, scheme, at_hand, scratch)
    check(w_RC.isfinite().all())
    with torch.cuda.device_of(w_RC):  # triton launches on the current device
        return kernel(w_RC.contiguous(), scheme, statistic)


def dequantize(
    tensors: Mapping[str, Tensor], scheme: WeightScheme, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """`formats.dequantize` of a whole weight, or of rows with all their scales."""
    plain = on_gpu(tensors["weight_scale"]) and "weight_g_idx" not in tensors
    kernel = inverse_of(scheme) if plain else None
    if kernel is None or tensors["weight_scale"].dtype not in KERNEL_SCALES:
        return formats.dequantize(tensors, scheme, shape, dtype)
    with torch.cuda.device_of(tensors["weight_scale"]):
        return kernel(tensors, scheme, shape).to(dtype)


def kernel_of(scheme: WeightScheme) -> Kernel | None:
    """The kernel that makes this format; None without one, for blocks that are more than a program
    holds, and for scales that are searched."""
    block = scheme.block_structure or (1, 1)
    if scheme.search is not None or prod(block) > 1 << 15 or any(n & n - 1 for n in block):
        return None
    if _is_plain(scheme) and scheme.strategy in BY_STRATEGY:
        return BY_STRATEGY[scheme.strategy]
    return _packed if _is_packed(scheme) else None


def inverse_of(scheme: WeightScheme) -> Inverse | None:
    """The kernel that turns this format back to values; None where there is none."""
    if _is_plain(scheme) and scheme.strategy in BY_STRATEGY:
        return _values
    return _unpacked if _is_packed(scheme) else None


def _is_plain(scheme: WeightScheme) -> bool:
    """Eight bits in a byte of their own, and scales that are numbers."""
    eight = scheme.symmetric and scheme.num_bits == 8 and scheme.codes == "weight"
    return eight and scheme.scale_dtype is None


def _is_packed(scheme: WeightScheme) -> bool:
    packed = scheme.format == "pack-quantized" and scheme.num_bits == 4
    return packed and (scheme.group_size or 8) % 8 == 0


def _rows(x_RC: Tensor, scheme: WeightScheme, _: Tensor | None) -> Made:
    from ckptq.kernels.quantize.quantize_rows import quantize_rows

    code_RC, scale_R1 = quantize_rows(x_RC, _code_dtype(scheme))
    return {"weight": code_RC, "weight_scale": scale_R1}


def _blocks(x_RC: Tensor, scheme: WeightScheme, _: Tensor | None) -> Made:
    from ckptq.kernels.quantize.quantize_rows import quantize_blocks

    assert scheme.block_structure is not None
    code_RC, scale_GK = quantize_blocks(x_RC, _code_dtype(scheme), scheme.block_structure)
    return {"weight": code_RC, "weight_scale": scale_GK}


def _tensor(x_RC: Tensor, scheme: WeightScheme, shared: Tensor | None) -> Made:
    from ckptq.kernels.quantize.quantize_static import quantize_static

    scale = constants(spec_of(x_RC), scheme, shared)["weight_scale"].to(x_RC.device)
    tile = (x_RC.shape[0], x_RC.shape[1])
    return {"weight": quantize_static(x_RC, scale.view(1, 1), tile, _code_dtype(scheme))}


def _packed(x_RC: Tensor, scheme: WeightScheme, _: Tensor | None) -> Made:
    from ckptq.kernels.int4.quantize_int4 import quantize_int4

    packed_RP, scale_RG, zero_ZG = quantize_int4(x_RC, scheme.group_size, scheme.symmetric)
    made = {"weight_packed": packed_RP, "weight_scale": scale_RG}
    return made if zero_ZG is None else made | {"weight_zero_point": zero_ZG}


def _values(tensors: Mapping[str, Tensor], scheme: WeightScheme, shape: tuple[int, int]) -> Tensor:
    from ckptq.kernels.quantize.quantize_static import dequantize as values

    code_RC, scale = tensors["weight"].contiguous(), tensors["weight_scale"]
    R, C = shape
    if scheme.block_structure is not None:
        return values(code_RC, scale.contiguous(), scheme.block_structure)
    tile = (R, C) if scheme.strategy == "tensor" else (1, C)
    return values(code_RC, scale.reshape(-1, 1), tile)


def _unpacked(
    tensors: Mapping[str, Tensor], scheme: WeightScheme, shape: tuple[int, int]
) -> Tensor:
    from ckptq.kernels.int4.quantize_int4 import dequantize_int4

    packed_RP, scale_RG = tensors["weight_packed"].contiguous(), tensors["weight_scale"]
    zero_ZG = tensors.get("weight_zero_point")
    return dequantize_int4(packed_RP, scale_RG.contiguous(), shape[1], zero_ZG)


BY_STRATEGY: dict[str, Kernel] = {"channel": _rows, "block": _blocks, "tensor": _tensor}


def _code_dtype(scheme: WeightScheme) -> torch.dtype:
    return torch.float8_e4m3fn if scheme.type == "float" else torch.int8
