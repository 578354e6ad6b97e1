"""Attention over a paged cache of INT8, FP8, INT4 or INT2 codes with a scale per token and head.

Meaning: `cache.reference.attention` over `reference.dequantize`. The query is rotated as the
keys were, and the result is rotated back as the values need; in between nothing is unpacked to
memory:

- A byte holds 1, 2 or 4 neighbouring dimensions, so the query is read as as many interleaved
  streams (the dimensions 4j, 4j + 1, ... for INT2): each is multiplied with the codes at its place
  in the bytes, and the products are summed. The result leaves as interleaved stripes.
- Codes are multiplied as they are. With a zero point z, q . (code - z) is q . code - z * sum(q), so
  scores lose z times the query's sum, and the result loses the sum of weight * scale * z over keys.
- The scale of a key multiplies its scores, that of a value its weight.

Shape letters: T queries of all sequences, H query heads, K key/value heads, D head dimension,
W bytes of a head; M rows of a tile (queries x heads of a group), N keys of a tile.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.attention.mask import Mask, cap_height
from ckptq.kernels.attention.online_softmax import (
    cap,
    dot,
    finish,
    fold,
    key_bounds,
    oldest_key,
    visible,
)
from ckptq.kernels.cache.key_parts import keys_of_part
from ckptq.kernels.cache.paged_addresses import key_offset, query_rows
from ckptq.kernels.cache.paged_attention import launch
from ckptq.kernels.cache.paging import Sequences
from ckptq.kernels.rounding import narrow, widen
from ckptq.kernels.token_head.code_operands import key_bytes, keys_of, load_keys, load_values, value_bytes, values_of
from ckptq.kernels.token_head.hadamard import rotate
from ckptq.kernels.token_head.kv_codes import CONSTANTS, DECODERS, UNITS, value_pairs
from ckptq.kernels.token_head.token_head_cache import TokenHeadCache


@triton.jit
def power_below(x):
    """A positive fp32 without its mantissa, at least 2^-100."""
    return tl.maximum((x.to(tl.int32, bitcast=True) & 0x7F800000), 27 << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse_power(x):
    """1 / x of a power of two."""
    return ((254 << 23) - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _load_query(q_ptrs, m_MW, PLACE: tl.constexpr, STREAMS: tl.constexpr):
    """One stream of the query, [M, W]; a stream that the format lacks is zero, and folded away."""
    if PLACE < STREAMS:
        return tl.load(q_ptrs + PLACE, mask=m_MW, other=0.0)
    else:
        return tl.zeros(q_ptrs.shape, q_ptrs.dtype.element_ty)


@triton.jit
def _add_score(
    score_MN,
    q_MW,
    byte_NW,
    first,
    second,
    PLACE: tl.constexpr,
    STREAMS: tl.constexpr,
    KIND: tl.constexpr,
    DECODER: tl.constexpr,
    UNIT: tl.constexpr,
):
    if PLACE < STREAMS:
        pairs = value_pairs(byte_NW[0], byte_NW[1], first, second, PLACE, KIND, DECODER, UNIT, q_MW.dtype)
        return dot(keys_of(pairs), tl.trans(q_MW), score_MN)
    else:
        return score_MN


@triton.jit
def _add_value(
    acc_MW,
    decay_M,
    weight_MN,
    byte_NW,
    first,
    second,
    PLACE: tl.constexpr,
    STREAMS: tl.constexpr,
    KIND: tl.constexpr,
    DECODER: tl.constexpr,
    UNIT: tl.constexpr,
):
    if PLACE < STREAMS:
        pairs = value_pairs(byte_NW[0], byte_NW[1], first, second, PLACE, KIND, DECODER, UNIT, weight_MN.dtype)
        return dot(values_of(pairs), tl.trans(weight_MN), acc_MW * decay_M[None, :])
    else:
        return acc_MW


@triton.jit
def _store_stripe(
    acc_MW, sum_M, zeros_M, unit, out_ptrs, m_MW, PLACE: tl.constexpr, STREAMS: tl.constexpr
):
    if PLACE < STREAMS:
        tl.store(out_ptrs + PLACE, finish(tl.trans(acc_MW) - zeros_M[:, None], sum_M) * unit, mask=m_MW)


@triton.jit
def _token_head_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    k_zero_ptr,
    v_zero_ptr,
    out_ptr,
    max_ptr,
    sum_ptr,
    starts_ptr,
    length_ptr,
    table_ptr,
    scaling,
    softcap,
    code_stride_block,
    code_stride_token,
    code_stride_head,
    scale_stride_block,
    scale_stride_token,
    scale_stride_head,
    table_stride,
    T,
    H,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPPED: tl.constexpr,
    KIND: tl.constexpr,
    STREAMS: tl.constexpr,
    DECODER: tl.constexpr,
    UNIT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    DTYPE: tl.constexpr = tl.float32 if q_ptr.dtype.element_ty == tl.float32 else tl.float16
    K = H // GROUP
    sequence, kv = tl.program_id(1) // K, tl.program_id(1) % K
    length = tl.load(length_ptr + sequence)
    token_M, member_M, real_M, q_pos_M, first, last = query_rows(
        starts_ptr, sequence, tl.program_id(0) * (ROWS // GROUP), length, GROUP, ROWS
    )
    o_W = tl.arange(0, BLOCK_W)
    o_N = tl.arange(0, COLUMNS)
    k_W, v_W = key_bytes(o_W, BLOCK_W), value_bytes(o_W, BLOCK_W)
    m_MW = real_M[:, None] & (k_W < D // STREAMS)[None, :]
    row_M = token_M * H + kv * GROUP + member_M
    o_MW = (row_M * D)[:, None] + (k_W * STREAMS)[None, :]
    q0_MW = _load_query(q_ptr + o_MW, m_MW, 0, STREAMS)
    q1_MW = _load_query(q_ptr + o_MW, m_MW, 1, STREAMS)
    q2_MW = _load_query(q_ptr + o_MW, m_MW, 2, STREAMS)
    q3_MW = _load_query(q_ptr + o_MW, m_MW, 3, STREAMS)
    greatest = tl.maximum(
        tl.maximum(tl.max(tl.abs(widen(q0_MW))), tl.max(tl.abs(widen(q1_MW)))),
        tl.maximum(tl.max(tl.abs(widen(q2_MW))), tl.max(tl.abs(widen(q3_MW)))),
    )
    lift = power_below(greatest)
    lower = inverse_power(lift) * 256.0
    q0_MW = narrow(widen(q0_MW) * lower, DTYPE)
    q1_MW = narrow(widen(q1_MW) * lower, DTYPE)
    q2_MW = narrow(widen(q2_MW) * lower, DTYPE)
    q3_MW = narrow(widen(q3_MW) * lower, DTYPE)
    scaling *= lift * (UNIT / 256.0)
    # of the query as it is multiplied, so that a zero point cancels in full
    q_sum_M = tl.sum(widen(q0_MW) + widen(q1_MW) + widen(q2_MW) + widen(q3_MW), 1)

    slope = scaling / softcap if CAPPED else 0.0
    factor = (softcap if CAPPED else scaling) * 1.4426950408889634  # log2 e
    begin, _, _, end = key_bounds(first, last, length, CAUSAL, WINDOW, CHUNK, COLUMNS)
    begin, end = keys_of_part(begin, end, tl.program_id(2), PARTS, COLUMNS)
    oldest = oldest_key(first, WINDOW, CHUNK)
    acc0_MW = tl.zeros([BLOCK_W, ROWS], tl.float32)
    acc1_MW = tl.zeros([BLOCK_W, ROWS], tl.float32)
    acc2_MW = tl.zeros([BLOCK_W, ROWS], tl.float32)
    acc3_MW = tl.zeros([BLOCK_W, ROWS], tl.float32)
    zeros_M = tl.zeros([ROWS], tl.float32)
    unit = 0.0
    max_M = tl.full([ROWS], float("-inf"), tl.float32)
    sum_M = tl.zeros([ROWS], tl.float32)
    table_ptr += sequence * table_stride
    o_head = kv.to(tl.int64) * code_stride_head
    o_head = tl.multiple_of(o_head, ALIGN)
    k_ptr += o_head
    v_ptr += o_head
    first_word, second_word = FIRST + (length >> 31), SECOND + (length >> 31)
    for k_first in tl.range(begin, end, COLUMNS):
        k_pos_N = k_first + o_N
        m_N = k_pos_N < length
        if WINDOW or CHUNK:
            m_N = m_N & (k_pos_N >= oldest)
        scale_N = key_offset(table_ptr, k_pos_N, m_N, scale_stride_block, scale_stride_token, BLOCK)
        scale_N += kv.to(tl.int64) * scale_stride_head
        k_NW = load_keys(
            k_ptr, table_ptr, k_first, oldest, length, code_stride_block, code_stride_token,
            COLUMNS, BLOCK_W, D // STREAMS, BLOCK, WARPS, ALIGN,
        )
        v_NW = load_values(
            v_ptr, table_ptr, k_first, oldest, length, code_stride_block, code_stride_token,
            COLUMNS, BLOCK_W, D // STREAMS, BLOCK, ALIGN,
        )
        k_scale_N = tl.load(k_scale_ptr + scale_N, mask=m_N, other=0.0)
        v_scale_N = tl.load(v_scale_ptr + scale_N, mask=m_N, other=0.0)

        score_MN = tl.zeros([COLUMNS, ROWS], tl.float32)
        score_MN = _add_score(score_MN, q0_MW, k_NW, first_word, second_word, 0, STREAMS, KIND, DECODER, UNIT)
        score_MN = _add_score(score_MN, q1_MW, k_NW, first_word, second_word, 1, STREAMS, KIND, DECODER, UNIT)
        score_MN = _add_score(score_MN, q2_MW, k_NW, first_word, second_word, 2, STREAMS, KIND, DECODER, UNIT)
        score_MN = _add_score(score_MN, q3_MW, k_NW, first_word, second_word, 3, STREAMS, KIND, DECODER, UNIT)
        score_MN = tl.trans(score_MN)
        if ASYMMETRIC:
            k_zero_N = tl.load(k_zero_ptr + scale_N, mask=m_N, other=0).to(tl.float32)
            score_MN -= q_sum_M[:, None] * k_zero_N[None, :]
        score_MN *= k_scale_N[None, :]
        if CAPPED:
            score_MN = cap(score_MN, slope)
        seen_MN = visible(q_pos_M, k_pos_N, length, CAUSAL, WINDOW, CHUNK)
        score_MN = tl.where(seen_MN, score_MN, float("-inf"))
        weight_MN, decay_M, max_M, sum_M = fold(score_MN, max_M, sum_M, factor, 0, True)

        new_unit = tl.maximum(unit, power_below(tl.max(v_scale_N, 0)))
        inverse = inverse_power(new_unit)
        decay_M *= unit * inverse
        unit = new_unit
        weight_MN = narrow(weight_MN * (v_scale_N * inverse)[None, :], DTYPE)
        acc0_MW = _add_value(acc0_MW, decay_M, weight_MN, v_NW, first_word, second_word, 0, STREAMS, KIND, DECODER, UNIT)
        acc1_MW = _add_value(acc1_MW, decay_M, weight_MN, v_NW, first_word, second_word, 1, STREAMS, KIND, DECODER, UNIT)
        acc2_MW = _add_value(acc2_MW, decay_M, weight_MN, v_NW, first_word, second_word, 2, STREAMS, KIND, DECODER, UNIT)
        acc3_MW = _add_value(acc3_MW, decay_M, weight_MN, v_NW, first_word, second_word, 3, STREAMS, KIND, DECODER, UNIT)
        if ASYMMETRIC:
            v_zero_N = tl.load(v_zero_ptr + scale_N, mask=m_N, other=0).to(tl.float32)
            zeros_M = zeros_M * decay_M + tl.sum(widen(weight_MN) * v_zero_N[None, :], 1)

    if PARTS > 1:
        part = (tl.program_id(2) * T).to(tl.int64) * H
        row_M += part
        tl.store(max_ptr + row_M, max_M, mask=real_M)
        tl.store(sum_ptr + row_M, sum_M, mask=real_M)
    m_MW = real_M[:, None] & (v_W < D // STREAMS)[None, :]
    o_MW = (row_M * D)[:, None] + (v_W * STREAMS)[None, :]
    _store_stripe(acc0_MW, sum_M, zeros_M, unit * UNIT, out_ptr + o_MW, m_MW, 0, STREAMS)
    _store_stripe(acc1_MW, sum_M, zeros_M, unit * UNIT, out_ptr + o_MW, m_MW, 1, STREAMS)
    _store_stripe(acc2_MW, sum_M, zeros_M, unit * UNIT, out_ptr + o_MW, m_MW, 2, STREAMS)
    _store_stripe(acc3_MW, sum_M, zeros_M, unit * UNIT, out_ptr + o_MW, m_MW, 3, STREAMS)


def _tile(group: int, longest: int, D: int) -> dict[str, int]:
    """Launch arguments by the query heads that share a key/value head and the most queries of a
    sequence: the fastest on an H200. Codes that went through shared memory would take twice as long.
    """
    whole = triton.next_power_of_2(group)
    rows = max(8, whole)
    if longest > 1:
        rows = max(16, whole, min(64, triton.next_power_of_2(group * longest)))
    warps = 1 if longest == 1 and rows * D <= 2048 else 4 if rows <= 64 else 8
    columns = 64 if longest == 1 or D > 128 else 128
    return {"ROWS": rows, "COLUMNS": max(columns, 16 * warps), "num_warps": warps, "num_stages": 1}


def _check(query_THD: Tensor, key: TokenHeadCache, value: TokenHeadCache) -> None:
    _, H, D = query_THD.shape
    K = key.layout.sizes(key.code)[1]
    if H % K or key.head_dim != D:
        raise ValueError(f"{H} heads of {D} over a cache of {K} heads of {key.head_dim}")
    alike = ("fmt", "layout", "head_dim")
    if any(getattr(key, a) != getattr(value, a) for a in alike):
        raise ValueError("the caches of keys and values differ in format, layout or head size")
    if key.code.stride() != value.code.stride() or key.scale.stride() != value.scale.stride():
        raise ValueError("the caches of keys and values must be laid out alike")


def token_head_attention(
    query_THD: Tensor,
    key: TokenHeadCache,
    value: TokenHeadCache,
    sequences: Sequences,
    *,
    scaling: float,
    mask: Mask = Mask(),  # noqa: B008, frozen
    softcap: float | None = None,
) -> Tensor:
    """Attention of the queries [T, H, D] of all sequences over their cached keys: [T, H, D].

    The queries stand at the end of their sequence and are not rotated yet. What is read and written
    is as `paged_attention` says. Raises ValueError where
    heads, head sizes or caches do not fit each other.
    """
    _check(query_THD, key, value)
    T, H, D = query_THD.shape
    block, K = key.layout.sizes(key.code)
    sequences.check(key.code, K)
    group, streams, kind = H // K, key.fmt.per_byte, key.fmt.name.partition("_")[0]
    tile = _tile(group, sequences.longest, D)
    codes = [key.code, value.code]
    where = (*(code.data_ptr() for code in codes), *key.layout.strides(key.code), D // streams)
    align = math.gcd(64, *where) // 4
    if align:
        codes = [code.view(torch.int32) for code in codes]
    query = rotate(query_THD, key.rotation).contiguous()
    out = torch.empty(T, H, D, dtype=torch.float32, device=query.device)
    grid, partial = launch(sequences, query_THD, K, block, tile["ROWS"] // group, 16)
    _token_head_attention_kernel[grid](
        *(query, *codes, key.scale, value.scale, key.zero, value.zero),
        *(out if partial.out is None else partial.out, partial.max, partial.sum),
        *(sequences.query_starts, sequences.lengths, sequences.block_table),
        *(float(scaling), cap_height(softcap)),
        *key.layout.strides(codes[0]),
        *key.layout.strides(key.scale),
        *(sequences.block_table.stride(0), T, H),
        D=D,
        GROUP=group,
        BLOCK=block,
        **mask.constexprs(),
        CAPPED=softcap is not None,
        KIND=kind,
        STREAMS=streams,
        DECODER=DECODERS[kind],
        UNIT=UNITS[kind],
        FIRST=CONSTANTS[kind][0],
        SECOND=CONSTANTS[kind][1],
        ASYMMETRIC=key.fmt.asymmetric,
        PARTS=partial.parts,
        BLOCK_W=max(32, triton.next_power_of_2(D // streams)),
        **tile,
        WARPS=tile["num_warps"],
        ALIGN=max(align, 1),
    )
    partial.merge(out)
    return rotate(out, value.rotation, query_THD.dtype, inverse=True)
