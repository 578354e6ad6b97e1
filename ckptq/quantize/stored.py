"""What one quantized weight looks like on disk, from its shape alone. No bytes are touched here.

Shape letters: R rows (output channels), C columns (input channels).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import ceil, gcd

from ckptq.errors import PlanError
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.spec import FLOATS, TensorSpec


def stored(weight: TensorSpec, scheme: WeightScheme) -> dict[str, TensorSpec]:
    """Local names and specs of everything written for one Linear weight [R, C].

    Example: W4A16 over BF16 [4096, 4096] is weight_packed I32 [4096, 512], weight_scale
    BF16 [4096, 32], weight_shape I64 [2]. `PlanError` when shape or dtype do not fit.
    """
    _check(weight, scheme)
    specs = {**_codes(weight, scheme), "weight_scale": _scale(weight, scheme)}
    if not scheme.symmetric:
        specs["weight_zero_point"] = _zero_point(specs["weight_scale"].shape, scheme)
    if scheme.format == "pack-quantized":
        specs["weight_shape"] = TensorSpec("I64", (2,))
    if scheme.strategy == "tensor_group":
        specs["weight_global_scale"] = TensorSpec("F32", (1,))
    return specs


def row_quantum(scheme: WeightScheme) -> int:
    """Some rows of a weight may be quantized alone if they start at a multiple of this.

    128 for blocks of 128x128, 8 where 4-bit zero points are packed along the rows, else 1. They may
    end there too, or with the weight.
    """
    if scheme.block_structure:
        return scheme.block_structure[0]
    if scheme.format == "pack-quantized" and not scheme.symmetric:
        return 32 // gcd(32, scheme.num_bits)
    return 1


@cache
def quantum_specs(scheme: WeightScheme, columns: int) -> Mapping[str, TensorSpec]:
    """What is stored for one quantum of rows. Example: 1 row of scales for 128 of blocks, 1 row of
    packed zero points for 8."""
    return stored(TensorSpec("BF16", (row_quantum(scheme), columns)), scheme)


def stored_span(
    local: str, scheme: WeightScheme, columns: int, start: int, stop: int
) -> tuple[int, int]:
    """The rows of a stored tensor that hold rows start..stop of the weight; `start` is a multiple
    of the quantum."""
    rows, quantum = quantum_specs(scheme, columns)[local].shape[0], row_quantum(scheme)
    return start * rows // quantum, ceil(stop * rows / quantum)


def _check(weight: TensorSpec, scheme: WeightScheme) -> None:
    if weight.dtype not in FLOATS:
        raise PlanError(f"{scheme} needs an unquantized weight ({', '.join(FLOATS)}), got {weight}")
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise PlanError(f"{scheme} needs a matrix, got {weight}")
    if scheme.group_size and weight.shape[1] % scheme.group_size:
        raise PlanError(f"{scheme} needs columns in multiples of {scheme.group_size}, got {weight}")


def _codes(weight: TensorSpec, scheme: WeightScheme) -> dict[str, TensorSpec]:
    R, C = weight.shape
    match scheme.format:
        case "pack-quantized":
            return {"weight_packed": TensorSpec("I32", (R, words(C, scheme.num_bits)))}
        case "mxfp4-pack-quantized" | "nvfp4-pack-quantized":
            return {"weight_packed": TensorSpec("U8", (R, C // 2))}
        case "int-quantized":
            return {"weight": TensorSpec("I8", (R, C))}
        case _:
            return {"weight": TensorSpec("F8_E4M3", (R, C))}


def _scale(weight: TensorSpec, scheme: WeightScheme) -> TensorSpec:
    dtypes = {"uint8": "U8", "float8_e4m3fn": "F8_E4M3", None: weight.dtype}
    return TensorSpec(dtypes[scheme.scale_dtype], scale_shape(weight.shape, scheme))


def scale_shape(shape: tuple[int, ...], scheme: WeightScheme) -> tuple[int, ...]:
    """One number a tile of a weight of this shape."""
    R, C = shape
    if scheme.block_structure:
        height, width = scheme.block_structure
        return ceil(R / height), ceil(C / width)
    if scheme.group_size:
        return R, C // scheme.group_size
    return (1,) if scheme.strategy == "tensor" else (R, 1)


def _zero_point(scale: tuple[int, ...], scheme: WeightScheme) -> TensorSpec:
    """Packed formats pack zero points along the rows, the others keep one int8 for each scale."""
    if scheme.format != "pack-quantized":
        return TensorSpec("I8", scale)
    return TensorSpec("I32", (words(scale[0], scheme.num_bits), scale[1]))


def words(count: int, num_bits: int) -> int:
    """int32 words that hold `count` codes."""
    return -(-count * num_bits // 32)
