"""Attention over a paged KV cache, in the model's dtype or E4M3 under static scales.

Meaning: `reference_cache.attention`. A program takes some queries of one sequence with all query
heads that share a key/value head, so that a decode step (one query) still fills a tile, and walks
over the keys that these queries see, found through the block table.

E4M3 keys and values are decoded to the query's dtype, which holds every E4M3 value; an E4M3 query
is decoded too. Their scales are folded into the softmax and the result. Under an E4M3 query the
softmax's weights are rounded to E4M3, lifted to 256 at most, as FlashAttention 3 does.

Shape letters: T queries of all sequences, H query heads, K key/value heads, D head dimension,
M rows of a tile (queries x heads of a group), N keys of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.attention.mask import Mask, cap_height
from ckptq.kernels.attention.online_softmax import cap, dot, finish, fold, visible
from ckptq.kernels.cache.key_parts import PROGRAMS, Partial, parts_of, store_part
from ckptq.kernels.cache.paged_addresses import key_offset, program_of
from ckptq.kernels.cache.paging import Sequences
from ckptq.kernels.gpu import shared_memory
from ckptq.kernels.rounding import e4m3_in, e4m3_round, has_native_e4m3, narrow

FP8 = torch.float8_e4m3fn


@triton.jit
def _decoded(x, dtype: tl.constexpr):
    if x.dtype == tl.uint8:
        return e4m3_in(x, dtype)
    else:
        return x


@triton.jit
def _paged_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_ptr,
    max_ptr,
    sum_ptr,
    q_descale_ptr,
    k_descale_ptr,
    v_descale_ptr,
    sequences,
    scaling,
    softcap,
    q_strides,
    strides,
    T,
    H,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    CAPPED: tl.constexpr,
    LIFT: tl.constexpr,
    NATIVE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    SCALED: tl.constexpr = k_descale_ptr is not None
    token_M, head_M, real_M, q_pos_M, kv, table_ptr, length, begin, end, oldest = program_of(
        sequences, H, MASK, GROUP, ROWS, COLUMNS, PARTS
    )
    o_D = tl.arange(0, BLOCK_D)
    o_N = tl.arange(0, COLUMNS)
    m_MD = real_M[:, None] & (o_D < D)[None, :]
    q_ptrs = q_ptr + (token_M * q_strides[0] + head_M * q_strides[1])[:, None] + o_D[None, :]
    q_MD = _decoded(tl.load(q_ptrs, mask=m_MD, other=0.0), DTYPE)

    if SCALED:
        descale_M = tl.load(q_descale_ptr + head_M, mask=real_M, other=1.0)
        descale_M *= tl.load(k_descale_ptr + kv)
    slope = scaling / softcap if CAPPED else 0.0
    factor = (softcap if CAPPED else scaling) * 1.4426950408889634  # log2 e
    acc_MD = tl.zeros([ROWS, BLOCK_D], tl.float32)
    max_M = tl.full([ROWS], float("-inf"), tl.float32)
    sum_M = tl.zeros([ROWS], tl.float32)
    for k_first in tl.range(begin, end, COLUMNS):
        k_pos_N = k_first + o_N
        seen_N = k_pos_N < length
        if MASK[1] or MASK[2]:
            seen_N = seen_N & (k_pos_N >= oldest)
        m_ND = seen_N[:, None] & (o_D < D)[None, :]
        o_row_N = key_offset(table_ptr, k_pos_N, seen_N, strides, BLOCK)
        o_ND = (o_row_N + kv.to(tl.int64) * strides[2])[:, None] + o_D[None, :]
        k_ND = _decoded(tl.load(k_ptr + o_ND, mask=m_ND, other=0.0), DTYPE)
        v_ND = _decoded(tl.load(v_ptr + o_ND, mask=m_ND, other=0.0), DTYPE)
        score_MN = dot(q_MD, tl.trans(k_ND), tl.zeros([ROWS, COLUMNS], tl.float32))
        if SCALED:
            score_MN *= descale_M[:, None]
        if CAPPED:
            score_MN = cap(score_MN, slope)
        seen_MN = visible(q_pos_M, k_pos_N, length, MASK)
        score_MN = tl.where(seen_MN, score_MN, float("-inf"))
        weight_MN, decay_M, max_M, sum_M = fold(score_MN, max_M, sum_M, factor, LIFT, True)
        if LIFT:
            weight_MN = e4m3_round(weight_MN, NATIVE)
        acc_MD = dot(narrow(weight_MN, DTYPE), v_ND, acc_MD * decay_M[:, None])

    out_MD = finish(acc_MD, sum_M)
    if SCALED:
        out_MD *= tl.load(v_descale_ptr + kv)
    row_M = token_M * H + head_M
    if PARTS > 1:
        row_M = store_part(row_M, max_M, sum_M, max_ptr, sum_ptr, real_M, T * H)
        out_ptr = partial_ptr
    out_ptrs = out_ptr + (row_M * D)[:, None] + o_D[None, :]
    tl.store(out_ptrs, narrow(out_MD, out_ptr.dtype.element_ty), mask=m_MD)


DECODE = {2: (64, 1, 2), 16: (64, 4, 3)}
"""Keys of a tile, warps and stages for one query of each sequence, by the bits of a cached value:
the fastest for 32 sequences of 8,192 keys on an H200."""
DECODE_OTHERS = (32, 1, 3)


def paged_tile(group: int, longest: int, bits: int, D: int, device: torch.device) -> dict[str, int]:
    """Launch arguments by the query heads that share a key/value head, the most queries of a
    sequence, and the bits of a cached value: rows, keys, warps, stages.

    A few queries with the heads of a group fill a tile, as many as there are; of a large group one,
    or its rows would leave the registers and, of 128 heads, shared memory.
    """
    whole = triton.next_power_of_2(group)
    if longest == 1:
        columns, warps, stages = DECODE.get(bits, DECODE_OTHERS)
        rows = max(16, whole)
    else:
        columns, warps, stages = 64, 4, 2
        rows = max(16, whole, min(64, triton.next_power_of_2(group * longest)))
    if rows > 16 or D > 128:  # more than a warp's registers hold
        warps = 4 if rows <= 64 else 8
    bytes_of_key = 2 * D * (2 if bits == 16 else 1)
    room = shared_memory(device) - 2 * D * rows
    while columns > 16 and columns * (stages * bytes_of_key + 4 * D) > room:
        columns //= 2
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": warps, "num_stages": stages}


def launch(
    sequences: Sequences,
    query_THD: Tensor,
    kv_heads: int,
    block: int,
    queries: int,
    programs: int = PROGRAMS,
) -> tuple[tuple[int, int, int], Partial]:
    """The grid for tiles of so many queries, and where parts of the keys leave their results."""
    T, H, D = query_THD.shape
    heads = len(sequences.lengths) * kv_heads
    most = sequences.block_table.shape[1] * block
    parts = 1
    if sequences.longest == 1 and heads:
        parts = parts_of(heads, most, query_THD.device, programs)
    grid = (triton.cdiv(sequences.longest, queries), heads, parts)
    return grid, Partial.of(T * H, D, parts, query_THD.device)


def _head_scales(descale: Tensor, heads: int, device: torch.device) -> Tensor:
    """fp32 [heads] of one scale per tensor ([1]) or one per head ([heads, ...])."""
    flat = descale.to(device, torch.float32).reshape(-1)
    if flat.numel() not in (1, heads):
        raise ValueError(f"{flat.numel()} descales for {heads} heads, want 1 or {heads}")
    return flat.expand(heads).contiguous()


def _check(query_THD: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    _, H, D = query_THD.shape
    shapes = f"{list(key_cache.shape)} and {list(value_cache.shape)}"
    if key_cache.shape != value_cache.shape or key_cache.dtype != value_cache.dtype:
        raise ValueError(f"caches {shapes}, {key_cache.dtype} and {value_cache.dtype}: no pair")
    if H % key_cache.shape[2] or key_cache.shape[3] != D:
        raise ValueError(f"caches {shapes} do not fit queries {list(query_THD.shape)}")
    if key_cache.stride() != value_cache.stride() or key_cache.stride(3) != 1:
        strides = f"{key_cache.stride()} and {value_cache.stride()}"
        raise ValueError(f"caches must be laid out alike, their heads dense: strides {strides}")


def paged_attention(
    query_THD: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    sequences: Sequences,
    *,
    scaling: float,
    mask: Mask = Mask(),  # noqa: B008, frozen
    softcap: float | None = None,
    descales: tuple[Tensor, Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Attention of the queries [T, H, D] of all sequences over their cached keys: [T, H, D].

    Caches are [blocks, tokens, K, D]; the queries stand at the end of their
    sequence. Only keys that a query sees are read, and only their blocks need an entry in the
    table. A query without keys gives zeros; what is beyond the last sequence's queries is not
    written. Caches in E4M3 need `descales` of q [1 or H], k and v [1 or K]; the query may be E4M3
    as well, and then comes out in `dtype`; a query that is not has a descale of 1.

    Raises ValueError for shapes, dtypes or descales that do not fit.
    """
    T, H, D = query_THD.shape
    block, K = key_cache.shape[1:3]
    fp8, fp8_query = key_cache.dtype == FP8, query_THD.dtype == FP8
    _check(query_THD, key_cache, value_cache)
    if fp8 != (descales is not None) or (fp8_query and not fp8):
        raise ValueError("descales are for E4M3 caches, and E4M3 queries for those")
    if not fp8 and query_THD.dtype != key_cache.dtype:
        raise ValueError(f"queries of {query_THD.dtype} over a cache of {key_cache.dtype}")
    sequences.check(key_cache, K)
    scales: list[Tensor | None] = [None, None, None]
    if descales is not None:
        heads = zip(descales, (H, K, K), strict=True)
        scales = [_head_scales(descale, n, query_THD.device) for descale, n in heads]
    dtype = dtype if fp8_query else query_THD.dtype
    out = torch.empty(T, H, D, dtype=dtype, device=query_THD.device)
    if query_THD.stride(2) != 1:
        query_THD = query_THD.contiguous()
    group, bits = H // K, 8 * key_cache.element_size()
    tile = paged_tile(group, sequences.longest, bits, D, query_THD.device)
    grid, partial = launch(sequences, query_THD, K, block, tile["ROWS"] // group)
    _paged_attention_kernel[grid](
        query_THD.view(torch.uint8) if fp8_query else query_THD,
        *(x.view(torch.uint8) if fp8 else x for x in (key_cache, value_cache)),
        *(out, partial.out, partial.max, partial.sum),
        *(*scales, sequences.arguments(), float(scaling), cap_height(softcap)),
        *(query_THD.stride()[:2], key_cache.stride()[:3], T, H),
        D=D,
        GROUP=group,
        BLOCK=block,
        MASK=mask.constants(),
        CAPPED=softcap is not None,
        LIFT=8 if fp8_query else 0,
        NATIVE=has_native_e4m3(query_THD.device),
        PARTS=partial.parts,
        BLOCK_D=max(16, triton.next_power_of_2(D)),
        **tile,
    )
    partial.merge(out)
    return out
