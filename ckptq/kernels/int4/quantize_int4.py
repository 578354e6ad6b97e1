"""INT4 by groups along a row, packed eight to an int32: quantize and pack, unpack and dequantize.

Meaning: `reference_int4`. Words are those of compressed-tensors' pack-quantized: column i of a run
of eight at bits 4i, offset by 8; the zero points of eight rows share a word. A program takes eight
rows, so that it can pack their zero points too, or one long row. Reads 2 bytes and writes half a
byte a weight; arithmetic is the limit as much as memory, so it is counted (`integer_bits`).

A group is padded to a power of two, so any group size works that divides the columns and is a
multiple of 8, and a whole row may be one group.

Shape letters: R rows, C columns, G groups, P packed columns, Z packed rows; Q pairs of a row and a
group, S slices of a group, L the columns of a slice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.quantize.slices import (
    NARROW,
    absmax_of,
    extrema_of,
    integer_bits,
    or_eps,
    over,
    scale_of,
)
from ckptq.kernels.rounding import narrow, round_half_even, widen


@triton.jit
def asymmetric_qparams(low, high, dtype: tl.constexpr):
    """Scale and zero point of ranges, each step rounded to `dtype`; both fp32.

    The zero point uses the scale before eps replaces a zero, and is 0 where that divides 0 by 0.
    """
    low = tl.minimum(low, 0.0)
    span = widen(narrow(tl.maximum(high, 0.0) - low, dtype))
    scale = over(span, 15.0, dtype)
    shift = widen(narrow(tl.math.div_rn(low, tl.where(scale == 0.0, 1.0, scale)), dtype))
    shift = tl.where(scale == 0.0, tl.where(low < 0.0, -16.0, -8.0), shift)
    zero = tl.clamp(widen(narrow(-8.0 - shift, dtype)), -8.0, 7.0)
    return or_eps(scale, dtype), round_half_even(zero).to(tl.float32)


@triton.jit
def nibble_bits(x, scale, zero, NARROW: tl.constexpr):
    """0x4B400000 + code + 8, the code in [-8, 7]."""
    return integer_bits(x, scale, zero, -8, 7, 8, NARROW)


@triton.jit
def word_of_nibbles(total):
    """The word from the sum over i of `nibble_bits` << 4i, modulo 2^32."""
    return total - 0x3F400000  # what eight times 0x4B400000, shifted so, comes to


@triton.jit
def _slice_mask(m_Q1, l_1L, LEFT: tl.constexpr, LANES: tl.constexpr):
    """Of a slice that begins LEFT columns before the end of its group."""
    if LEFT >= LANES:
        return m_Q1
    else:
        return m_Q1 & (l_1L < LEFT)


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
    NARROW: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SLICES: tl.constexpr,
    LANES: tl.constexpr,
):
    G = C // GROUP
    chunks = tl.cdiv(G, GROUPS)
    first_g = (tl.program_id(0) % chunks) * GROUPS
    first_row = (tl.program_id(0) // chunks).to(tl.int64) * ROWS
    q_Q = tl.arange(0, ROWS * GROUPS)
    row_Q = first_row + q_Q // GROUPS
    g_Q = first_g + q_Q % GROUPS
    m_Q = (row_Q < R) & (g_Q < G)
    l_1L = tl.arange(0, LANES)[None, :]
    x_ptrs = x_ptr + (row_Q * x_stride + g_Q * GROUP)[:, None] + l_1L
    # a thread gets a part of every slice, all of one group: it divides for the scale once
    x_SQL = (tl.load(x_ptrs, mask=_slice_mask(m_Q[:, None], l_1L, GROUP, LANES), other=0.0),)
    for s in tl.static_range(1, SLICES):
        m_QL = _slice_mask(m_Q[:, None], l_1L, GROUP - s * LANES, LANES)
        x_SQL = x_SQL + (tl.load(x_ptrs + s * LANES, mask=m_QL, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005

    stored: tl.constexpr = scale_ptr.dtype.element_ty
    if SYMMETRIC:
        scale_Q = scale_of(tl.max(absmax_of(x_SQL), 1), 7.5, stored)
        zero_Q1 = 0.0
    else:
        low_QL, high_QL = extrema_of(x_SQL)
        scale_Q, zero_Q = asymmetric_qparams(tl.min(low_QL, 1), tl.max(high_QL, 1), stored)
        zero_Q1 = zero_Q[:, None]
        # rows past the end pad the last word with zero bits
        nibble_Q = tl.where(m_Q, zero_Q.to(tl.int32) + 8, 0) << (row_Q % 8 * 4).to(tl.int32)
        if ROWS == 8:
            g_G = first_g + tl.arange(0, GROUPS)
            word_G = tl.sum(tl.reshape(nibble_Q, (ROWS, GROUPS)), 0)
            tl.store(zero_ptr + first_row // 8 * G + g_G, word_G, mask=g_G < G)
        else:
            tl.atomic_or(zero_ptr + row_Q // 8 * G + g_Q, nibble_Q, mask=m_Q, sem="relaxed")
    tl.store(scale_ptr + row_Q * G + g_Q, narrow(scale_Q, stored), mask=m_Q)

    w_1P = tl.arange(0, LANES // 8)[None, :]
    packed_ptrs = packed_ptr + (row_Q * P + g_Q * (GROUP // 8))[:, None] + w_1P
    for s in tl.static_range(SLICES):
        bits_QL = nibble_bits(widen(x_SQL[s]), scale_Q[:, None], zero_Q1, NARROW)
        if GROUP % 8 != 0:  # the last word of a row ends in zero bits
            bits_QL = tl.where(l_1L < GROUP - s * LANES, bits_QL, 0x4B400000)
        bits_QP8 = tl.reshape(bits_QL, (ROWS * GROUPS, LANES // 8, 8))
        word_QP = word_of_nibbles(tl.sum(bits_QP8 << (4 * tl.arange(0, 8)), 2))
        m_QP = _slice_mask(m_Q[:, None], 8 * w_1P, GROUP - s * LANES, LANES)
        tl.store(packed_ptrs + s * (LANES // 8), word_QP, mask=m_QP)


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


def _tiling(group: int, groups: int) -> dict[str, int]:
    """What a program holds: eight rows of some groups, or one long group; cut into slices.

    64 values a thread share what a program costs, and of one warp nobody waits for another.
    """
    padded = max(8, triton.next_power_of_2(group))
    rows = 8 if padded <= 1024 else 1
    at_once = min(triton.next_power_of_2(groups), max(1, 256 // padded))
    slices = min(4, max(1, padded // 32))
    return {
        "ROWS": rows,
        "GROUPS": at_once,
        "SLICES": slices,
        "LANES": padded // slices,
        "num_warps": min(16, max(1, rows * at_once * padded // 2048)),
    }


def quantize_int4(
    x_RC: Tensor, group: int | None = 128, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed codes [R, P] int32, scales [R, G] in x's dtype, packed zero points [Z, G] or None.

    `group` None makes a row one group.
    """
    R, C = x_RC.shape
    group = group or C
    if C % group or (group % 8 and group != C) or group > 65536 or x_RC.stride(1) != 1:
        raise ValueError(f"group {group} does not fit {tuple(x_RC.shape)} {x_RC.stride()}")
    G, P, Z = C // group, triton.cdiv(C, 8), triton.cdiv(R, 8)
    packed_RP = torch.empty(R, P, dtype=torch.int32, device=x_RC.device)
    scale_RG = torch.empty(R, G, dtype=x_RC.dtype, device=x_RC.device)
    zero_ZG = None if symmetric else torch.zeros(Z, G, dtype=torch.int32, device=x_RC.device)
    tiling = _tiling(group, G)
    programs = triton.cdiv(R, tiling["ROWS"]) * triton.cdiv(G, tiling["GROUPS"])
    _quantize_int4_kernel[(programs,)](
        *(x_RC, packed_RP, scale_RG, zero_ZG, x_RC.stride(0), R, C, P),
        SYMMETRIC=symmetric,
        NARROW=x_RC.dtype in NARROW,
        GROUP=group,
        **tiling,
        enable_fp_fusion=False,
    )
    return packed_RP, scale_RG, zero_ZG


def dense_zero_points(zero_ZG: Tensor | None, rows: int, groups: int) -> Tensor | None:
    """Packed zero points as kernels read them. Raises ValueError where they are of other rows."""
    if zero_ZG is None:
        return None
    wanted = (triton.cdiv(rows, 8), groups)
    if tuple(zero_ZG.shape) != wanted:
        raise ValueError(f"packed zero points {tuple(zero_ZG.shape)}, want {wanted}")
    return zero_ZG.contiguous()


def dequantize_int4(
    packed_RP: Tensor, scale_RG: Tensor, columns: int, zero_ZG: Tensor | None = None
) -> Tensor:
    """(code - zero point) * scale in the scale's dtype, [R, C] with C = `columns`.

    Raises ValueError for shapes that do not fit, or words and scales that are not dense.
    """
    (R, P), G = packed_RP.shape, scale_RG.shape[1]
    group = columns // G
    if triton.cdiv(columns, 8) != P or columns % G or (group % 8 and G > 1):
        raise ValueError(f"{columns} columns do not fit {P} words and {G} groups a row")
    if not (packed_RP.is_contiguous() and scale_RG.is_contiguous()):
        raise ValueError(f"want dense tensors: {packed_RP.stride()} {scale_RG.stride()}")
    zero_ZG = dense_zero_points(zero_ZG, R, G)
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
