"""Attention over a paged cache of INT8, FP8, INT4 or INT2 codes with a scale per token and head.

Meaning: `reference_cache.attention` over `reference.dequantize`. The query is rotated as the
keys were, and the result is rotated back as the values need; in between nothing is unpacked to
memory:

- A byte holds 1, 2 or 4 neighbouring dimensions, so the query is read as as many interleaved
  streams (the dimensions 4j, 4j + 1, ... for INT2): each is multiplied with the codes at its place
  in the bytes, and the products are summed. The result leaves as interleaved stripes.
- Codes are multiplied as they are. With a zero point z, q . (code - z) is q . code - z * sum(q), so
  scores lose z times the query's sum, and the result loses the sum of weight * scale * z over keys.
- The scale of a key multiplies its scores, that of a value its weight. Queries of 16 bits are
  multiplied in fp16, which holds every code: they and the scales of values are first divided by
  powers of two, so that neither overflows, nor a small one is lost.
- For a few query rows codes are the first operand of both products, keys times queries, values
  times weights (CODES_FIRST): that one may come from registers (`code_operands`), and eight columns
  hold a group of query heads. Many rows are the first operand themselves: a warp has some of them
  with all keys, and takes maxima and sums alone; codes go through shared memory, decoded.

Shape letters: T queries of all sequences, H query heads, K key/value heads, D head dimension,
W bytes of a head; M rows of a tile (queries x heads of a group), N keys of a tile.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.attention.mask import Mask, cap_height
from ckptq.kernels.attention.online_softmax import cap, dot, finish, fold, visible
from ckptq.kernels.cache.key_parts import store_part
from ckptq.kernels.cache.paged_addresses import key_offset, program_of
from ckptq.kernels.cache.paged_attention import launch
from ckptq.kernels.cache.paging import Sequences
from ckptq.kernels.code_operands import key_bytes, keys_of, load_codes, value_bytes, values_of
from ckptq.kernels.rounding import narrow, widen
from ckptq.kernels.token_head.hadamard import rotate
from ckptq.kernels.token_head.kv_codes import DECODERS, value_pairs
from ckptq.kernels.token_head.token_head_cache import TokenHeadCache


@triton.jit
def _power_below(x):
    """A positive fp32 without its mantissa, at least 2^-100."""
    bits = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 27 << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _inverse(power):
    """1 / x of a power of two."""
    return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _query(q_ptrs, m_MW, dtype: tl.constexpr, STREAMS: tl.constexpr):
    """Its streams [M, W], and what they were divided by: a power of two, so that fp16 holds them.

    Then their sum: of the query as it is multiplied, so that a zero point cancels in full.
    """
    wide, greatest = (), 0.0
    for place in tl.static_range(STREAMS):
        q_MW = widen(tl.load(q_ptrs + place, mask=m_MW, other=0.0))
        wide, greatest = wide + (q_MW,), tl.maximum(greatest, tl.max(tl.abs(q_MW)))  # type: ignore[assignment]  # noqa: RUF005
    lift = _power_below(greatest) * 0.00390625
    streams, sum_M = (), tl.zeros([m_MW.shape[0]], tl.float32)
    for place in tl.static_range(STREAMS):
        q_MW = narrow(wide[place] * _inverse(lift), dtype)
        streams, sum_M = streams + (q_MW,), sum_M + tl.sum(widen(q_MW), 1)  # type: ignore[assignment]  # noqa: RUF005
    return streams, lift, sum_M


@triton.jit
def _turned(x, TURN: tl.constexpr):
    return tl.trans(x) if TURN else x


@triton.jit
def _product(code_XY, row_MY, acc_MX, CODES_FIRST: tl.constexpr):
    """acc + rows @ codes.T; with CODES_FIRST acc and the result are [X, M]."""
    if CODES_FIRST:
        return dot(code_XY, tl.trans(row_MY), acc_MX)
    else:
        return dot(row_MY, tl.trans(code_XY), acc_MX)


@triton.jit
def _add_values(
    acc,
    decay_M,
    weight_MN,
    words,
    magic,
    STREAMS: tl.constexpr,
    DECODER: tl.constexpr,
    CODES_FIRST: tl.constexpr,
):
    """The streams of the result, one key tile further."""
    decay_M1 = _turned(decay_M[:, None], CODES_FIRST)
    added = ()
    for place in tl.static_range(STREAMS):
        v_WN = values_of(value_pairs(words, magic, place, DECODER, weight_MN.dtype))
        new_MW = _product(v_WN, weight_MN, acc[place] * decay_M1, CODES_FIRST)
        added = added + (new_MW,)  # type: ignore[assignment]  # noqa: RUF005
    return added


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
    sequences,
    scaling,
    softcap,
    code_strides,
    scale_strides,
    T,
    H,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    CAPPED: tl.constexpr,
    STREAMS: tl.constexpr,
    DECODER: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    ALIGN: tl.constexpr,
    CODES_FIRST: tl.constexpr,
):
    UNIT: tl.constexpr = DECODER[1]
    DTYPE: tl.constexpr = tl.float32 if q_ptr.dtype.element_ty == tl.float32 else tl.float16
    token_M, head_M, real_M, q_pos_M, kv, table_ptr, length, begin, end, oldest = program_of(
        sequences, H, MASK, GROUP, ROWS, COLUMNS, PARTS
    )
    o_W = tl.arange(0, BLOCK_W)
    o_N = tl.arange(0, COLUMNS)
    k_W, v_W = key_bytes(o_W, BLOCK_W), value_bytes(o_W, BLOCK_W)
    m_MW = real_M[:, None] & (k_W < D // STREAMS)[None, :]
    row_M = token_M * H + head_M
    o_MW = (row_M * D)[:, None] + (k_W * STREAMS)[None, :]
    q, lift, q_sum_M = _query(q_ptr + o_MW, m_MW, DTYPE, STREAMS)
    scaling *= lift * UNIT
    slope = scaling / softcap if CAPPED else 0.0
    factor = (softcap if CAPPED else scaling) * 1.4426950408889634  # log2 e
    acc = ()
    for _ in tl.static_range(STREAMS):
        zero_MW = _turned(tl.zeros([ROWS, BLOCK_W], tl.float32), CODES_FIRST)
        acc = acc + (zero_MW,)  # type: ignore[assignment]  # noqa: RUF005
    zeros_M = tl.zeros([ROWS], tl.float32)
    unit = 0.0
    max_M = tl.full([ROWS], float("-inf"), tl.float32)
    sum_M = tl.zeros([ROWS], tl.float32)
    o_head = tl.multiple_of(kv.to(tl.int64) * code_strides[2], ALIGN)
    # constants that the compiler cannot know: it would move those it knows into registers each time
    nothing = length >> 31
    magic = (DECODER[2] + nothing, DECODER[3] + nothing)
    where = (table_ptr, oldest, length, code_strides)
    for k_first in tl.range(begin, end, COLUMNS):
        k_pos_N = k_first + o_N
        m_N = k_pos_N < length
        if MASK[1] or MASK[2]:
            m_N = m_N & (k_pos_N >= oldest)
        scale_N = key_offset(table_ptr, k_pos_N, m_N, scale_strides, BLOCK)
        scale_N += kv.to(tl.int64) * scale_strides[2]
        k_words = load_codes(
            k_ptr + o_head,
            where,
            k_first,
            True,
            COLUMNS,
            BLOCK_W,
            D // STREAMS,
            BLOCK,
            ALIGN,
            WARPS,
        )
        v_words = load_codes(
            v_ptr + o_head,
            where,
            k_first,
            False,
            COLUMNS,
            BLOCK_W,
            D // STREAMS,
            BLOCK,
            ALIGN,
            WARPS,
        )
        k_scale_N = tl.load(k_scale_ptr + scale_N, mask=m_N, other=0.0)
        v_scale_N = tl.load(v_scale_ptr + scale_N, mask=m_N, other=0.0)

        score_MN = _turned(tl.zeros([ROWS, COLUMNS], tl.float32), CODES_FIRST)
        for place in tl.static_range(STREAMS):
            k_NW = keys_of(value_pairs(k_words, magic, place, DECODER, DTYPE))
            score_MN = _product(k_NW, q[place], score_MN, CODES_FIRST)
        score_MN = _turned(score_MN, CODES_FIRST)
        if ASYMMETRIC:
            k_zero_N = tl.load(k_zero_ptr + scale_N, mask=m_N, other=0).to(tl.float32)
            score_MN -= q_sum_M[:, None] * k_zero_N[None, :]
        score_MN *= k_scale_N[None, :]
        if CAPPED:
            score_MN = cap(score_MN, slope)
        seen_MN = visible(q_pos_M, k_pos_N, length, MASK)
        score_MN = tl.where(seen_MN, score_MN, float("-inf"))
        weight_MN, decay_M, max_M, sum_M = fold(score_MN, max_M, sum_M, factor, 0, True)

        new_unit = tl.maximum(unit, _power_below(tl.max(v_scale_N, 0)))
        inverse = _inverse(new_unit)
        decay_M *= unit * inverse
        unit = new_unit
        weight_MN = narrow(weight_MN * (v_scale_N * inverse)[None, :], DTYPE)
        acc = _add_values(acc, decay_M, weight_MN, v_words, magic, STREAMS, DECODER, CODES_FIRST)
        if ASYMMETRIC:
            v_zero_N = tl.load(v_zero_ptr + scale_N, mask=m_N, other=0).to(tl.float32)
            zeros_M = zeros_M * decay_M + tl.sum(widen(weight_MN) * v_zero_N[None, :], 1)

    if PARTS > 1:
        row_M = store_part(row_M, max_M, sum_M, max_ptr, sum_ptr, real_M, T * H)
    m_MW = real_M[:, None] & (v_W < D // STREAMS)[None, :]
    o_MW = (row_M * D)[:, None] + (v_W * STREAMS)[None, :]
    for place in tl.static_range(STREAMS):
        out_MW = finish(_turned(acc[place], CODES_FIRST) - zeros_M[:, None], sum_M) * (unit * UNIT)
        tl.store(out_ptr + o_MW + place, out_MW, mask=m_MW)


def _tile(group: int, longest: int, D: int) -> dict[str, int]:
    """Launch arguments by the query heads that share a key/value head and the most queries of a
    sequence: the fastest on an H200. Two stages take codes through shared memory, half as fast.
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
    K = key.code.shape[2]
    if H % K or key.head_dim != D:
        raise ValueError(f"{H} heads of {D} over a cache of {K} heads of {key.head_dim}")
    if (key.fmt, key.head_dim) != (value.fmt, value.head_dim):
        raise ValueError("the caches of keys and values differ in format or head size")
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
    block, K = key.code.shape[1:3]
    sequences.check(key.code, K)
    group, streams, kind = H // K, key.fmt.per_byte, key.fmt.name.partition("_")[0]
    tile = _tile(group, sequences.longest, D)
    codes = [key.code, value.code]
    where = (*(code.data_ptr() for code in codes), *key.code.stride()[:3], D // streams)
    align = math.gcd(64, *where) // 4
    if align:
        codes = [code.view(torch.int32) for code in codes]
    query = rotate(query_THD, key.rotation).contiguous()
    out = torch.empty(T, H, D, dtype=torch.float32, device=query.device)
    grid, partial = launch(sequences, query_THD, K, block, tile["ROWS"] // group, 16)
    _token_head_attention_kernel[grid](
        *(query, *codes, key.scale, value.scale, key.zero, value.zero),
        *(out if partial.out is None else partial.out, partial.max, partial.sum),
        *(sequences.arguments(), float(scaling), cap_height(softcap)),
        *(codes[0].stride()[:3], key.scale.stride(), T, H),
        D=D,
        GROUP=group,
        BLOCK=block,
        MASK=mask.constants(),
        CAPPED=softcap is not None,
        STREAMS=streams,
        DECODER=DECODERS[kind],
        ASYMMETRIC=key.fmt.asymmetric,
        PARTS=partial.parts,
        BLOCK_W=max(32, triton.next_power_of_2(D // streams)),
        **tile,
        WARPS=tile["num_warps"],
        ALIGN=max(align, 1),
        CODES_FIRST=tile["ROWS"] < 64,
    )
    partial.merge(out)
    return rotate(out, value.rotation, query_THD.dtype, inverse=True)
