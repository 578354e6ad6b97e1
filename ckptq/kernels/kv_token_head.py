"""Quantize keys or values by token and head as they are written into a paged cache.

Meaning: `reference.kv.quantize`, to the bit. A row is one head of one token: rotate it, find its
scale (and zero point), round, pack two or four codes to a byte. One read of the input, one write.
Rows are tuples of slices, as `hadamard` cuts them.

Shape letters: T tokens, K key/value heads, D head dimension, R a program's rows, L columns of a
slice, W bytes of a slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.hadamard import (
    load_rows,
    rows_of_program,
    slicing,
    times_signs,
    walsh_hadamard,
)
from ckptq.kernels.kv_format import EPS, THRESHOLD, KVFormat, Rotation
from ckptq.kernels.paging import Layout, slot_offset
from ckptq.kernels.rounding import e4m3_code, has_native_e4m3, round_half_even


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenHeadCache:
    """Keys or values of a paged cache, as one format holds them."""

    fmt: KVFormat
    rotation: Rotation
    layout: Layout
    head_dim: int
    code: Tensor
    """uint8, [blocks, tokens, heads, W] or [blocks, heads, tokens, W]."""
    scale: Tensor
    """fp32, the same without the last axis."""
    zero: Tensor | None
    """uint8, shaped as the scales; only of asymmetric formats."""

    @classmethod
    def empty(
        cls,
        fmt: KVFormat,
        blocks: int,
        block: int,
        heads: int,
        head_dim: int,
        *,
        device: torch.device,
        layout: Layout = Layout.NHD,
        rotation: Rotation | None = None,
    ) -> TokenHeadCache:
        """Room for blocks x block tokens. `rotation` replaces the format's own."""
        width, shape = fmt.width(head_dim), layout.shape(blocks, block, heads)
        return cls(
            fmt=fmt,
            rotation=fmt.rotation if rotation is None else rotation,
            layout=layout,
            head_dim=head_dim,
            code=torch.zeros(*shape, width, dtype=torch.uint8, device=device),
            scale=torch.zeros(shape, device=device),
            zero=torch.zeros(shape, dtype=torch.uint8, device=device) if fmt.asymmetric else None,
        )


@triton.jit
def _largest(slices, COUNT: tl.constexpr):
    """[R]: the largest value of each row."""
    best = slices[0]
    for i in tl.static_range(1, COUNT):
        best = tl.maximum(best, slices[i])
    return tl.max(best, 1)


@triton.jit
def _absolute(slices, SIGN: tl.constexpr, COUNT: tl.constexpr):
    """|x| where SIGN is 0, else x times it."""
    changed = ()
    for i in tl.static_range(COUNT):
        x_RL = tl.abs(slices[i]) if SIGN == 0 else slices[i] * SIGN
        changed = changed + (x_RL,)  # type: ignore[assignment]  # noqa: RUF005
    return changed


@triton.jit
def _root_mean_square(slices, amax_R, D: tl.constexpr, COUNT: tl.constexpr):
    """[R], in a way that no order of summation can change: over whole 2047ths of the maximum."""
    step_R = tl.maximum(tl.math.div_rn(amax_R, 2047.0), 1.1754943508222875e-38)
    inverse_R1 = tl.math.div_rn(1.0, step_R)[:, None]
    total = tl.zeros(slices[0].shape, tl.int32)
    for i in tl.static_range(COUNT):
        whole = round_half_even(slices[i] * inverse_R1)
        total += whole * whole
    mean_R = tl.math.div_rn(tl.sum(total, 1).to(tl.float32), D * 1.0)
    return step_R * tl.math.sqrt_rn(mean_R)


@triton.jit
def _scale_and_zero(
    slices, KIND: tl.constexpr, EPS: tl.constexpr, D: tl.constexpr, COUNT: tl.constexpr
):
    """Scales [R] fp32 and zero points [R] int32, which are zeros but for INT4."""
    if KIND == "int4":
        low_R = -tl.maximum(_largest(_absolute(slices, -1, COUNT), COUNT), 0.0)
        span_R = tl.maximum(_largest(slices, COUNT), 0.0) - low_R
        scale_R = tl.maximum(tl.math.div_rn(span_R, 15.0), EPS)
        zero_R = round_half_even(-low_R * tl.math.div_rn(1.0, scale_R))
        return scale_R, tl.minimum(zero_R, 15)
    else:
        amax_R = _largest(_absolute(slices, 0, COUNT), COUNT)
        zero_R = tl.zeros(amax_R.shape, tl.int32)
        if KIND == "int2":
            return tl.maximum(_root_mean_square(slices, amax_R, D, COUNT), EPS), zero_R
        else:
            HALF_RANGE: tl.constexpr = 448.0 if KIND == "fp8" else 127.0
            return tl.maximum(tl.math.div_rn(amax_R, HALF_RANGE), EPS), zero_R


@triton.jit
def _codes(x_RL, scale_R, zero_R, KIND: tl.constexpr, NATIVE: tl.constexpr, EDGE: tl.constexpr):
    """int32 or uint8 codes of one slice, [R, L]."""
    if KIND == "int2":
        edge_R1 = (scale_R * EDGE)[:, None]
        code_RL = (x_RL >= -edge_R1).to(tl.int32) + (x_RL >= 0.0).to(tl.int32)
        return code_RL + (x_RL >= edge_R1).to(tl.int32)
    else:
        ratio_RL = x_RL * tl.math.div_rn(1.0, scale_R)[:, None]
        if KIND == "int4":
            code_RL = round_half_even(ratio_RL) + zero_R[:, None]
            return tl.minimum(tl.maximum(code_RL, 0), 15)
        elif KIND == "fp8":
            return e4m3_code(ratio_RL, NATIVE)
        else:
            return round_half_even(ratio_RL).to(tl.uint8)


@triton.jit
def _pack(code_RL, BITS: tl.constexpr):
    """Codes [R, L] -> bytes, the first code in the lowest bits."""
    if BITS == 8:
        return code_RL
    else:
        PER: tl.constexpr = 8 // BITS
        ROWS: tl.constexpr = code_RL.shape[0]
        WIDTH: tl.constexpr = code_RL.shape[1] // PER
        shift = BITS * tl.arange(0, PER)
        code_RWP = tl.reshape(code_RL, (ROWS, WIDTH, PER)) << shift[None, None, :]
        return tl.sum(code_RWP, 2).to(tl.uint8)  # bits do not meet: a sum is an or


@triton.jit
def _quantize_token_head_kernel(
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
    K,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ROTATED: tl.constexpr,
    SIGNED: tl.constexpr,
    NATIVE: tl.constexpr,
    EPS: tl.constexpr,
    EDGE: tl.constexpr,
    COUNT: tl.constexpr,
    STEPS_WITHIN: tl.constexpr,
    STEPS_ACROSS: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
):
    L: tl.constexpr = D // COUNT
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token_R, head_R = row_R // K, row_R % K
    slot_R = tl.load(slot_ptr + token_R, mask=token_R < T, other=-1).to(tl.int64)
    m_R = slot_R >= 0
    x_R1 = (token_R * x_stride_t + head_R * x_stride_h)[:, None]
    slices = load_rows(x_ptr + x_R1 + tl.arange(0, L)[None, :], m_R, COUNT)
    if SIGNED:
        slices = times_signs(slices, COUNT)
    if ROTATED:
        slices = walsh_hadamard(slices, COUNT, STEPS_WITHIN, STEPS_ACROSS, NORM)

    scale_R, zero_R = _scale_and_zero(slices, KIND, EPS, D, COUNT)
    o_R = slot_offset(slot_R, scale_stride_block, scale_stride_token, BLOCK)
    o_R += head_R * scale_stride_head
    tl.store(scale_ptr + o_R, scale_R, mask=m_R)
    if KIND == "int4":
        tl.store(zero_ptr + o_R, zero_R.to(tl.uint8), mask=m_R)
    W: tl.constexpr = L * BITS // 8
    c_R = slot_offset(slot_R, code_stride_block, code_stride_token, BLOCK)
    c_RW = (c_R + head_R * code_stride_head)[:, None] + tl.arange(0, W)[None, :]
    for i in tl.static_range(COUNT):
        code_RL = _codes(slices[i], scale_R, zero_R, KIND, NATIVE, EDGE)
        tl.store(code_ptr + i * W + c_RW, _pack(code_RL, BITS), mask=m_R[:, None])


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
    rows = rows_of_program(D, cache.rotation)
    rotated = cache.rotation is not Rotation.NONE
    _quantize_token_head_kernel[(triton.cdiv(T * K, rows),)](
        *(x_TKD, cache.code, cache.scale, cache.zero, slot_T),
        *x_TKD.stride()[:2],
        *cache.layout.strides(cache.code),
        *cache.layout.strides(cache.scale),
        *(T, K),
        D=D,
        BLOCK=block,
        KIND=cache.fmt.name.partition("_")[0],
        BITS=cache.fmt.bits,
        ROTATED=rotated,
        SIGNED=cache.rotation is Rotation.SIGNED,
        NATIVE=has_native_e4m3(x_TKD.device),
        EPS=EPS,
        EDGE=THRESHOLD,
        **slicing(D, cache.rotation),
        ROWS=rows,
        num_warps=4,
        enable_fp_fusion=False,
    )
