"""The orthonormal Walsh-Hadamard rotation of heads, and its inverse.

Meaning: `reference.kv.rotate` and `unrotate`, to the bit. A row (a head of a token) is held as a
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

from ckptq.kernels.kv_format import Rotation, rotation_block
from ckptq.kernels.rounding import narrow, widen

IN_REGISTERS = 128
"""Values of a row that a thread can hold."""


@triton.jit
def sign(o_L):
    """1.0 or -1.0 by the last bit of a hash of the index."""
    h_L = o_L.to(tl.uint32) * 0x9E3779B1
    h_L = (h_L ^ (h_L >> 15)) * 0x85EBCA77
    h_L = h_L ^ (h_L >> 13)
    return 1.0 - 2.0 * (h_L & 1).to(tl.float32)


@triton.jit
def times_signs(slices, COUNT: tl.constexpr):
    """Each column times its sign."""
    L: tl.constexpr = slices[0].shape[1]
    signed = ()
    for i in tl.static_range(COUNT):
        signed = signed + (slices[i] * sign(tl.arange(0, L) + i * L)[None, :],)  # type: ignore[assignment]  # noqa: RUF005
    return signed


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
def _across(slices, STEP: tl.constexpr, COUNT: tl.constexpr):
    crossed = ()
    for i in tl.static_range(COUNT):
        if i & STEP:
            crossed = crossed + (slices[i ^ STEP] - slices[i],)  # type: ignore[assignment]  # noqa: RUF005
        else:
            crossed = crossed + (slices[i] + slices[i ^ STEP],)  # type: ignore[assignment]  # noqa: RUF005
    return crossed


@triton.jit
def walsh_hadamard(
    slices,
    COUNT: tl.constexpr,
    STEPS_WITHIN: tl.constexpr,
    STEPS_ACROSS: tl.constexpr,
    NORM: tl.constexpr,
):
    """Every run of N columns of a row transformed, fp32; NORM is N^-0.5."""
    turned = ()
    for i in tl.static_range(COUNT):
        turned = turned + (_within(slices[i], STEPS_WITHIN),)  # type: ignore[assignment]  # noqa: RUF005
    for step in tl.static_range(STEPS_ACROSS):
        turned = _across(turned, 1 << step, COUNT)
    scaled = ()
    for i in tl.static_range(COUNT):
        scaled = scaled + (turned[i] * NORM,)  # type: ignore[assignment]  # noqa: RUF005
    return scaled


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
    SIGNS_BEFORE: tl.constexpr,
    SIGNS_AFTER: tl.constexpr,
    ROWS: tl.constexpr,
):
    L: tl.constexpr = D // COUNT
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_RL = row_R[:, None] * D + tl.arange(0, L)[None, :]
    slices = load_rows(x_ptr + o_RL, row_R < R, COUNT)
    if SIGNS_BEFORE:
        slices = times_signs(slices, COUNT)
    slices = walsh_hadamard(slices, COUNT, STEPS_WITHIN, STEPS_ACROSS, NORM)
    if SIGNS_AFTER:
        slices = times_signs(slices, COUNT)
    for i in tl.static_range(COUNT):
        x_RL = narrow(slices[i], out_ptr.dtype.element_ty)
        tl.store(out_ptr + i * L + o_RL, x_RL, mask=(row_R < R)[:, None])


def slicing(head_dim: int, rotation: Rotation) -> dict[str, int | float]:
    """How a row is cut and turned: the compile-time arguments of `walsh_hadamard`.

    Rows that are not turned are cut as little as possible. Raises ValueError for a rotated head
    size that is not a multiple of 8.
    """
    block = rotation_block(head_dim)
    size = block
    if rotation is not Rotation.NONE:
        if block < 8:
            raise ValueError(f"rotation wants a head size in eights, got {head_dim}")
        size = min(block, 8 if head_dim <= IN_REGISTERS else 16)
    within = size.bit_length() - 1
    return {
        "COUNT": head_dim // size,
        "STEPS_WITHIN": within,
        "STEPS_ACROSS": block.bit_length() - 1 - within,
        "NORM": block**-0.5,
    }


def rows_of_program(head_dim: int, rotation: Rotation) -> int:
    """A row per thread of four warps where rows are turned, else some 4096 values."""
    return (
        128 if rotation is not Rotation.NONE else max(1, 4096 // triton.next_power_of_2(head_dim))
    )


def rotate(
    x: Tensor, rotation: Rotation, dtype: torch.dtype | None = None, inverse: bool = False
) -> Tensor:
    """Heads x [..., D] rotated, or rotated back, in `dtype` or x's own."""
    dtype = dtype or x.dtype
    if rotation is Rotation.NONE:
        return x.to(dtype)
    x = x.contiguous()
    D, signed = x.shape[-1], rotation is Rotation.SIGNED
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    R = x.numel() // D
    rows = rows_of_program(D, rotation)
    _rotate_kernel[(triton.cdiv(R, rows),)](
        *(x, out, R),
        D=D,
        **slicing(D, rotation),
        SIGNS_BEFORE=signed and not inverse,
        SIGNS_AFTER=signed and inverse,
        ROWS=rows,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out
