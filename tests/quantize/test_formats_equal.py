"""What is stored equals what llm-compressor stores, bit for bit, in every format."""

from __future__ import annotations

import pytest
import torch
from format_cases import (
    ARGS,
    DTYPES,
    PLAIN,
    SCHEMES,
    Judge,
    awkward,
    case_name,
    convert,
    convert_fused,
)
from tiny.tensors import differences
from torch import Tensor

from ckptq.quantize import encode, formats, scales
from ckptq.quantize.formats import WeightScheme, stored
from ckptq.quantize.packing import pack_words
from ckptq.recipes.args import Args
from ckptq.spec import spec_of


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("format", "args"), ARGS, ids=[case_name(s) for s in SCHEMES])
def test_equals_llm_compressor(
    judge: Judge, format: str, args: dict[str, object], dtype: torch.dtype
) -> None:
    scheme = Args.read(args).weight_scheme(format)
    w_RC = awkward(dtype)
    ours = convert(w_RC, scheme)
    assert differences(ours, judge({"proj": w_RC}, format, args)["proj"]) == []
    assert {name: spec_of(tensor) for name, tensor in ours.items()} == stored(spec_of(w_RC), scheme)
    assert all(tensor.stride() == torch.zeros(tensor.shape).stride() for tensor in ours.values())


@pytest.mark.parametrize("shape", [(1, 7), (9, 77), (128, 128), (130, 200)], ids=str)
@pytest.mark.parametrize(
    ("format", "args"),
    [case for case, s in zip(ARGS, SCHEMES, strict=True) if s.group_size is None],
    ids=[case_name(s) for s in SCHEMES if s.group_size is None],
)
def test_equals_llm_compressor_on_ragged_shapes(
    judge: Judge, format: str, args: dict[str, object], shape: tuple[int, int]
) -> None:
    scheme = Args.read(args).weight_scheme(format)
    w_RC = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = convert(w_RC, scheme)
    assert differences(ours, judge({"proj": w_RC}, format, args)["proj"]) == []
    assert {name: spec_of(tensor) for name, tensor in ours.items()} == stored(spec_of(w_RC), scheme)
    assert all(tensor.stride() == torch.zeros(tensor.shape).stride() for tensor in ours.values())


@pytest.mark.parametrize(("format", "args"), ARGS, ids=[case_name(s) for s in SCHEMES])
def test_equals_llm_compressor_on_every_bf16_below_2_to_127(
    judge: Judge, format: str, args: dict[str, object]
) -> None:
    """A row holds neighbours of both signs, so that every number meets a scale of its size."""
    bits = torch.arange(0x7F00, dtype=torch.int32).to(torch.int16)
    w_RC = torch.stack((bits.view(torch.bfloat16), -bits.view(torch.bfloat16)), 1).view(-1, 256)
    scheme = Args.read(args).weight_scheme(format)
    assert differences(convert(w_RC, scheme), judge({"proj": w_RC}, format, args)["proj"]) == []


@pytest.mark.parametrize("case", [PLAIN - 1, -1])
def test_fused_weights_share_the_global_scale(judge: Judge, case: int) -> None:
    scheme = SCHEMES[case]
    format, args = ARGS[case]
    assert scheme.strategy == "tensor_group"
    generator = torch.Generator().manual_seed(2)
    weights = {
        f"model.layers.0.self_attn.{name}_proj": torch.randn(16, 64, generator=generator).bfloat16()
        for name in "qkv"
    }
    ours, theirs = convert_fused(weights, scheme), judge(weights, format, args)
    assert [differences(ours[name], theirs[name]) for name in weights] == [[], [], []]
    alone = [differences(convert(w_RC, scheme), theirs[name]) for name, w_RC in weights.items()]
    assert alone != [[], [], []]


def round_half_up(x: Tensor, scheme: WeightScheme, scratch: object) -> Tensor:
    return (x + 0.5).floor_().clamp_(-(2 ** (scheme.num_bits - 1)), 2 ** (scheme.num_bits - 1) - 1)


def exponent_of_amax(amax: Tensor, num_bits: int) -> Tensor:
    return (127 + amax.float().log2().floor() - 2).clamp(0, 254).to(torch.uint8)


def swapped_nibbles(code_RC: Tensor) -> Tensor:
    return code_RC.view(torch.uint8)[:, 0::2] << 4 | code_RC.view(torch.uint8)[:, 1::2]


def packed_along_columns(zero_point_GR: Tensor, num_bits: int) -> Tensor:
    return pack_words(zero_point_GR.t().contiguous(), num_bits).t()


# mistake: (scheme, where, what, instead, the tensors that show it)
MISTAKES = {
    "127 steps a side instead of 127.5": (
        "int-quantized int8 channel",
        (scales, "symmetric", lambda amax, half_range: amax / (half_range - 0.5)),
        ["weight", "weight_scale"],
    ),
    "scale 0 for zeros": (
        "float-quantized fp8 channel",
        (scales, "_positive", lambda scale: scale),
        ["weight", "weight_scale"],
    ),
    "ties away from zero": (
        "int-quantized int8 channel",
        (encode, "rounded", round_half_up),
        ["weight"],
    ),
    "divided in the weight's dtype": (
        "float-quantized fp8 channel",
        (torch, "promote_types", lambda weight, wide: weight),
        ["weight"],
    ),
    "zero points packed along columns": (
        "pack-quantized int4 group 32 asym",
        (formats, "pack_words", packed_along_columns),
        ["weight_zero_point"],
    ),
    "high nibble first": (
        "nvfp4-pack-quantized nvfp4",
        (encode, "pack_nibbles", swapped_nibbles),
        ["weight_packed"],
    ),
    "global scale in float32": (
        "nvfp4-pack-quantized nvfp4",
        (scales, "nvfp4_global", lambda amax: (448 * 6 / amax.float()).reshape(1)),
        ["weight_global_scale"],
    ),
    "MX exponent not rounded up from 1.75": (
        "mxfp4-pack-quantized mxfp4",
        (scales, "mx_exponent", exponent_of_amax),
        ["weight_packed", "weight_scale"],
    ),
}


@pytest.mark.parametrize(("name", "instead", "shown"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_noticed(
    judge: Judge,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    instead: tuple[object, str, object],
    shown: list[str],
) -> None:
    """The comparison above must be able to fail, in the tensors where it should."""
    format, args = next(case for case, s in zip(ARGS, SCHEMES, strict=True) if case_name(s) == name)
    w_RC = awkward(torch.bfloat16)
    theirs = judge({"proj": w_RC}, format, args)["proj"]
    monkeypatch.setattr(*instead)
    assert differences(convert(w_RC, Args.read(args).weight_scheme(format)), theirs) == shown
