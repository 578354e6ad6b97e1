"""How weights are stored, as a recipe spells it: format and QuantizationArgs, by name."""

from __future__ import annotations

from typing import Any

Format = tuple[str, dict[str, Any]]

STATIC = {"symmetric": True, "dynamic": False}
FP8 = {"num_bits": 8, "type": "float", **STATIC}
FP4 = FP8 | {"num_bits": 4}
INT4 = {"num_bits": 4, "type": "int", **STATIC}
INT8 = INT4 | {"num_bits": 8}
CHANNEL = {"strategy": "channel"}
TENSOR = {"strategy": "tensor"}
MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
NV = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}


def groups(size: int) -> dict[str, Any]:
    return {"strategy": "group", "group_size": size}


def blocks(rows: int, columns: int) -> dict[str, Any]:
    return {"strategy": "block", "block_structure": [rows, columns]}


FORMATS: dict[str, Format] = {
    "fp8-channel": ("float-quantized", FP8 | CHANNEL),
    "fp8-tensor": ("float-quantized", FP8 | TENSOR),
    "fp8-static": ("float-quantized", FP8 | TENSOR),
    "fp8-block": ("float-quantized", FP8 | blocks(64, 64)),
    "int8": ("int-quantized", INT8 | CHANNEL),
    "int4": ("pack-quantized", INT4 | groups(32)),
    "int4-asym": (
        "pack-quantized",
        INT4 | groups(32) | {"symmetric": False, "zp_dtype": "int8"},
    ),
    "int4-channel": ("pack-quantized", INT4 | CHANNEL),
    "int8-packed": ("pack-quantized", INT8 | groups(128)),
    "mxfp8": ("mxfp8-quantized", FP8 | MX),
    "mxfp4": ("mxfp4-pack-quantized", FP4 | MX),
    "nvfp4": ("nvfp4-pack-quantized", FP4 | NV),
}
"""Those that engines read."""

RARE: dict[str, Format] = {
    "int4-bytes": ("int-quantized", INT4 | CHANNEL | {"symmetric": False}),
    "int8-tensor-asym": ("int-quantized", INT8 | TENSOR | {"symmetric": False}),
}
"""Those that one test needs; no engine reads them."""
