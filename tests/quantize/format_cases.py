"""The schemes under test, and weights that are awkward on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from tiny.formats import CHANNEL, FP4, FP8, INT4, INT8, MX, NV, TENSOR, Format, blocks, groups
from torch import Tensor

from ckptq.quantize.formats import (
    WeightScheme,
    constants,
    merge_statistic,
    needs_statistic,
    quantize,
    statistic,
)
from ckptq.recipes.args import Args
from ckptq.spec import spec_of

Judge = Callable[[Mapping[str, Tensor], str, dict[str, object]], dict[str, dict[str, Tensor]]]
"""(module name: weight, format, QuantizationArgs) -> the stored tensors of each module."""

ASYMMETRIC = {"symmetric": False}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# (format, the weights' QuantizationArgs as a recipe spells them)
ARGS: list[Format] = [
    ("float-quantized", FP8 | CHANNEL),
    ("float-quantized", FP8 | TENSOR),
    ("float-quantized", FP8 | groups(64)),
    ("float-quantized", FP8 | blocks(128, 128)),
    ("float-quantized", FP8 | blocks(16, 64)),
    ("int-quantized", INT8 | CHANNEL),
    ("int-quantized", INT8 | TENSOR),
    ("int-quantized", INT8 | CHANNEL | ASYMMETRIC),
    ("int-quantized", INT8 | TENSOR | ASYMMETRIC),
    ("int-quantized", INT4 | groups(32)),
    *[
        ("pack-quantized", args | (groups(size) if size else CHANNEL) | symmetry)
        for args, size in ((INT4, 128), (INT4, 32), (INT4, None), (INT8, 128), (INT8, None))
        for symmetry in ({}, ASYMMETRIC)
    ],
    *[
        ("pack-quantized", INT4 | groups(32) | ASYMMETRIC | {"num_bits": n})
        for n in (2, 3, 5, 6, 7)
    ],
    ("mxfp8-quantized", FP8 | MX),
    ("mxfp4-pack-quantized", FP4 | MX),
    ("nvfp4-pack-quantized", FP4 | NV),
]
PLAIN = len(ARGS)
"""How many of them take the minimum and maximum; the others search."""

MSE = {"observer": "memoryless_mse", "observer_kwargs": {"patience": 10_000}}
EXPANDED = {"observer": "nvfp4_expanded_mse", "observer_kwargs": {"patience": 10_000}}
ARGS += [
    ("float-quantized", FP8 | CHANNEL | MSE),
    ("float-quantized", FP8 | blocks(16, 64) | MSE),
    ("int-quantized", INT8 | CHANNEL | MSE),
    ("pack-quantized", INT4 | groups(32) | MSE),
    ("pack-quantized", INT4 | groups(128) | ASYMMETRIC | MSE),
    ("pack-quantized", INT4 | CHANNEL | {"observer": "mse", "observer_kwargs": {"patience": 99}}),
    ("mxfp8-quantized", FP8 | MX | MSE),
    ("mxfp4-pack-quantized", FP4 | MX | MSE),
    ("nvfp4-pack-quantized", FP4 | NV | MSE),
    ("nvfp4-pack-quantized", FP4 | NV | EXPANDED),
]
SCHEMES = [Args.read(args).weight_scheme(format) for format, args in ARGS]


def case_name(case: object) -> str:
    """pytest's id of a scheme: "pack-quantized int4 group 32 asym"."""
    return f"{case.format} {case}" if isinstance(case, WeightScheme) else str(case)


def awkward(dtype: torch.dtype, rows: int = 43, columns: int = 256) -> Tensor:
    """Rows of every kind: ordinary, zero, of one sign, an outlier, tiny, huge, with ties, -0.0."""
    generator = torch.Generator().manual_seed(0)
    w_RC = torch.randn(rows, columns, generator=generator) * 0.02
    w_RC[1] = 0
    w_RC[2] = w_RC[2].abs()
    w_RC[3] = -w_RC[3].abs()
    w_RC[4, 5] = 30.0
    w_RC[5] *= 1e-3 if dtype == torch.float16 else 1e-36
    w_RC[6] *= torch.finfo(dtype).max
    w_RC[7] = (torch.arange(columns) - columns // 2) / 4
    w_RC[8] = -0.0
    w_RC[9, : columns // 2] = 0
    w_RC[10] = torch.finfo(dtype).smallest_normal / 8
    return w_RC.to(dtype)


def convert(w_RC: Tensor, scheme: WeightScheme) -> dict[str, Tensor]:
    """Everything that is stored for one weight on its own."""
    found = statistic(w_RC, scheme) if needs_statistic(scheme) else None
    return {**quantize(w_RC, scheme, found), **constants(spec_of(w_RC), scheme, found)}


def convert_fused(weights: dict[str, Tensor], scheme: WeightScheme) -> dict[str, dict[str, Tensor]]:
    """Everything that is stored for weights that share what is one number for a whole weight."""
    found = None
    for w_RC in weights.values():
        more = statistic(w_RC, scheme)
        found = more if found is None else merge_statistic(found, more)
    return {
        name: {**quantize(w_RC, scheme, found), **constants(spec_of(w_RC), scheme, found)}
        for name, w_RC in weights.items()
    }
