"""Any finite weight gives finite, positive scales and nearest codes; any other weight is refused.

The judge is the definition in float64, tile by tile, with a search for the nearest value.
"""

from __future__ import annotations

import pytest
import torch
from format_cases import DTYPES, SCHEMES, case_name, convert
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ckptq.quantize.codes import E2M1
from ckptq.quantize.formats import NonFinite, WeightScheme, dequantize
from ckptq.quantize.packing import unpack_nibbles, unpack_words

R, C = 9, 128
some = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


def values(scheme: WeightScheme) -> Tensor:
    """What the codes of an element type stand for, ascending."""
    if scheme.type == "int":
        return torch.arange(-(2 ** (scheme.num_bits - 1)), 2 ** (scheme.num_bits - 1)).double()
    positive = torch.tensor(E2M1).double()
    if scheme.num_bits == 8:
        positive = torch.arange(0x7F).to(torch.uint8).view(torch.float8_e4m3fn).double()
    return torch.cat((-positive.flip(0)[:-1], positive))


def nearest_value(x: Tensor, scheme: WeightScheme) -> Tensor:
    """The value nearest to each x; on a tie the one whose code is even."""
    table = values(scheme)
    even = torch.arange(len(table)) % 2 == (0 if scheme.type == "int" else len(table) // 2 % 2)
    distance = (x.double().clamp(table[0], table[-1])[..., None] - table).abs()
    best = distance == distance.amin(-1, keepdim=True)
    return table[(best.int() * 2 + (best & even)).argmax(-1)]


def stored_values(tensors: dict[str, Tensor], scheme: WeightScheme) -> Tensor:
    if scheme.codes == "weight":
        return tensors["weight"].double()
    if scheme.type == "int":
        return unpack_words(tensors["weight_packed"], scheme.num_bits, C).double()
    positive = torch.tensor(E2M1).double()
    return torch.cat((positive, -positive))[unpack_nibbles(tensors["weight_packed"]).long()]


def spread(tile: Tensor, scheme: WeightScheme) -> Tensor:
    """One number a tile, repeated for all its elements: [R, C]."""
    height, width = scheme.block_structure or (1, scheme.group_size or C)
    if scheme.strategy == "tensor":
        height, width = R, C
    tile = tile.reshape(-1, 1) if tile.ndim == 1 else tile
    return tile.repeat_interleave(height, 0).repeat_interleave(width, 1)[:R, :C]


def divisors(tensors: dict[str, Tensor], scheme: WeightScheme) -> Tensor:
    scale = tensors["weight_scale"]
    if scheme.scale_dtype == "uint8":
        return torch.pow(2.0, scale.double() - 127)
    if scheme.strategy == "tensor_group":
        return (scale.double() / tensors["weight_global_scale"].double()).float().double()
    return scale.double()


def zero_points(tensors: dict[str, Tensor], scheme: WeightScheme) -> Tensor:
    if scheme.symmetric:
        return torch.zeros(R, C)
    zero_point = tensors["weight_zero_point"]
    if scheme.format == "pack-quantized":
        zero_point = unpack_words(zero_point.t(), scheme.num_bits, R).t()
    return spread(zero_point.float(), scheme)


@st.composite
def weights(draw: st.DrawFn, dtype: torch.dtype) -> Tensor:
    """A matrix of few different numbers from all over the dtype, with rows and groups of zeros.

    Of float64 what float32 can hold: scales of NVFP4 and MX have no more range than that.
    """
    info = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
    ends = [0.0, -0.0, info.max, info.min, info.tiny, -info.tiny, info.tiny / 8, info.eps, 1.0]
    number = st.sampled_from(ends) | st.floats(-1, 1) | st.floats(info.min, info.max)
    few = torch.tensor(draw(st.lists(number, min_size=1, max_size=8)), dtype=torch.float64)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    w_RC = few[torch.randint(len(few), (R, C), generator=generator)]
    w_RC[draw(st.integers(0, R - 1))] = draw(st.sampled_from([0.0, -0.0, 1.0]))
    w_RC[:, : draw(st.sampled_from([0, 16, 32, 128]))] *= draw(st.sampled_from([0.0, 1e-3, 1.0]))
    return w_RC.clamp(info.min, info.max).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=case_name)
@given(data=st.data())
@some
def test_codes_are_the_nearest_to_finite_positive_scales(
    scheme: WeightScheme, dtype: torch.dtype, data: st.DataObject
) -> None:
    w_RC = data.draw(weights(dtype))
    tensors = convert(w_RC, scheme)
    divisor = divisors(tensors, scheme)
    assert divisor.isfinite().all()
    assert (divisor > 0).all()
    wide = torch.promote_types(dtype, torch.float32)
    quotient = (w_RC.double() / spread(divisor, scheme)).to(wide) + zero_points(tensors, scheme)
    assert torch.equal(stored_values(tensors, scheme), nearest_value(quotient, scheme))
    assert not dequantize(tensors, scheme)[w_RC == 0].any()


def test_the_search_notices_a_neighbouring_code() -> None:
    """The judge must be able to fail: next to a tie, and on it."""
    scheme = next(s for s in SCHEMES if str(s) == "fp8 channel")
    x = torch.tensor([17.0, 17.0001, 19.0, 18.9999, -17.0, 1e9])
    assert nearest_value(x, scheme).tolist() == [16.0, 18.0, 20.0, 18.0, -16.0, 448.0]


@pytest.mark.parametrize("scheme", SCHEMES, ids=case_name)
@given(
    row=st.integers(0, R - 1),
    column=st.integers(0, C - 1),
    dtype=st.sampled_from(DTYPES),
    bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)
@some
def test_nan_and_inf_are_refused_wherever_they_are(
    scheme: WeightScheme, row: int, column: int, dtype: torch.dtype, bad: float
) -> None:
    w_RC = torch.linspace(-1, 1, R * C).view(R, C).to(dtype)
    convert(w_RC, scheme)
    w_RC[row, column] = bad
    with pytest.raises(NonFinite):
        convert(w_RC, scheme)


def test_a_negative_nan_is_refused_too() -> None:
    """Its bits are below those of every number when they are read as a signed integer."""
    w_RC = torch.ones(R, C, dtype=torch.bfloat16)
    w_RC.view(torch.int16)[3, 5] = -1
    for scheme in SCHEMES:
        with pytest.raises(NonFinite):
            convert(w_RC, scheme)


def test_zeros_get_the_scale_that_llm_compressor_gives_them() -> None:
    """eps of the dtype, 2^-127, and 0.125 over a global scale of 1."""
    w_RC = torch.zeros(R, C, dtype=torch.bfloat16)
    found = {str(s): convert(w_RC, s)["weight_scale"].float().unique().tolist() for s in SCHEMES}
    own = {"mxfp8": [0], "mxfp4": [0], "nvfp4": [0.125]}
    own |= {f"{name} searched": scale for name, scale in own.items()}
    assert {name: found.pop(name) for name in own} == own
    assert all(scale == [2.0**-7] for scale in found.values())


def test_scales_stay_finite_where_llm_compressor_overflows() -> None:
    """high - low is Inf in float16, and 1.75 * 2^127 rounds up to 2^128."""
    w_RC = torch.full((8, C), 60000.0, dtype=torch.float16)
    w_RC[:, 0] = -60000
    asym = next(s for s in SCHEMES if case_name(s) == "pack-quantized int4 group 128 asym")
    assert convert(w_RC, asym)["weight_scale"].tolist() == [[8000.0]] * 8
    huge_RC = torch.full((8, C), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    mxfp4 = next(s for s in SCHEMES if str(s) == "mxfp4")
    assert convert(huge_RC, mxfp4)["weight_scale"].unique().tolist() == [252]
    assert convert(huge_RC, mxfp4)["weight_packed"].unique().tolist() == [0x77]
    assert dequantize(convert(huge_RC, mxfp4), mxfp4).unique().tolist() == [1.5 * 2.0**127]
