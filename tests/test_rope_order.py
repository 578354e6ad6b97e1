"""Where rows go: against the loader's formula, and transformers' own RoPE."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptq.errors import PlanError
from ckptq.permute.apply import permute_rows, row_permutation
from ckptq.rope_order import Heads, RopeOrder, gather_indices, keeps_blocks

HALF, INTER = RopeOrder.HALF_SPLIT, RopeOrder.INTERLEAVED


@st.composite
def geometries(draw: st.DrawFn) -> Heads:
    rotary_dim = 2 * draw(st.integers(1, 40))
    return Heads(draw(st.integers(1, 5)), rotary_dim + draw(st.integers(0, 9)), rotary_dim)


def loader_formula(w_RC: torch.Tensor, heads: int) -> torch.Tensor:
    """vLLM 0.32 `Llama4ForCausalLM.permute_qk_weight_for_rotary`."""
    rows, cols = w_RC.shape
    return w_RC.view(heads, rows // heads // 2, 2, cols).transpose(1, 2).reshape(rows, cols)


def test_order_of_six_rows_by_hand():
    assert gather_indices(Heads(1, 6), HALF) == [0, 2, 4, 1, 3, 5]
    assert gather_indices(Heads(1, 6), INTER) == [0, 3, 1, 4, 2, 5]
    assert gather_indices(Heads(2, 6, 4), HALF) == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]


@pytest.mark.parametrize("heads", [Heads(40, 128), Heads(8, 128), Heads(4, 64), Heads(1, 6)])
def test_same_as_the_loader(heads):
    w_RC = torch.randn(heads.rows, 3)
    assert torch.equal(permute_rows(w_RC, heads, HALF), loader_formula(w_RC, heads.count))
    assert not torch.equal(permute_rows(w_RC, heads, INTER), loader_formula(w_RC, heads.count))


@given(geometries())
def test_orders_are_inverse_and_stay_in_their_heads(heads):
    to_half, to_inter = row_permutation(heads, HALF), row_permutation(heads, INTER)
    rows = torch.arange(heads.rows)
    assert torch.equal(to_half[to_inter], rows)
    assert torch.equal(to_inter[to_half], rows)
    assert torch.equal(to_half // heads.head_dim, rows // heads.head_dim)
    beyond = rows % heads.head_dim >= heads.rotary_dim
    assert torch.equal(to_half[beyond], rows[beyond])


@given(geometries())
def test_pairs_of_one_order_become_pairs_of_the_other(heads):
    """Rows (2i, 2i + 1) of each head land at (i, i + rotary_dim / 2)."""
    from_H_D = row_permutation(heads, HALF).view(heads.count, heads.head_dim)
    half = heads.rotary_dim // 2
    first, second = from_H_D[:, :half], from_H_D[:, half : heads.rotary_dim]
    assert torch.equal(second, first + 1)
    assert bool((first % heads.head_dim % 2 == 0).all())


@pytest.mark.parametrize(
    ("heads", "block_rows", "kept"),
    [
        (Heads(8, 128), 128, True),
        (Heads(8, 64), 128, True),
        (Heads(3, 64), 128, True),
        (Heads(4, 256), 128, False),
        (Heads(8, 128), 64, False),
        (Heads(8, 128, 64), 64, True),
        (Heads(4, 96), 128, False),
        (Heads(1, 96), 128, True),
    ],
)
def test_which_blocks_keep_their_rows(heads, block_rows, kept):
    assert keeps_blocks(heads, block_rows) is kept


@pytest.mark.parametrize(
    ("count", "head_dim", "rotary_dim"), [(0, 8, 8), (1, 8, 3), (1, 8, 10), (1, 7, 0), (2, 1, 0)]
)
def test_impossible_heads_are_refused(count, head_dim, rotary_dim):
    with pytest.raises(PlanError):
        Heads(count, head_dim, rotary_dim)
