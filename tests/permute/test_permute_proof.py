"""Permutation-proof scales: an engine that forgets to permute them is right, at a known cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ckptq.permute.apply import permute_rows, row_permutation
from ckptq.permute.order import Heads, RopeOrder, cycles
from ckptq.permute.proof import Sharing, share_amax

HALF = RopeOrder.HALF_SPLIT
HEADS = Heads(3, 128)


def weight() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size_R1 = torch.randn(HEADS.rows, 1, generator=generator).mul(0.5).exp()
    return (torch.randn(HEADS.rows, 64, generator=generator) * size_R1).bfloat16()


def int8_codes(w_RC: Tensor, amax_R1: Tensor) -> tuple[Tensor, Tensor]:
    scale_R1 = amax_R1 / 127.5
    return (w_RC.float() / scale_R1.float()).round().clamp(-128, 127).to(torch.int8), scale_R1


@pytest.mark.parametrize("sharing", Sharing)
def test_an_engine_that_forgets_the_scales_is_right(sharing):
    w_RC = weight()
    amax_R1 = w_RC.abs().amax(1, keepdim=True)
    codes_RC, scale_R1 = int8_codes(w_RC, share_amax(amax_R1, HEADS, sharing))
    assert torch.equal(permute_rows(scale_R1, HEADS, HALF), scale_R1)
    right_RC = permute_rows(codes_RC.double() * scale_R1.double(), HEADS, HALF)
    forgetful_RC = permute_rows(codes_RC, HEADS, HALF).double() * scale_R1.double()
    assert torch.equal(forgetful_RC, right_RC)


def test_own_scales_are_not_proof():
    """The check above must be able to fail."""
    w_RC = weight()
    codes_RC, scale_R1 = int8_codes(w_RC, w_RC.abs().amax(1, keepdim=True))
    right_RC = permute_rows(codes_RC.double() * scale_R1.double(), HEADS, HALF)
    forgetful_RC = permute_rows(codes_RC, HEADS, HALF).double() * scale_R1.double()
    assert (forgetful_RC - right_RC).abs().max() > 0.1


@given(
    count=st.integers(1, 3),
    half=st.integers(1, 40),
    groups=st.integers(1, 3),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_shared_amax_is_the_largest_of_each_cycle(count, half, groups, dtype):
    heads = Heads(count, 2 * half)
    amax_RG = torch.rand(heads.rows, groups).to(dtype)
    shared_RG = share_amax(amax_RG, heads)
    assert shared_RG.dtype == dtype
    for rows in cycles(heads):
        assert torch.equal(shared_RG[rows], amax_RG[rows].amax(0).expand(len(rows), -1))
    for to in RopeOrder:
        assert torch.equal(shared_RG[row_permutation(heads, to)], shared_RG)
    again_RG = share_amax(shared_RG, heads)
    assert torch.equal(again_RG, shared_RG)


def test_a_head_shares_one_value():
    amax_R1 = torch.rand(HEADS.rows, 1)
    shared_R1 = share_amax(amax_R1, HEADS, Sharing.HEAD)
    by_head_HD = amax_R1.view(HEADS.count, -1)
    assert torch.equal(shared_R1.view(HEADS.count, -1), by_head_HD.amax(1, True).expand(-1, 128))


def test_minima_can_be_shared_too():
    """For asymmetric formats minus the minimum is shared; it may be negative."""
    low_R1 = -torch.rand(HEADS.rows, 1) - 1
    shared_R1 = share_amax(low_R1, HEADS)
    assert all((shared_R1[rows] == low_R1[rows].amax()).all() for rows in cycles(HEADS))


def test_some_heads_share_as_all_do():
    """What is quantized block by block comes out as from the whole weight."""
    amax_R1 = torch.rand(HEADS.rows, 1)
    for sharing in Sharing:
        whole_R1 = share_amax(amax_R1, HEADS, sharing)
        parts = [share_amax(part, HEADS, sharing) for part in amax_R1.split(HEADS.head_dim)]
        assert torch.equal(torch.cat(parts), whole_R1)
