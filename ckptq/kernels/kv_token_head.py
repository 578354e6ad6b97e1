"""Quantize keys or values by token and head as they are written into a paged cache.

Meaning: `reference.kv.quantize`, to the bit. A row is one head of one token: rotate it, find its
scale (and zero point), round, pack two or four codes to a byte. One read of the input, one write.

Shape letters: T tokens, K key/value heads, D head dimension, W bytes of a head; R a program's rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.hadamard import rotation_constexprs, sign, walsh_hadamard
from ckptq.kernels.kv_format import EPS, THRESHOLD, KVFormat, Rotation
from ckptq.kernels.paging import Layout, slot_offset
from ckptq.kernels.rounding import e4m3_code, has_native_e4m3, round_half_even, widen


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
def _root_mean_square(x_RD, D: tl.constexpr):
    """[R], in a way that no order of summation can change: over whole 2047ths of the maximum."""
    step_R = tl.maximum(tl.math.div_rn(tl.max(tl.abs(x_RD), 1), 2047.0), 1.1754943508222875e-38)
    whole_RD = round_half_even(x_RD * tl.math.div_rn(1.0, step_R)[:, None])
    mean_R = tl.math.div_rn(tl.sum(whole_RD * whole_RD, 1).to(tl.float32), D * 1.0)
    return step_R * tl.math.sqrt_rn(mean_R)


@triton.jit
def _pack(code_RD, BITS: tl.constexpr):
    """[R, D] int32 codes -> [R, W] uint8."""
    PER: tl.constexpr = 8 // BITS
    ROWS: tl.constexpr = code_RD.shape[0]
    WIDTH: tl.constexpr = code_RD.shape[1] // PER
    shift = BITS * tl.arange(0, PER)
    code_RWP = tl.reshape(code_RD, (ROWS, WIDTH, PER)) << shift[None, None, :]
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
    THRESHOLD: tl.constexpr,
    N: tl.constexpr,
    STEPS: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token_R, head_R = row_R // K, row_R % K
    o_D = tl.arange(0, BLOCK_D)
    slot_R = tl.load(slot_ptr + token_R, mask=token_R < T, other=-1).to(tl.int64)
    m_R = slot_R >= 0
    m_RD = m_R[:, None] & (o_D < D)[None, :]
    x_ptrs = x_ptr + (token_R * x_stride_t + head_R * x_stride_h)[:, None] + o_D[None, :]
    x_RD = widen(tl.load(x_ptrs, mask=m_RD, other=0.0))
    if SIGNED:
        x_RD *= sign(o_D)[None, :]
    if ROTATED:
        x_RD = walsh_hadamard(x_RD, N, STEPS, NORM)

    o_R = slot_offset(slot_R, scale_stride_block, scale_stride_token, BLOCK)
    o_R += head_R * scale_stride_head
    if KIND == "int2":
        scale_R = tl.maximum(_root_mean_square(x_RD, D), EPS)
        edge_R1 = (scale_R * THRESHOLD)[:, None]
        code_RD = (x_RD >= -edge_R1).to(tl.int32) + (x_RD >= 0.0).to(tl.int32)
        code_RW = _pack(code_RD + (x_RD >= edge_R1).to(tl.int32), BITS)
    elif KIND == "int4":
        low_R = tl.minimum(tl.min(x_RD, 1), 0.0)
        span_R = tl.maximum(tl.max(x_RD, 1), 0.0) - low_R
        scale_R = tl.maximum(tl.math.div_rn(span_R, 15.0), EPS)
        inverse_R = tl.math.div_rn(1.0, scale_R)
        zero_R = tl.minimum(round_half_even(-low_R * inverse_R), 15)
        code_RD = round_half_even(x_RD * inverse_R[:, None]) + zero_R[:, None]
        code_RW = _pack(tl.minimum(tl.maximum(code_RD, 0), 15), BITS)
        tl.store(zero_ptr + o_R, zero_R.to(tl.uint8), mask=m_R)
    else:
        HALF_RANGE: tl.constexpr = 448.0 if KIND == "fp8" else 127.0
        scale_R = tl.maximum(tl.math.div_rn(tl.max(tl.abs(x_RD), 1), HALF_RANGE), EPS)
        ratio_RD = x_RD * tl.math.div_rn(1.0, scale_R)[:, None]
        if KIND == "fp8":
            code_RW = e4m3_code(ratio_RD, NATIVE)
        else:
            code_RW = round_half_even(ratio_RD).to(tl.uint8)
    tl.store(scale_ptr + o_R, scale_R, mask=m_R)

    WIDTH: tl.constexpr = code_RW.shape[1]
    o_W = tl.arange(0, WIDTH)
    c_R = slot_offset(slot_R, code_stride_block, code_stride_token, BLOCK)
    c_R += head_R * code_stride_head
    m_RW = m_R[:, None] & (o_W < D * BITS // 8)[None, :]
    tl.store(code_ptr + c_R[:, None] + o_W[None, :], code_RW, mask=m_RW)


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
    block_d = triton.next_power_of_2(D)
    rows = max(1, 4096 // block_d)
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
        THRESHOLD=THRESHOLD,
        **rotation_constexprs(D),
        ROWS=rows,
        BLOCK_D=block_d,
        num_warps=4,
        enable_fp_fusion=False,
    )
