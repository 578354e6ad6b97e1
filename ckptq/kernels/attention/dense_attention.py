"""Flash attention that records maxima, on q, k, v as transformers hands them over.

Meaning: `reference_attention.attention`. One program takes a tile of queries of one head and walks
over the tiles of keys that any of them sees; only tiles at an edge of the mask pay for it.

- Maxima: each program also folds the absolute maxima of its own rows of q, k and v (the rows of k
  and v dealt out among the query heads that share them) into three buffers. The maximum is taken
  on the bits of |x| as integers, so it does not depend on order and a NaN is larger than all else.

Head sizes are padded to a power of two in registers, never in memory.

Shape letters: B batch, H query heads, K key/value heads, S positions, D head dimension of q and k,
E of v; M queries of a tile, N keys of a tile, R rows recorded by a program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.attention.attention_tile import Tile, default_tile
from ckptq.kernels.attention.mask import Mask, cap_height
from ckptq.kernels.attention.maxima import Maxima
from ckptq.kernels.attention.online_softmax import cap, dot, finish, fold, key_bounds, visible
from ckptq.kernels.gpu import MOST_HEADS
from ckptq.kernels.rounding import narrow, widen


@triton.jit
def _record(x_RD, maximum_ptr):
    bits_RD = widen(x_RD).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(maximum_ptr, tl.max(bits_RD), sem="relaxed")


@triton.jit
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    spans,
    maxima,
    scaling,
    softcap,
    q_strides,
    k_strides,
    v_strides,
    H,
    queries,
    keys,
    D: tl.constexpr,
    E: tl.constexpr,
    GROUP: tl.constexpr,
    MASK: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
):
    # under a causal mask the last queries see most keys: their programs start first
    q_first = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    b = (tl.program_id(1) // H).to(tl.int64)
    h = tl.program_id(1) % H
    kv = h // GROUP
    start, length = tl.full([], 0, tl.int32), keys
    if spans is not None:
        start, length = tl.load(spans[0] + b), tl.load(spans[1] + b)
    q_ptr += b * q_strides[0] + h.to(tl.int64) * q_strides[1]
    k_ptr += b * k_strides[0] + kv.to(tl.int64) * k_strides[1] + start.to(tl.int64) * k_strides[2]
    v_ptr += b * v_strides[0] + kv.to(tl.int64) * v_strides[1] + start.to(tl.int64) * v_strides[2]

    o_D = tl.arange(0, BLOCK_D)
    o_E = tl.arange(0, BLOCK_E)
    m_1D, m_1E = (o_D < D)[None, :], (o_E < E)[None, :]
    row_M = q_first + tl.arange(0, ROWS)
    shift = keys - queries - start  # from a query's row to its position
    q_pos_M = row_M + shift
    real_M = (row_M < queries) & (q_pos_M >= 0) & (q_pos_M < length)
    q_ptrs = q_ptr + row_M.to(tl.int64)[:, None] * q_strides[2] + o_D[None, :]
    q_MD = tl.load(q_ptrs, mask=real_M[:, None] & m_1D, other=0.0)
    if maxima is not None:
        # before the products: after them it takes three per cent more, as registers stay in use
        _record(q_MD, maxima[0] + h)
        row_R = q_first - start + h % GROUP * SLICE + tl.arange(0, SLICE)
        m_R1 = ((row_R >= 0) & (row_R < length) & (row_R < q_first - start + ROWS))[:, None]
        row_R1 = row_R.to(tl.int64)[:, None]
        o_RD = row_R1 * k_strides[2] + o_D[None, :]
        o_RE = row_R1 * v_strides[2] + o_E[None, :]
        _record(tl.load(k_ptr + o_RD, mask=m_R1 & m_1D, other=0.0), maxima[1] + kv)
        _record(tl.load(v_ptr + o_RE, mask=m_R1 & m_1E, other=0.0), maxima[2] + kv)

    # capped: tanh(score * slope) * softcap; slope is unused otherwise
    slope = scaling / softcap if CAPPED else 0.0
    factor = (softcap if CAPPED else scaling) * 1.4426950408889634  # log2 e
    q_pos_first = tl.maximum(q_first + shift, 0)
    q_pos_last = tl.minimum(tl.minimum(q_first + ROWS, queries) + shift, length) - 1
    edges = key_bounds(q_pos_first, q_pos_last, length, MASK, COLUMNS)
    o_N = tl.arange(0, COLUMNS)
    o_ND = o_N[:, None] * k_strides[2] + o_D[None, :]
    o_NE = o_N[:, None] * v_strides[2] + o_E[None, :]
    acc_ME = tl.zeros([ROWS, BLOCK_E], tl.float32)
    max_M = tl.full([ROWS], float("-inf"), tl.float32)
    sum_M = tl.zeros([ROWS], tl.float32)
    # only without a window or chunks does every query see the first keys
    for i in tl.static_range(0 if MASK[1] or MASK[2] else 1, 3):
        # the compiler has to see that tiles begin at multiples: products would wait for each other
        begin = tl.cdiv(edges[i], COLUMNS) * COLUMNS
        for k_first in tl.range(begin, edges[i + 1], COLUMNS):
            k_pos_N = k_first + o_N
            k_ptrs = k_ptr + tl.cast(k_first, tl.int64) * k_strides[2] + o_ND
            v_ptrs = v_ptr + tl.cast(k_first, tl.int64) * v_strides[2] + o_NE
            if i != 1:
                m_N1 = (k_pos_N < length)[:, None]
                k_ND = tl.load(k_ptrs, mask=m_N1 & m_1D, other=0.0)
                v_NE = tl.load(v_ptrs, mask=m_N1 & m_1E, other=0.0)
            else:
                k_ND = tl.load(k_ptrs) if D == BLOCK_D else tl.load(k_ptrs, m_1D, other=0.0)
                v_NE = tl.load(v_ptrs) if E == BLOCK_E else tl.load(v_ptrs, m_1E, other=0.0)
            score_MN = dot(q_MD, tl.trans(k_ND), tl.zeros([ROWS, COLUMNS], tl.float32))
            if CAPPED:
                score_MN = cap(score_MN, slope)
            if i != 1:
                seen_MN = visible(q_pos_M, k_pos_N, length, MASK)
                score_MN = tl.where(seen_MN, score_MN, float("-inf"))
            weight_MN, decay_M, max_M, sum_M = fold(score_MN, max_M, sum_M, factor, 0, i != 1)
            acc_ME = dot(narrow(weight_MN, v_NE.dtype), v_NE, acc_ME * decay_M[:, None])

    out_ME = finish(acc_ME, tl.where(real_M, sum_M, 0.0))
    out_row_M = (b * queries + row_M) * H + h
    out_ptrs = out_ptr + out_row_M[:, None] * E + o_E[None, :]
    m_ME = (row_M < queries)[:, None] & m_1E
    tl.store(out_ptrs, narrow(out_ME, out_ptr.dtype.element_ty), mask=m_ME)


def _within_reach(x_BHSD: Tensor) -> Tensor:
    """Heads dense, and tokens of a tile so near each other that 32 bits address them."""
    near = x_BHSD.stride(3) == 1 and x_BHSD.stride(2) < 1 << 23
    return x_BHSD if near else x_BHSD.contiguous()


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    B, H, _, D = query.shape
    K = key.shape[1]
    if key.shape[0] != B or H % K or key.shape[3] != D or key.shape[:3] != value.shape[:3]:
        shapes = [list(x.shape) for x in (query, key, value)]
        raise ValueError(f"q, k, v do not fit each other: {shapes}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"q, k, v differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}")
    if max(D, value.shape[3]) > 256:
        raise ValueError(f"head dimensions {D}, {value.shape[3]} are above 256")
    if B * H > MOST_HEADS:
        raise ValueError(f"{B} sequences of {H} heads are more than {MOST_HEADS} heads at a time")


def _check_spans(spans: tuple[Tensor, Tensor], batch: int, device: torch.device) -> None:
    for name, x in zip(("starts", "lengths"), spans, strict=True):
        if x.shape != (batch,) or x.dtype != torch.int32 or x.device != device or x.stride(0) != 1:
            found = f"{x.dtype} {list(x.shape)} on {x.device}"
            raise ValueError(f"{name} of spans: {found}, want dense int32 [{batch}] on {device}")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    mask: Mask = Mask(),  # noqa: B008, frozen
    softcap: float | None = None,
    spans: tuple[Tensor, Tensor] | None = None,
    maxima: Maxima | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Attention of query [B, H, Sq, D] over key [B, K, S, D] and value [B, K, S, E]: [B, Sq, H, E].

    Query head h reads key/value head h // (H // K). The last query stands at the last key. `spans`
    are the first real token and the number of real tokens of each sequence, int32 [B] each; rows of
    padding come out as zeros. `maxima` asks for as many queries as keys.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    _check(query, key, value)
    (B, H, queries, D), (_, K, keys, E) = query.shape, value.shape
    group = H // K
    if spans is not None:
        _check_spans(spans, B, query.device)
    query, key, value = (_within_reach(x) for x in (query, key, value))
    if maxima is not None:
        maxima.check(H, K, query.device)
        if queries != keys:
            raise ValueError(f"maxima of {keys} keys under {queries} queries: want as many")
    out = torch.empty(B, queries, H, E, dtype=query.dtype, device=query.device)
    tile = tile or default_tile(max(D, E), query.dtype, query.device)
    bits = None
    if maxima is not None:
        bits = tuple(x.view(torch.int32) for x in (maxima.q_H, maxima.k_K, maxima.v_K))
    _attention_kernel[(triton.cdiv(queries, tile.rows), B * H)](
        *(query, key, value, out, spans, bits, float(scaling), cap_height(softcap)),
        *(query.stride()[:3], key.stride()[:3], value.stride()[:3], H, queries, keys),
        D=D,
        E=E,
        GROUP=group,
        MASK=mask.constants(),
        CAPPED=softcap is not None,
        BLOCK_D=max(16, triton.next_power_of_2(D)),
        BLOCK_E=max(16, triton.next_power_of_2(E)),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        SLICE=triton.next_power_of_2(triton.cdiv(tile.rows, group)),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out
