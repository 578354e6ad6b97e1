"""The schemes under test, and weights that are awkward on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
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

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def int_args(num_bits: int, group_size: int | None, symmetric: bool) -> dict[str, object]:
    strategy = "group" if group_size else "channel"
    args = {"num_bits": num_bits, "strategy": strategy, "symmetric": symmetric}
    return {**args, "group_size": group_size} if group_size else args


E4M3 = {"num_bits": 8, "type": "float"}
MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
NV = {"type": "float", "strategy": "tensor_group", "group_size": 16}

# (format, the weights' QuantizationArgs as a recipe spells them)
ARGS: list[tuple[str, dict[str, object]]] = [
    ("float-quantized", {**E4M3, "strategy": "channel"}),
    ("float-quantized", {**E4M3, "strategy": "tensor"}),
    ("float-quantized", {**E4M3, "strategy": "group", "group_size": 64}),
    ("float-quantized", {**E4M3, "strategy": "block", "block_structure": [128, 128]}),
    ("float-quantized", {**E4M3, "strategy": "block", "block_structure": [16, 64]}),
    ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    ("int-quantized", {"num_bits": 8, "strategy": "tensor", "symmetric": False}),
    ("int-quantized", int_args(4, 32, True)),
    *[
        ("pack-quantized", int_args(num_bits, group_size, symmetric))
        for num_bits, group_size in ((4, 128), (4, 32), (4, None), (8, 128), (8, None))
        for symmetric in (True, False)
    ],
    *[("pack-quantized", int_args(num_bits, 32, False)) for num_bits in (2, 3, 5, 6, 7)],
    ("mxfp8-quantized", {"num_bits": 8, **MX}),
    ("mxfp4-pack-quantized", {"num_bits": 4, **MX}),
    ("nvfp4-pack-quantized", {"num_bits": 4, **NV, "scale_dtype": "torch.float8_e4m3fn"}),
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
    found = statistic(w_RC) if needs_statistic(scheme) else None
    return {**quantize(w_RC, scheme, found), **constants(spec_of(w_RC), scheme, found)}


def convert_fused(weights: dict[str, Tensor], scheme: WeightScheme) -> dict[str, dict[str, Tensor]]:
    """Everything that is stored for weights that share what is one number for a whole weight."""
    found = None
    for w_RC in weights.values():
        found = statistic(w_RC) if found is None else merge_statistic(found, statistic(w_RC))
    return {
        name: {**quantize(w_RC, scheme, found), **constants(spec_of(w_RC), scheme, found)}
        for name, w_RC in weights.items()
    }


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaN and -0.0 are told apart too."""
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same in dtype, shape and every bit."""
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours
        or name not in theirs
        or spec_of(ours[name]) != spec_of(theirs[name])
        or not torch.equal(raw(ours[name]), raw(theirs[name]))
    )
