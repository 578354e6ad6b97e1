"""The oracle itself: nearest codes by brute force, packing by hand, floors by measurement."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny.formats import FORMATS

from ckptq.quantize.formats import constants, needs_statistic, quantize, statistic
from ckptq.quantize.packing import pack_words
from ckptq.recipes.args import Args
from ckptq.spec import spec_of
from ckptq.verify.roundtrip import nearest
from ckptq.verify.roundtrip.tally import Tally, compare, decibels, floor_db

SCHEMES = {name: Args.read(args).weight_scheme(form) for name, (form, args) in FORMATS.items()}


def stored(w_RC, scheme):
    found = statistic(w_RC, scheme) if needs_statistic(scheme) else None
    return quantize(w_RC, scheme, found) | constants(spec_of(w_RC), scheme, found)


def grid(scheme):
    """Every number that a code can stand for."""
    if scheme.type == "int":
        half = 2 ** (scheme.num_bits - 1)
        return torch.arange(-half, half).float()
    if scheme.num_bits == 4:
        return torch.tensor([s * v for s in (-1, 1) for v in nearest.E2M1_GRID])
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return codes[codes.isfinite()]


@pytest.mark.parametrize("name", SCHEMES)
def test_no_code_is_nearer(name):
    """By trying all of them, in float64."""
    scheme = SCHEMES[name]
    w_RC = (torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    held = stored(w_RC, scheme)
    value = nearest.recode(w_RC, held, scheme, torch.float32).double()
    x = nearest.in_tiles(w_RC, scheme).double()
    quotient = x / nearest.per_tile(nearest.divisor(held, scheme).double(), x)
    zero_point = nearest.zero_points(held, scheme, 64)
    if zero_point is not None:
        quotient = quotient + nearest.per_tile(zero_point.double(), x)
    quotient = nearest.out_of_tiles(quotient, (64, 128))
    best = (quotient[..., None] - grid(scheme).double()).abs().amin(-1)
    assert torch.allclose((quotient - value).abs(), best, rtol=0, atol=1e-6)


def test_both_sides_of_a_tie_are_the_nearest():
    """Which one it is depends on the order of divisions; what lies beside a tie does not."""
    scheme = SCHEMES["int8"]
    held = {"weight_scale": torch.tensor([[0.5]])}
    w_RC = torch.tensor([[1.25, 1.25, 1.25, 1.2500001, 1.3, 1.3]])
    value_RC = torch.tensor([[2.0, 3.0, 1.0, 2.0, 3.0, 2.0]])
    near = nearest.as_near(value_RC, w_RC, held, scheme)
    assert near.tolist() == [[True, True, False, True, True, False]]
    held["weight_scale"] *= 0
    assert not nearest.as_near(value_RC, w_RC, held, scheme).any()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_converter_and_the_oracle_agree(name, dtype):
    scheme = SCHEMES[name]
    w_RC = (torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    tally = compare(w_RC, stored(w_RC, scheme), scheme)
    assert (tally.wrong, tally.scales_wrong, tally.foreign) == (0, 0, 0)
    assert tally.elements == 64 * 128
    assert tally.snr_db > floor_db(scheme, (64, 128))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_oracle_can_disagree(name):
    """One code moved by one step is counted as one, whatever the format."""
    scheme = SCHEMES[name]
    w_RC = (torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    held = stored(w_RC, scheme)
    held[scheme.codes].view(torch.uint8)[3, 5] ^= 1
    tally = compare(w_RC, held, scheme)
    assert tally.wrong == 1
    assert tally.unproved == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 40), st.integers(0, 1 << 30))
def test_unpacking_is_the_converters_packing_undone(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    code_RC = torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)
    assert torch.equal(
        nearest.unpacked(pack_words(code_RC, bits), bits, columns).to(torch.int8), code_RC
    )


def test_packing_by_hand():
    word = torch.tensor([[0x76543210, -0x01234568]], dtype=torch.int32)
    assert nearest.unpacked(word, 4, 16).tolist() == [list(range(-8, 8))]


def test_ties_go_to_even_fp4():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, 7.0])
    want = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 0.0, -1.0, 6.0]
    assert (nearest._to_e2m1(x) + 0.0).tolist() == want


@pytest.mark.parametrize("name", SCHEMES)
def test_floors_lie_just_under_gaussian_weights(name):
    scheme = SCHEMES[name]
    w_RC = torch.randn(256, 1024, generator=torch.Generator().manual_seed(2)).bfloat16()
    tally = compare(w_RC, stored(w_RC, scheme), scheme)
    assert 1.0 < tally.snr_db - floor_db(scheme, (256, 1024)) < 4.5


def test_tallies_of_blocks_add_up():
    scheme = SCHEMES["int4"]
    w_RC = torch.randn(64, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    held = stored(w_RC, scheme)
    cut = {k: t for k, t in held.items() if k != "weight_shape"}
    parts = [
        compare(w_RC[a:b], {k: t[a:b] for k, t in cut.items()}, scheme)
        for a, b in ((0, 16), (16, 64))
    ]
    both, whole = parts[0] + parts[1], compare(w_RC, held, scheme)
    assert both.elements == whole.elements
    assert math.isclose(both.snr_db, whole.snr_db, abs_tol=1e-3)
    assert Tally().snr_db == math.inf
    assert decibels(1.0, math.nan) == -math.inf
