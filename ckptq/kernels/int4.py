"""INT4 by groups along a row, packed eight to an int32: quantize and pack, unpack and dequantize.

Meaning: `reference.int4`. Words are those of compressed-tensors' pack-quantized: column i of a run
of eight at bits 4i, offset by 8; the zero points of eight rows share a word. A program takes eight
rows, so that it can pack their zero points too. Reads 2 bytes and writes half a byte a weight.

A group is padded to a power of two, so any group size works that divides the columns and is a
multiple of 8, and a whole row may be one group.

Shape letters: R rows, C columns, G groups, L columns in a group, P packed columns, Z packed rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.codes import NARROW, or_eps, ratio, scale_of
from ckptq.kernels.rounding import narrow, round_half_even, widen
from ckptq.kernels.row_order import order_constexprs, source_row
from ckptq.permute.order import Heads, RopeOrder


@triton.jit
def asymmetric_qparams(low, high, dtype: tl.constexpr):
    """Scale and zero point of ranges, each step rounded to `dtype`; both fp32.

    The zero point uses the scale before eps replaces a zero, and is 0 where that divides 0 by 0.
    """
    low = tl.minimum(low, 0.0)
    span = widen(narrow(tl.maximum(high, 0.0) - low, dtype))
    scale = widen(narrow(tl.math.div_rn(span, 15.0), dtype))
    shift = widen(narrow(tl.math.div_rn(low, tl.where(scale == 0.0, 1.0, scale)), dtype))
    shift = tl.where(scale == 0.0, tl.where(low < 0.0, -16.0, -8.0), shift)
    zero = tl.clamp(widen(narrow(-8.0 - shift, dtype)), -8.0, 7.0)
    return or_eps(scale, dtype), round_half_even(zero).to(tl.float32)


@triton.jit
def nibbles(x, scale, zero, SHORT: tl.constexpr):
    """Codes plus 8, in int32: 0 to 15."""
    return round_half_even(tl.clamp(ratio(x, scale, SHORT) + zero, -8.0, 7.0)) + 8


@triton.jit
def _quantize_int4_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    zero_ptr,
    x_stride,
    R,
    C,
    P,
    SYMMETRIC: tl.constexpr,
    SHORT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    TO_HALF_SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
):
    G = C // GROUP
    chunks = tl.cdiv(G, GROUPS)
    z = (tl.program_id(0) // chunks).to(tl.int64)
    row_R = z * 8 + tl.arange(0, 8)
    g_G = (tl.program_id(0) % chunks) * GROUPS + tl.arange(0, GROUPS)
    within_L = tl.arange(0, PADDED)
    col_GL = g_G[:, None] * GROUP + within_L[None, :]
    m_GL = (g_G < G)[:, None] & (within_L < GROUP)[None, :]
    m_RGL = (row_R < R)[:, None, None] & m_GL[None, :, :]
    source_R = source_row(row_R, HEAD_DIM, ROTARY_DIM, TO_HALF_SPLIT)
    x_ptrs = x_ptr + source_R[:, None, None] * x_stride + col_GL[None, :, :]
    x_RGL = widen(tl.load(x_ptrs, mask=m_RGL, other=0.0))  # [8, GROUPS, PADDED]

    stored: tl.constexpr = scale_ptr.dtype.element_ty
    m_RG = (row_R < R)[:, None] & (g_G < G)[None, :]
    if SYMMETRIC:
        scale_RG = scale_of(tl.max(tl.abs(x_RGL), 2), 7.5, stored)
        zero_RG = tl.zeros_like(scale_RG)
    else:
        scale_RG, zero_RG = asymmetric_qparams(tl.min(x_RGL, 2), tl.max(x_RGL, 2), stored)
        # rows past the end pad the last word with zero bits
        word_RG = tl.where(m_RG, zero_RG.to(tl.int32) + 8, 0) << (4 * tl.arange(0, 8))[:, None]
        tl.store(zero_ptr + z * G + g_G, tl.sum(word_RG, 0), mask=g_G < G)
    o_RG = row_R[:, None] * G + g_G[None, :]
    tl.store(scale_ptr + o_RG, narrow(scale_RG, stored), mask=m_RG)

    code_RGL = nibbles(x_RGL, scale_RG[:, :, None], zero_RG[:, :, None], SHORT)
    code_RGL = tl.where(m_GL[None, :, :], code_RGL, 0)
    code_RGP8 = tl.reshape(code_RGL, (8, GROUPS, PADDED // 8, 8))
    packed_RGP = tl.sum(code_RGP8 << (4 * tl.arange(0, 8)), 3)  # bits do not meet: a sum is an or
    first_P = 8 * tl.arange(0, PADDED // 8)
    word_GP = (g_G[:, None] * GROUP + first_P[None, :]) // 8
    m_GP = (g_G < G)[:, None] & (first_P < GROUP)[None, :]
    m_RGP = (row_R < R)[:, None, None] & m_GP[None, :, :]
    packed_ptrs = packed_ptr + row_R[:, None, None] * P + word_GP[None, :, :]
    tl.store(packed_ptrs, packed_RGP, mask=m_RGP)


@triton.jit
def _dequantize_int4_kernel(
    packed_ptr,
    scale_ptr,
    zero_ptr,
    x_ptr,
    R,
    C,
    P,
    group,
    ASYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(P, BLOCK)
    row_R = (tl.program_id(0) // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    word_P = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    m_RP = (row_R < R)[:, None] & (word_P < P)[None, :]
    packed_RP = tl.load(packed_ptr + row_R[:, None] * P + word_P[None, :], mask=m_RP, other=0)
    # a group is a multiple of 8 columns or the whole row, so a word lies in one group
    G = C // group
    g_P = word_P * 8 // group
    scale_RP = tl.load(scale_ptr + row_R[:, None] * G + g_P[None, :], mask=m_RP, other=0.0)
    offset_RP = tl.full([ROWS, BLOCK], 8, tl.int32)
    if ASYMMETRIC:
        zero_ptrs = zero_ptr + (row_R // 8)[:, None] * G + g_P[None, :]
        word_RP = tl.load(zero_ptrs, mask=m_RP, other=0)
        # codes and zero points carry the same offset of 8, so it cancels
        offset_RP = (word_RP >> (row_R % 8 * 4).to(tl.int32)[:, None]) & 15
    code_RP8 = (packed_RP[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15
    value_RP8 = (code_RP8 - offset_RP[:, :, None]).to(tl.float32) * widen(scale_RP)[:, :, None]
    value_RC = tl.reshape(value_RP8, (ROWS, BLOCK * 8))
    col_C = (tl.program_id(0) % chunks) * (BLOCK * 8) + tl.arange(0, BLOCK * 8)
    m_RC = (row_R < R)[:, None] & (col_C < C)[None, :]
    x_ptrs = x_ptr + row_R[:, None] * C + col_C[None, :]
    tl.store(x_ptrs, narrow(value_RC, x_ptr.dtype.element_ty), mask=m_RC)


def quantize_int4(
    x_RC: Tensor,
    group: int | None = 128,
    symmetric: bool = True,
    heads: Heads | None = None,
    to: RopeOrder = RopeOrder.HALF_SPLIT,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed codes [R, P] int32, scales [R, G] in x's dtype, packed zero points [Z, G] or None.

    `group` None makes a row one group. With `heads`, row r of the result is row
    `gather_indices(heads, to)[r]` of x, zero points included.
    """
    R, C = x_RC.shape
    group = group or C
    if C % group or (group % 8 and group != C) or x_RC.stride(1) != 1:
        raise ValueError(f"group {group} does not fit {tuple(x_RC.shape)} {x_RC.stride()}")
    G, P, Z = C // group, triton.cdiv(C, 8), triton.cdiv(R, 8)
    packed_RP = torch.empty(R, P, dtype=torch.int32, device=x_RC.device)
    scale_RG = torch.empty(R, G, dtype=x_RC.dtype, device=x_RC.device)
    zero_ZG = None if symmetric else torch.empty(Z, G, dtype=torch.int32, device=x_RC.device)
    padded = max(8, triton.next_power_of_2(group))
    groups = min(triton.next_power_of_2(G), max(1, 1024 // padded))
    _quantize_int4_kernel[(Z * triton.cdiv(G, groups),)](
        *(x_RC, packed_RP, scale_RG, zero_ZG, x_RC.stride(0), R, C, P),
        SYMMETRIC=symmetric,
        SHORT=x_RC.dtype in NARROW,
        **order_constexprs(heads, to, R),
        GROUP=group,
        GROUPS=groups,
        PADDED=padded,
        num_warps=min(16, max(4, groups * padded // 128)),
        enable_fp_fusion=False,
    )
    return packed_RP, scale_RG, zero_ZG


def dequantize_int4(
    packed_RP: Tensor, scale_RG: Tensor, columns: int, zero_ZG: Tensor | None = None
) -> Tensor:
    """(code - zero point) * scale in the scale's dtype, [R, C] with C = `columns`."""
    (R, P), G = packed_RP.shape, scale_RG.shape[1]
    group = columns // G
    if triton.cdiv(columns, 8) != P or columns % G or (group % 8 and G > 1):
        raise ValueError(f"{columns} columns do not fit {P} words and {G} groups a row")
    if not (packed_RP.is_contiguous() and scale_RG.is_contiguous()):
        raise ValueError(f"want dense tensors: {packed_RP.stride()} {scale_RG.stride()}")
    x_RC = torch.empty(R, columns, dtype=scale_RG.dtype, device=packed_RP.device)
    block = min(triton.next_power_of_2(P), 128)
    rows = 1024 // block
    _dequantize_int4_kernel[(triton.cdiv(R, rows) * triton.cdiv(P, block),)](
        *(packed_RP, scale_RG, zero_ZG, x_RC, R, columns, P, group),
        ASYMMETRIC=zero_ZG is not None,
        ROWS=rows,
        BLOCK=block,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return x_RC
