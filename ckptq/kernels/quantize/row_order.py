"""The RoPE row permutation as address arithmetic, so that no pass over the rows is needed for it.

The same permutation as `ckptq.rope_order.gather_indices`, which is what the tests hold it to.
"""

import triton
import triton.language as tl

from ckptq.rope_order import Heads, RopeOrder


def order_constexprs(heads: Heads | None, to: RopeOrder, rows: int) -> dict[str, int | bool]:
    """The compile-time arguments of `source_row`. HEAD_DIM 0 leaves rows where they are."""
    if heads is None:
        return {"HEAD_DIM": 0, "ROTARY_DIM": 0, "TO_HALF_SPLIT": False}
    if heads.rows != rows:
        raise ValueError(f"{heads} has {heads.rows} rows, the tensor {rows}")
    return {
        "HEAD_DIM": heads.head_dim,
        "ROTARY_DIM": heads.rotary_dim,
        "TO_HALF_SPLIT": to is RopeOrder.HALF_SPLIT,
    }


@triton.jit
def source_row(row, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, TO_HALF_SPLIT: tl.constexpr):
    """The input row from which output row `row` is read."""
    if HEAD_DIM == 0:
        return row
    else:
        within = row % HEAD_DIM
        half: tl.constexpr = ROTARY_DIM // 2
        if TO_HALF_SPLIT:
            moved = 2 * (within % half) + within // half
        else:
            moved = within // 2 + (within % 2) * half
        return row - within + tl.where(within < ROTARY_DIM, moved, within)
