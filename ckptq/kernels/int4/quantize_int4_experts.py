"""Fused experts to packed INT4 groups along the input dimension, the transpose folded in.

Meaning: `reference.quantize_int4_experts`. Eight rows as stored share a word; a thread puts
it together, and whole words are transposed. Groups lie inside a program; one read.

Shape letters: E experts, K input features (rows as stored), N output channels (columns as stored),
G groups along K, P words along K, Z words of zero points along N; 8 the codes of a word.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.int4.quantize_int4 import asymmetric_qparams, nibble_bits, word_of_nibbles
from ckptq.kernels.quantize.slices import (
    NARROW,
    absmax_of,
    extrema_of,
    integer_bits_narrow,
    load_slices,
    scale_of,
)
from ckptq.kernels.rounding import lift_and_reciprocal, narrow, widen

TILE_K, TILE_N, WARPS = 128, 64, 2
"""Rows and columns of a tile, 128 bytes of bf16 and 64 of words; few warps, as they wait for each
other when words are transposed."""


@triton.jit
def _per_word(x_GN, GROUPS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """A value per group, repeated over the words of the group: [GROUPS * WORDS, BLOCK]."""
    x_GWN = tl.broadcast_to(x_GN[:, None, :], (GROUPS, WORDS, BLOCK))
    return tl.reshape(x_GWN, (GROUPS * WORDS, BLOCK))


@triton.jit
def _quantize_int4_experts_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    zero_ptr,
    stride_e,
    stride_k,
    K,
    N,
    SYMMETRIC: tl.constexpr,
    NARROW: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    WORDS: tl.constexpr = GROUP // 8
    G, P = K // GROUP, K // 8
    blocks_g, blocks_n = tl.cdiv(G, GROUPS), tl.cdiv(N, BLOCK)
    e = (tl.program_id(0) // (blocks_g * blocks_n)).to(tl.int64)
    block_g = tl.program_id(0) // blocks_n % blocks_g
    n_N = (tl.program_id(0) % blocks_n) * BLOCK + tl.arange(0, BLOCK)
    word_P = block_g.to(tl.int64) * (GROUPS * WORDS) + tl.arange(0, GROUPS * WORDS)
    m_PN = (word_P < P)[:, None] & (n_N < N)[None, :]
    x_ptrs = x_ptr + e * stride_e + 8 * word_P[:, None] * stride_k + n_N[None, :]
    x_8PN = load_slices(x_ptrs, stride_k, m_PN, 8, "")

    stored: tl.constexpr = scale_ptr.dtype.element_ty
    g_G = block_g * GROUPS + tl.arange(0, GROUPS)
    m_GN = (g_G < G)[:, None] & (n_N < N)[None, :]
    if SYMMETRIC:
        amax_GWN = tl.reshape(absmax_of(x_8PN, 8), (GROUPS, WORDS, BLOCK))
        scale_GN = scale_of(tl.max(amax_GWN, 1), 7.5, stored)
    else:
        low_PN, high_PN = extrema_of(x_8PN, 8)
        low_GWN = tl.reshape(low_PN, (GROUPS, WORDS, BLOCK))
        high_GWN = tl.reshape(high_PN, (GROUPS, WORDS, BLOCK))
        scale_GN, zero_GN = asymmetric_qparams(tl.min(low_GWN, 1), tl.max(high_GWN, 1), stored)
        # channels past the end pad the last word with zero bits
        code_GN = tl.where(m_GN, zero_GN.to(tl.int32) + 8, 0) << (n_N % 8 * 4)[None, :]
        word_GZ = tl.sum(tl.reshape(code_GN, (GROUPS, BLOCK // 8, 8)), 2)
        z_Z = (tl.program_id(0) % blocks_n) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        o_GZ = (e * tl.cdiv(N, 8) + z_Z)[None, :] * G + g_G[:, None]
        m_GZ = (g_G < G)[:, None] & (z_Z < tl.cdiv(N, 8))[None, :]
        tl.store(zero_ptr + o_GZ, word_GZ, mask=m_GZ)
    o_GN = (e * N + n_N)[None, :] * G + g_G[:, None]
    tl.store(scale_ptr + o_GN, narrow(scale_GN, stored), mask=m_GN)

    zero_PN = 0.0 if SYMMETRIC else _per_word(zero_GN, GROUPS, WORDS, BLOCK)
    total_PN = tl.zeros([GROUPS * WORDS, BLOCK], tl.int32)
    if NARROW:
        lift_GN, reciprocal_GN = lift_and_reciprocal(scale_GN)  # once a group, not once a word
        lift_PN = _per_word(lift_GN, GROUPS, WORDS, BLOCK)
        reciprocal_PN = _per_word(reciprocal_GN, GROUPS, WORDS, BLOCK)
        for i in tl.static_range(8):
            x_PN = widen(x_8PN[i])
            bits_PN = integer_bits_narrow(x_PN, lift_PN, reciprocal_PN, zero_PN, -8, 7, 8)
            total_PN += bits_PN << (4 * i)
    else:
        scale_PN = _per_word(scale_GN, GROUPS, WORDS, BLOCK)
        for i in tl.static_range(8):
            total_PN += nibble_bits(x_8PN[i], scale_PN, zero_PN, NARROW) << (4 * i)
    packed_PN = word_of_nibbles(total_PN)
    o_PN = (e * N + n_N)[None, :] * P + word_P[:, None]
    tl.store(packed_ptr + o_PN, packed_PN, mask=m_PN)


def quantize_int4_experts(
    x_EKN: Tensor, group: int = 128, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed [E, N, K / 8] int32, scales [E, N, G], packed zero points [E, Z, G] or None.

    `x_EKN` may be a slice of columns. `group` divides K and is 32, 64 or 128.
    """
    E, K, N = x_EKN.shape
    if K % group or group not in (32, 64, 128) or x_EKN.stride(2) != 1:
        raise ValueError(f"group {group} does not fit {tuple(x_EKN.shape)} {x_EKN.stride()}")
    G, Z, device = K // group, triton.cdiv(N, 8), x_EKN.device
    packed_ENP = torch.empty(E, N, K // 8, dtype=torch.int32, device=device)
    scale_ENG = torch.empty(E, N, G, dtype=x_EKN.dtype, device=device)
    zero_EZG = None if symmetric else torch.empty(E, Z, G, dtype=torch.int32, device=device)
    groups, block = TILE_K // group, TILE_N
    _quantize_int4_experts_kernel[(E * triton.cdiv(G, groups) * triton.cdiv(N, block),)](
        *(x_EKN, packed_ENP, scale_ENG, zero_EZG, x_EKN.stride(0), x_EKN.stride(1), K, N),
        SYMMETRIC=symmetric,
        NARROW=x_EKN.dtype in NARROW,
        GROUP=group,
        GROUPS=groups,
        BLOCK=block,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return packed_ENP, scale_ENG, zero_EZG
