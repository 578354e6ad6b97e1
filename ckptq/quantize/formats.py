"""Weights to their stored tensors, for every format, a block of rows at a time. The door to this
package.

Bit for bit what llm-compressor and compressed-tensors write for the same weight, with one choice:
codes are the nearest to weight / scale divided in float32 (as llm-compressor does on GPUs), on
every device. All is local to its rows, so block by block equals the whole when blocks start at
multiples of `row_quantum`. What is one number for a whole weight, or for a set of weights that
inference fuses, comes from `statistic`: take it of every block, merge, and hand it in.

Names are local: "weight" or "weight_packed", "weight_scale", ... Shape letters: R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ckptq.quantize import codes, scales
from ckptq.quantize.dequantize import dequantize
from ckptq.quantize.packing import pack_bits, pack_words
from ckptq.quantize.scheme import WeightScheme
from ckptq.quantize.stored import row_quantum, stored
from ckptq.quantize.tiles import NonFinite, extremes, magnitude, over_tiles, tiled, untiled
from ckptq.spec import TensorSpec

__all__ = [
    "BLOCK_ELEMENTS",
    "NonFinite",
    "WeightScheme",
    "constants",
    "dequantize",
    "merge_statistic",
    "needs_statistic",
    "quantize",
    "row_quantum",
    "statistic",
    "stored",
]

BLOCK_ELEMENTS = 1 << 18
"""Elements in a block of rows that quantizes fastest on a CPU: what is made of it stays in the
cache."""


def needs_statistic(scheme: WeightScheme) -> bool:
    """Whether one number over the whole weight, or fused set, must be known before any row."""
    return scheme.strategy in ("tensor", "tensor_group")


def statistic(w_RC: Tensor) -> Tensor:
    """[2]: min(amin, 0) and max(amax, 0) of these rows, in their dtype. `NonFinite` on NaN or
    Inf."""
    return torch.cat(extremes(w_RC.reshape(1, -1)))


def merge_statistic(a_2: Tensor, b_2: Tensor) -> Tensor:
    """The statistic of both: of more rows of a weight, or of the members of a fused set."""
    return torch.stack((torch.minimum(a_2[0], b_2[0]), torch.maximum(a_2[1], b_2[1])))


def constants(
    weight: TensorSpec, scheme: WeightScheme, statistic: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors that belong to no row: scale and zero point of a whole tensor, global scale,
    shape."""
    made: dict[str, Tensor] = {}
    if scheme.strategy == "tensor":
        made |= _scale_tensors(*_scale_of_tensor(statistic, scheme), scheme)
    if scheme.strategy == "tensor_group":
        made["weight_global_scale"] = _global_scale(statistic, scheme)
    if scheme.format == "pack-quantized":
        made["weight_shape"] = torch.tensor(weight.shape)
    return made


def quantize(
    w_RC: Tensor, scheme: WeightScheme, statistic: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors that belong to these rows; with `constants` they are all that is stored.

    `NonFinite` on NaN or Inf (raised by `statistic` already where the scheme needs it). Shapes and
    dtypes are those of `stored`, which refuses what does not fit.
    """
    x = tiled(w_RC.contiguous(), scheme)
    wide = torch.promote_types(w_RC.dtype, torch.float32)
    zero_point = None
    if scheme.format in ("mxfp8-quantized", "mxfp4-pack-quantized"):
        scale = scales.mx_exponent(magnitude(x), scheme.num_bits)
        divisor = scales.mx_scale(scale)
    elif scheme.strategy == "tensor_group":
        global_scale = _global_scale(statistic, scheme)
        scale = scales.nvfp4_scale(magnitude(x), global_scale)
        divisor = scale.to(wide) / global_scale
    else:
        scale, zero_point = _scale(x, scheme, statistic)
        divisor = scale.to(wide)
    code_RC = untiled(_codes(x, divisor, zero_point, scheme), w_RC.shape)
    made = {scheme.codes: _pack(code_RC, scheme)}
    return made if scheme.strategy == "tensor" else made | _scale_tensors(scale, zero_point, scheme)


def _global_scale(statistic: Tensor | None, scheme: WeightScheme) -> Tensor:
    assert statistic is not None, f"{scheme} needs the statistic of the whole weight"
    return scales.nvfp4_global_scale(statistic.abs().amax())


def _scale_of_tensor(
    statistic: Tensor | None, scheme: WeightScheme
) -> tuple[Tensor, Tensor | None]:
    assert statistic is not None, f"{scheme} needs the statistic of the whole weight"
    low, high = statistic.split(1)
    if scheme.symmetric:
        return scales.symmetric_scale(torch.maximum(-low, high), scheme.half_range), None
    return scales.asymmetric_scale(low, high, scheme.num_bits)


def _scale(
    x: Tensor, scheme: WeightScheme, statistic: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scale and, if asymmetric, zero point of each tile."""
    if scheme.strategy == "tensor":
        return _scale_of_tensor(statistic, scheme)
    if scheme.symmetric:
        return scales.symmetric_scale(magnitude(x), scheme.half_range), None
    return scales.asymmetric_scale(*extremes(x), scheme.num_bits)


def _codes(x: Tensor, divisor: Tensor, zero_point: Tensor | None, scheme: WeightScheme) -> Tensor:
    quotient = x / over_tiles(divisor, x)
    if scheme.type == "int":
        shift = None if zero_point is None else over_tiles(zero_point, x)
        return codes.encode_int(quotient, scheme.num_bits, shift)
    return codes.encode_e4m3(quotient) if scheme.num_bits == 8 else codes.encode_e2m1(quotient)


def _pack(code_RC: Tensor, scheme: WeightScheme) -> Tensor:
    match scheme.format:
        case "pack-quantized":
            return pack_words(code_RC, scheme.num_bits)
        case "mxfp4-pack-quantized" | "nvfp4-pack-quantized":
            return pack_bits(code_RC, 4)
        case _:
            return code_RC


def _scale_tensors(
    scale: Tensor, zero_point: Tensor | None, scheme: WeightScheme
) -> dict[str, Tensor]:
    made = {"weight_scale": scale}
    if zero_point is not None and scheme.format == "pack-quantized":
        # one word holds the zero points of consecutive rows, unlike the codes' consecutive columns
        zero_point = pack_words(zero_point.t().contiguous(), scheme.num_bits).t().contiguous()
    return made if zero_point is None else made | {"weight_zero_point": zero_point}
