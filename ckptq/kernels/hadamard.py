"""The orthonormal Walsh-Hadamard rotation of heads, and its inverse.

Meaning: `reference.kv.rotate` and `unrotate`, to the bit. Each of the log2 N steps adds and
subtracts neighbours and puts the sums before the differences; after all steps every index bit has
been the last one once, and the order is the natural one again.

Shape letters: R rows (a head of a token each), D head dimension, N block of the rotation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.kv_format import Rotation, rotation_block
from ckptq.kernels.rounding import narrow, widen


@triton.jit
def sign(o_D):
    """1.0 or -1.0 by the last bit of a hash of the index."""
    h_D = o_D.to(tl.uint32) * 0x9E3779B1
    h_D = (h_D ^ (h_D >> 15)) * 0x85EBCA77
    h_D = h_D ^ (h_D >> 13)
    return 1.0 - 2.0 * (h_D & 1).to(tl.float32)


@triton.jit
def walsh_hadamard(x_RD, N: tl.constexpr, STEPS: tl.constexpr, NORM: tl.constexpr):
    """Every run of N = 2^STEPS consecutive columns transformed; NORM is N^-0.5. fp32."""
    ROWS: tl.constexpr = x_RD.shape[0]
    BLOCK_D: tl.constexpr = x_RD.shape[1]
    BLOCKS: tl.constexpr = ROWS * BLOCK_D // N
    x_BN = tl.reshape(x_RD, (BLOCKS, N))
    for _ in tl.static_range(STEPS):
        even, odd = tl.split(tl.reshape(x_BN, (BLOCKS, N // 2, 2)))
        x_B2N = tl.trans(tl.join(even + odd, even - odd), (0, 2, 1))
        x_BN = tl.reshape(x_B2N, (BLOCKS, N))
    return tl.reshape(x_BN, (ROWS, BLOCK_D)) * NORM


@triton.jit
def _rotate_kernel(
    x_ptr,
    out_ptr,
    R,
    D: tl.constexpr,
    N: tl.constexpr,
    STEPS: tl.constexpr,
    NORM: tl.constexpr,
    SIGNS_BEFORE: tl.constexpr,
    SIGNS_AFTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_D = tl.arange(0, BLOCK_D)
    o_RD = row_R[:, None] * D + o_D[None, :]
    m_RD = (row_R < R)[:, None] & (o_D < D)[None, :]
    x_RD = widen(tl.load(x_ptr + o_RD, mask=m_RD, other=0.0))
    if SIGNS_BEFORE:
        x_RD *= sign(o_D)[None, :]
    x_RD = walsh_hadamard(x_RD, N, STEPS, NORM)
    if SIGNS_AFTER:
        x_RD *= sign(o_D)[None, :]
    tl.store(out_ptr + o_RD, narrow(x_RD, out_ptr.dtype.element_ty), mask=m_RD)


def rotation_constexprs(head_dim: int) -> dict[str, int | float]:
    """The compile-time arguments of `walsh_hadamard`."""
    block = rotation_block(head_dim)
    return {"N": block, "STEPS": block.bit_length() - 1, "NORM": block**-0.5}


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
    block = triton.next_power_of_2(D)
    rows = max(1, 2048 // block)
    _rotate_kernel[(triton.cdiv(R, rows),)](
        *(x, out, R),
        D=D,
        **rotation_constexprs(D),
        SIGNS_BEFORE=signed and not inverse,
        SIGNS_AFTER=signed and inverse,
        ROWS=rows,
        BLOCK_D=block,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out
