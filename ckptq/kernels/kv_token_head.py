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
    walsh_hadamard,
    weighted,
)
from ckptq.kernels.kv_format import EPS, THRESHOLD, KVFormat, Rotation, rotation_block
from ckptq.kernels.paging import Layout, slot_offset
from ckptq.kernels.rounding import INTERPRETED, e4m3_code, has_native_e4m3, round_half_even

EDGE = tl.constexpr(THRESHOLD)


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
def _nearest(x, factor, shift):
    """Bits whose low half is the whole number nearest to x * factor + shift, ties to even.

    One rounding: `shift` is whole, and so is the number 1.5 * 2^23 that leaves no bits below one.
    The interpreter does not fuse, so it computes in float64, where the product is exact.
    """
    if INTERPRETED:
        exact = x.to(tl.float64) * factor.to(tl.float64) + shift.to(tl.float64)
        whole = (exact + 6755399441055744.0) - 6755399441055744.0
        return (whole.to(tl.float32) + 12582912.0).to(tl.int32, bitcast=True)
    else:
        return tl.fma(x, factor, shift + 12582912.0).to(tl.int32, bitcast=True)


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
def _root_mean_square(slices, D: tl.constexpr, COUNT: tl.constexpr, STEPS_WITHIN: tl.constexpr):
    """[R], in an order that the layout in registers cannot change."""
    ROWS: tl.constexpr = slices[0].shape[0]
    L: tl.constexpr = slices[0].shape[1]
    total = slices[0] * slices[0]
    for i in tl.static_range(1, COUNT):
        total = total + slices[i] * slices[i]
    for step in tl.static_range(STEPS_WITHIN):
        even, odd = tl.split(tl.reshape(total, (ROWS, L >> (step + 1), 2)))
        total = even + odd
    return tl.math.sqrt_rn(tl.math.div_rn(tl.reshape(total, (ROWS,)), D * 1.0))


@triton.jit
def _scale_and_zero(
    slices,
    KIND: tl.constexpr,
    EPS: tl.constexpr,
    D: tl.constexpr,
    COUNT: tl.constexpr,
    STEPS_WITHIN: tl.constexpr,
):
    """Scales and zero points, fp32 [R]; zero points are 0 but for INT4."""
    if KIND == "int4":
        low_R = -tl.maximum(_largest(_absolute(slices, -1, COUNT), COUNT), 0.0)
        span_R = tl.maximum(_largest(slices, COUNT), 0.0) - low_R
        scale_R = tl.maximum(tl.math.div_rn(span_R, 15.0), EPS)
        zero_R = round_half_even(-low_R * _inverse(scale_R, KIND)).to(tl.float32)
    elif KIND == "int2":
        scale_R = tl.maximum(_root_mean_square(slices, D, COUNT, STEPS_WITHIN), EPS)
        zero_R = tl.zeros(scale_R.shape, tl.float32)
    else:
        HALF_RANGE: tl.constexpr = 448.0 if KIND == "fp8" else 127.0
        amax_R = _largest(_absolute(slices, 0, COUNT), COUNT)
        scale_R = tl.maximum(tl.math.div_rn(amax_R, HALF_RANGE), EPS)
        zero_R = tl.zeros(scale_R.shape, tl.float32)
    return scale_R, zero_R


@triton.jit
def _inverse(scale_R, KIND: tl.constexpr):
    """What values are multiplied with to give codes, before the zero point is added."""
    if KIND == "int4":
        # a millionth short, so that no code leaves 0 to 15 and none has to be clamped
        return tl.math.div_rn(0.999999, scale_R)
    elif KIND == "int2":
        return tl.math.div_rn(1.0, scale_R * EDGE)
    else:
        return tl.math.div_rn(1.0, scale_R)


@triton.jit
def _codes(x_RL, inverse_R1, zero_R1, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Codes of one slice: bytes of FP8 and INT8; of INT4 and INT2 the low bits of int32."""
    if KIND == "int4":
        return _nearest(x_RL, inverse_R1, zero_R1)
    elif KIND == "int2":
        # levels change where x * inverse is -1, 0 and 1
        code_RL = (x_RL * inverse_R1 + 1.5) + 12582912.0
        return tl.clamp(code_RL, 12582912.0, 12582915.0).to(tl.int32, bitcast=True)
    elif KIND == "fp8":
        return e4m3_code(x_RL * inverse_R1, NATIVE)
    else:
        return round_half_even(x_RL * inverse_R1).to(tl.uint8)


@triton.jit
def _halfwords(code_RL, BITS: tl.constexpr):
    """Codes [R, L] -> halfwords [R, L * BITS / 16], the first code in the lowest bits.

    What else lies in the codes' bits, 1.5 * 2^23 in fp32, has nothing in its low half.
    """
    PER: tl.constexpr = 16 // BITS
    ROWS: tl.constexpr = code_RL.shape[0]
    COUNT: tl.constexpr = code_RL.shape[1] // PER
    shift_P = BITS * tl.arange(0, PER)
    code_RCP = tl.reshape(code_RL, (ROWS, COUNT, PER)) << shift_P[None, None, :]
    return tl.sum(code_RCP, 2).to(tl.int16)


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
    K,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ROTATED: tl.constexpr,
    SIGNED: tl.constexpr,
    NATIVE: tl.constexpr,
    EPS: tl.constexpr,
    COUNT: tl.constexpr,
    STEPS_WITHIN: tl.constexpr,
    STEPS_ACROSS: tl.constexpr,
    NORM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_STEPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    L: tl.constexpr = D // COUNT
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token_R, head_R = row_R // K, row_R % K
    slot_R = tl.load(slot_ptr + token_R, mask=token_R < T, other=-1).to(tl.int64)
    m_R = slot_R >= 0
    m_R1 = m_R[:, None]
    x_R1 = (token_R * x_stride_t + head_R * x_stride_h)[:, None]
    slices = load_rows(x_ptr + x_R1 + tl.arange(0, L)[None, :], m_R, COUNT)
    if ROTATED:
        slices = weighted(slices, SIGNED, NORM, COUNT)
        slices = walsh_hadamard(slices, COUNT, STEPS_WITHIN, STEPS_ACROSS)

    scale_R, zero_R = _scale_and_zero(slices, KIND, EPS, D, COUNT, STEPS_WITHIN)
    o_R = slot_offset(slot_R, scale_stride_block, scale_stride_token, BLOCK)
    o_R += head_R * scale_stride_head
    tl.store(scale_ptr + o_R, scale_R, mask=m_R)
    if KIND == "int4":
        tl.store(zero_ptr + o_R, zero_R.to(tl.uint8), mask=m_R)
    c_R = slot_offset(slot_R, code_stride_block, code_stride_token, BLOCK)
    c_R1 = (c_R + head_R * code_stride_head)[:, None]
    inverse_R1, zero_R1 = _inverse(scale_R, KIND)[:, None], zero_R[:, None]
    if BITS == 8:
        for i in tl.static_range(COUNT):
            code_RL = _codes(slices[i], inverse_R1, zero_R1, KIND, NATIVE)
            tl.store(code_ptr + i * L + (c_R1 + tl.arange(0, L)[None, :]), code_RL, mask=m_R1)
    elif GROUP == 0:
        W: tl.constexpr = L * BITS // 16
        for i in tl.static_range(COUNT):
            code_RW = _halfwords(_codes(slices[i], inverse_R1, zero_R1, KIND, NATIVE), BITS)
            ptrs_RW = code_ptr + i * W + (c_R1 + tl.arange(0, W)[None, :])
            tl.store(ptrs_RW, code_RW, mask=m_R1)
    else:
        columns = ()
        for i in tl.static_range(COUNT):
            code_RW = _halfwords(_codes(slices[i], inverse_R1, zero_R1, KIND, NATIVE), BITS)
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
    rotated, bits = cache.rotation is not Rotation.NONE, cache.fmt.bits
    # what packs several codes stores halfwords: pointers and strides count those
    code = cache.code if bits == 8 else cache.code.view(torch.int16)
    cut = slicing(D, rotated or bits < 8)
    rows = rows_of_program(D, rotated or bits < 8)
    _write_token_head_kernel[(triton.cdiv(T * K, rows),)](
        *(x_TKD, code, cache.scale, cache.zero, slot_T),
        *x_TKD.stride()[:2],
        *cache.layout.strides(code),
        *cache.layout.strides(cache.scale),
        *(T, K),
        D=D,
        BLOCK=block,
        KIND=cache.fmt.name.partition("_")[0],
        BITS=bits,
        ROTATED=rotated,
        SIGNED=cache.rotation is Rotation.SIGNED,
        NATIVE=has_native_e4m3(x_TKD.device),
        EPS=EPS,
        **cut,
        **grouping(D * bits // 16, D // int(cut["COUNT"]) * bits // 16),
        ROWS=rows,
        num_warps=2,
        enable_fp_fusion=False,
    )
