"""Products with codes, as an engine on a GPU has them: codes of weights times codes of inputs.

Which products have a kernel is decided here, in `product_of`. The others are computed of decoded
weights and rounded inputs, as all are on a CPU; that differs by what rounding both to the model's
dtype costs. Packed INT4 weights are decoded to that dtype by engines too.

Shape letters: T tokens of whatever leads, C input features, N output channels, G groups of C.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ckptq.evaluate.linears.inputs import InputScheme, in_groups, scale_of_inputs
from ckptq.kernels.gpu import on_gpu
from ckptq.quantize.coded import Coded
from ckptq.quantize.weight_scheme import WeightScheme

Codes = tuple["Tensor", "Tensor"]
"""Of an input: codes [T, C], and scales [T, 1], [T, G] or [1, 1]."""

CodesOf = Callable[[InputScheme, "Tensor"], Codes]

Product = Callable[["Tensor", InputScheme | None, Coded, CodesOf], "Tensor"]
"""(input [..., C], how it is rounded, weight, `input_codes` or one that remembers) -> [T, N]."""


def codes_multiply(device: torch.device) -> bool:
    """Whether products are those of codes there: on a GPU they are."""
    return on_gpu(device)


def product_of(
    scheme: WeightScheme, inputs: InputScheme | None, dtype: torch.dtype
) -> Product | None:
    """The product of codes for weights of this scheme and inputs of `dtype`; None where there is
    no kernel for it."""
    if scheme.format == "pack-quantized" and scheme.num_bits == 4:
        in_words = scheme.group_size is None or scheme.group_size % 32 == 0
        return _w4a16 if inputs is None and in_words and dtype.itemsize == 2 else None
    if inputs is None or inputs.type != scheme.type or not _is_byte(scheme):
        return None
    if scheme.strategy in ("channel", "tensor") and inputs.group is None:
        return _w8a8
    if scheme.block_structure == (128, 128) and inputs.group == 128 and scheme.type == "float":
        return _fp8_block
    return None


def _is_byte(scheme: WeightScheme) -> bool:
    """Codes of 8 bits, under scales that are numbers."""
    eight = scheme.num_bits == 8 and scheme.codes == "weight"
    return eight and scheme.symmetric and scheme.scale_dtype is None


def input_codes(inputs: InputScheme, x_TC: Tensor) -> Codes:
    """What `inputs.round` multiplies back, to the bit: E4M3 or INT8, and float32 scales."""
    from ckptq.kernels.quantize.quantize_static import quantize_static

    x_TC = x_TC.flatten(0, -2)
    T, C = x_TC.shape
    dtype = torch.float8_e4m3fn if inputs.type == "float" else torch.int8
    if inputs.scale is not None:
        scale, tile = x_TC.new_full((1, 1), inputs.scale, dtype=torch.float32), (T, C)
    elif inputs.group is None:
        scale, tile = scale_of_inputs(x_TC, inputs.type), (1, C)
    else:
        scale = scale_of_inputs(in_groups(x_TC, inputs.group), inputs.type)[..., 0]
        tile = (1, inputs.group)
    return quantize_static(x_TC, scale.contiguous(), tile, dtype), scale


def _w8a8(x_TC: Tensor, inputs: InputScheme | None, weight: Coded, codes_of: CodesOf) -> Tensor:
    from ckptq.kernels.linear.linear_w8a8 import linear_w8a8

    assert inputs is not None
    w_NC, w_scale = weight.tensors["weight"], weight.tensors["weight_scale"]
    return linear_w8a8(*codes_of(inputs, x_TC), w_NC, w_scale, x_TC.dtype)


def _fp8_block(
    x_TC: Tensor, inputs: InputScheme | None, weight: Coded, codes_of: CodesOf
) -> Tensor:
    from ckptq.kernels.linear.library import linear_fp8_block

    assert inputs is not None
    w_NC, w_scale = weight.tensors["weight"], weight.tensors["weight_scale"]
    return linear_fp8_block(*codes_of(inputs, x_TC), w_NC, w_scale, x_TC.dtype)


def _w4a16(x_TC: Tensor, _: InputScheme | None, weight: Coded, __: CodesOf) -> Tensor:
    from ckptq.kernels.linear.library import linear_w4a16

    scale_NG = weight.tensors["weight_scale"].to(x_TC.dtype)
    zero_ZG = weight.tensors.get("weight_zero_point")
    return linear_w4a16(x_TC.flatten(0, -2), weight.tensors["weight_packed"], scale_NG, zero_ZG)
