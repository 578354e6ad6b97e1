"""Quantize keys or values by token and head as they are written into a paged cache.

Meaning: `reference.kv.quantize`, to the bit. A row is one head of one token: find its scale (and
zero point), round, pack two or four codes to a byte. One read of the input, one write. Rows are
tuples of slices, as `hadamard` cuts them; rotated formats have a kernel of their own,
`kv_rotated`.

Shape letters: T tokens, K key/value heads, D head dimension, R a program's rows, L columns of a
slice, W bytes of a slice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.hadamard import load_rows, rows_of_program, slicing
from ckptq.kernels.kv_codes import codes, halfwords, step_inverse_zero
from ckptq.kernels.kv_format import EPS, Rotation, rotation_block
from ckptq.kernels.kv_rotated import write_rotated
from ckptq.kernels.paging import slot_offset
from ckptq.kernels.rounding import has_native_e4m3
from ckptq.kernels.token_head_cache import TokenHeadCache


@triton.jit
def _as_columns(x_RC):
    """The one or two columns of a tensor, as a tuple of [R, 1]."""
    ROWS: tl.constexpr = x_RC.shape[0]
    if x_RC.shape[1] == 1:
        return (x_RC,)
    else:
        first, second = tl.split(x_RC)
        return (tl.reshape(first, (ROWS, 1)), tl.reshape(second, (ROWS, 1)))


@triton.jit
def _side_by_side(columns, FIRST: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr):
    """COUNT = 2^STEPS columns [R, 1] from `FIRST` on as one tensor [R, COUNT]."""
    ROWS: tl.constexpr = columns[0].shape[0]
    parts = ()
    for i in tl.static_range(COUNT):
        parts = parts + (columns[FIRST + i],)  # type: ignore[assignment]  # noqa: RUF005
    for step in tl.static_range(STEPS):
        # what is joined becomes the last bit of the index, so its first bit is joined first
        paired = ()
        for i in tl.static_range(COUNT >> (step + 1)):
            pair = tl.join(parts[i], parts[i + (COUNT >> (step + 1))])
            paired = paired + (tl.reshape(pair, (ROWS, 2 << step)),)  # type: ignore[assignment]  # noqa: RUF005
        parts = paired
    return parts[0]  # type: ignore[misc]


@triton.jit
def _write_token_head_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    zero_ptr,
    slot_ptr,
    x_stride_t,
    x_stride_h,
    code_stride_block,
    code_stride_token,
    code_stride_head,
    scale_stride_block,
    scale_stride_token,
    scale_stride_head,
    T,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    NATIVE: tl.constexpr,
    EPS: tl.constexpr,
    COUNT: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_STEPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    L: tl.constexpr = D // COUNT
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token_R, head_R = (row_R // K).to(tl.int64), row_R % K
    slot_R = tl.load(slot_ptr + token_R, mask=token_R < T, other=-1).to(tl.int64)
    m_R = slot_R >= 0
    m_R1 = m_R[:, None]
    x_R1 = (token_R * x_stride_t + head_R * x_stride_h)[:, None]
    slices = load_rows(x_ptr + x_R1 + tl.arange(0, L)[None, :], m_R, COUNT)
    step_R, inverse_R, zero_R = step_inverse_zero(slices, KIND, EPS, D, COUNT, STEPS)
    scale_R = tl.maximum(step_R, EPS)
    o_R = slot_offset(slot_R, scale_stride_block, scale_stride_token, BLOCK)
    o_R += head_R * scale_stride_head
    tl.store(scale_ptr + o_R, scale_R, mask=m_R)
    if KIND == "int4":
        tl.store(zero_ptr + o_R, zero_R.to(tl.uint8), mask=m_R)
    c_R = slot_offset(slot_R, code_stride_block, code_stride_token, BLOCK)
    c_R1 = (c_R + head_R * code_stride_head)[:, None]
    inverse_R1, zero_R1 = inverse_R[:, None], zero_R[:, None]
    if BITS == 8:
        for i in tl.static_range(COUNT):
            code_RL = codes(slices[i], inverse_R1, zero_R1, KIND, NATIVE)
            tl.store(code_ptr + i * L + (c_R1 + tl.arange(0, L)[None, :]), code_RL, mask=m_R1)
    elif GROUP == 0:
        W: tl.constexpr = L * BITS // 16
        for i in tl.static_range(COUNT):
            code_RW = halfwords(codes(slices[i], inverse_R1, zero_R1, KIND, NATIVE), BITS)
            ptrs_RW = code_ptr + i * W + (c_R1 + tl.arange(0, W)[None, :])
            tl.store(ptrs_RW, code_RW, mask=m_R1)
    else:
        columns = ()
        for i in tl.static_range(COUNT):
            code_RW = halfwords(codes(slices[i], inverse_R1, zero_R1, KIND, NATIVE), BITS)
            columns = columns + _as_columns(code_RW)
        for i in tl.static_range(D * BITS // 16 // GROUP):
            code_RG = _side_by_side(columns, i * GROUP, GROUP, GROUP_STEPS)
            ptrs_RG = code_ptr + i * GROUP + (c_R1 + tl.arange(0, GROUP)[None, :])
            tl.store(ptrs_RG, code_RG, mask=m_R1)


def grouping(halfwords: int, of_slice: int) -> dict[str, int]:
    """How many halfwords of a row are stored at once: some power of two of them, or 0.

    Slices of one or two halfwords are put side by side first; larger ones are stored as they are.
    """
    group = min(rotation_block(halfwords), 32) if of_slice <= 2 else 0
    return {"GROUP": group, "GROUP_STEPS": max(0, group.bit_length() - 1)}


def write_token_head(x_TKD: Tensor, cache: TokenHeadCache, slot_T: Tensor) -> None:
    """Quantize keys or values [T, K, D] into their slots; a slot of -1 is skipped.

    Raises ValueError where heads or head sizes are not the cache's.
    """
    T, K, D = x_TKD.shape
    block, heads = cache.layout.sizes(cache.code)
    if (heads, cache.head_dim) != (K, D):
        raise ValueError(f"{K} heads of {D} into a cache of {heads} heads of {cache.head_dim}")
    if x_TKD.stride(2) != 1:
        x_TKD = x_TKD.contiguous()
    bits = cache.fmt.bits
    if cache.rotation is not Rotation.NONE:
        write_rotated(x_TKD, cache, slot_T)
        return
    # what packs several codes stores halfwords: pointers and strides count those
    code = cache.code if bits == 8 else cache.code.view(torch.int16)
    cut = slicing(D, bits < 8)
    rows = rows_of_program(D, bits < 8)
    _write_token_head_kernel[(triton.cdiv(T * K, rows),)](
        *(x_TKD, code, cache.scale, cache.zero, slot_T),
        *x_TKD.stride()[:2],
        *cache.layout.strides(code),
        *cache.layout.strides(cache.scale),
        T,
        K=K,
        D=D,
        BLOCK=block,
        KIND=cache.fmt.name.partition("_")[0],
        BITS=bits,
        NATIVE=has_native_e4m3(x_TKD.device),
        EPS=EPS,
        COUNT=cut["COUNT"],
        STEPS=cut["STEPS_WITHIN"],
        **grouping(D * bits // 16, D // int(cut["COUNT"]) * bits // 16),
        ROWS=rows,
        num_warps=2,
        enable_fp_fusion=False,
    )
