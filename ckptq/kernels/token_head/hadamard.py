"""The orthonormal Walsh-Hadamard rotation of heads, and its inverse.

Meaning: `reference.rotate` and `unrotate`, to the bit. A row (a head of a token) is held as a
tuple of slices of L columns, small enough for one thread: then no step moves data between threads.
Steps inside a slice add and subtract neighbours and put the sums before the differences; after all
of them every index bit has been the last one once, and the order is the natural one again. The
later steps add and subtract whole slices.

Shape letters: R rows, L columns of a slice, D head dimension (slices x L), N block of the rotation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.rounding import narrow, widen
from ckptq.kernels.token_head.kv_format import Rotation, rotation_block, slice_size

ROWS = 64
"""Of a program: a row per thread of two warps."""


@triton.jit
def sign(o_L):
    """1.0 or -1.0 by the last bit of a hash of the index."""
    h_L = o_L.to(tl.uint32) * 0x9E3779B1
    h_L = (h_L ^ (h_L >> 15)) * 0x85EBCA77
    h_L = h_L ^ (h_L >> 13)
    return 1.0 - 2.0 * (h_L & 1).to(tl.float32)


@triton.jit
def weighted(slices, SIGNED: tl.constexpr, NORM: tl.constexpr):
    """Each column times NORM (N^-0.5, which makes the transform orthonormal), and its sign."""
    if SIGNED:
        L: tl.constexpr = slices[0].shape[1]
        scaled = ()
        for i in tl.static_range(len(slices)):
            weight_1L = sign(tl.arange(0, L) + i * L)[None, :] * NORM
            scaled = scaled + (slices[i] * weight_1L,)  # type: ignore[assignment]  # noqa: RUF005
        return scaled
    else:
        return [x_RL * NORM for x_RL in slices]


@triton.jit
def _within(x_RL, STEPS: tl.constexpr):
    ROWS: tl.constexpr = x_RL.shape[0]
    L: tl.constexpr = x_RL.shape[1]
    for _ in tl.static_range(STEPS):
        even, odd = tl.split(tl.reshape(x_RL, (ROWS, L // 2, 2)))
        x_R2L = tl.trans(tl.join(even + odd, even - odd), (0, 2, 1))
        x_RL = tl.reshape(x_R2L, (ROWS, L))
    return x_RL


@triton.jit
def across(slices, STEP: tl.constexpr):
    """The step of the butterflies between slices that lie STEP apart."""
    crossed = ()
    for i in tl.static_range(len(slices)):
        if i & STEP:
            crossed = crossed + (slices[i ^ STEP] - slices[i],)  # type: ignore[assignment]  # noqa: RUF005
        else:
            crossed = crossed + (slices[i] + slices[i ^ STEP],)  # type: ignore[assignment]  # noqa: RUF005
    return crossed


@triton.jit
def walsh_hadamard(slices, STEPS_WITHIN: tl.constexpr, STEPS_ACROSS: tl.constexpr):
    """Every run of N columns of a row transformed, fp32, without the norm."""
    turned = [_within(x_RL, STEPS_WITHIN) for x_RL in slices]
    for step in tl.static_range(STEPS_ACROSS):
        turned = across(turned, 1 << step)
    return turned


@triton.jit
def load_rows(ptrs_RL, m_R, COUNT: tl.constexpr):
    """The slices of rows whose first slices are at `ptrs_RL`, in fp32."""
    L: tl.constexpr = ptrs_RL.shape[1]
    slices = ()
    for i in tl.static_range(COUNT):
        x_RL = widen(tl.load(ptrs_RL + i * L, mask=m_R[:, None], other=0.0))
        slices = slices + (x_RL,)  # type: ignore[assignment]  # noqa: RUF005
    return slices


@triton.jit
def _rotate_kernel(
    x_ptr,
    out_ptr,
    R,
    D: tl.constexpr,
    COUNT: tl.constexpr,
    STEPS_WITHIN: tl.constexpr,
    STEPS_ACROSS: tl.constexpr,
    NORM: tl.constexpr,
    SIGNED: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
):
    L: tl.constexpr = D // COUNT
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_RL = row_R[:, None] * D + tl.arange(0, L)[None, :]
    slices = load_rows(x_ptr + o_RL, row_R < R, COUNT)
    if not INVERSE:
        slices = weighted(slices, SIGNED, NORM)
    slices = walsh_hadamard(slices, STEPS_WITHIN, STEPS_ACROSS)
    if INVERSE:
        slices = weighted(slices, SIGNED, NORM)
    for i in tl.static_range(COUNT):
        x_RL = narrow(slices[i], out_ptr.dtype.element_ty)
        tl.store(out_ptr + i * L + o_RL, x_RL, mask=(row_R < R)[:, None])


def _slicing(head_dim: int) -> dict[str, int | float]:
    """How a row is cut and turned: compile-time arguments.

    Raises ValueError for a head size that is not a multiple of 8.
    """
    block = rotation_block(head_dim)
    if block < 8:
        raise ValueError(f"want a head size in eights, got {head_dim}")
    size = slice_size(head_dim)
    within = size.bit_length() - 1
    return {
        "COUNT": head_dim // size,
        "STEPS_WITHIN": within,
        "STEPS_ACROSS": block.bit_length() - 1 - within,
        "NORM": block**-0.5,
    }


def rotate(
    x: Tensor, rotation: Rotation, dtype: torch.dtype | None = None, inverse: bool = False
) -> Tensor:
    """Heads x [..., D] rotated, or rotated back, in `dtype` or x's own."""
    dtype = dtype or x.dtype
    if rotation is Rotation.NONE:
        return x.to(dtype)
    x = x.contiguous()
    D = x.shape[-1]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    R = x.numel() // D
    _rotate_kernel[(triton.cdiv(R, ROWS),)](
        *(x, out, R),
        D=D,
        **_slicing(D),
        SIGNED=rotation is Rotation.SIGNED,
        INVERSE=inverse,
        ROWS=ROWS,
        num_warps=2,
        enable_fp_fusion=False,
    )
    return out
