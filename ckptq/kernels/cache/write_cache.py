"""Write new keys and values into a paged cache, as they are or as E4M3 under static scales.

Meaning: `reference_cache.write`. Scales are per tensor or per head, as calibration stores them; a
slot of -1 (padding) is skipped. Keys and values go in one launch; a program takes all heads of
some tokens, as far as they fit, since they lie side by side in the input. One read, one write.

Shape letters: T tokens, K key/value heads, D head dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckptq.kernels.cache.paged_addresses import slot_offset
from ckptq.kernels.cache.paging import check_slots
from ckptq.kernels.quantize.slices import code, code_switches
from ckptq.kernels.rounding import widen


@triton.jit
def _encoded(x_TKD, scale_ptr, scale_stride, head_K, m_K, CODES: tl.constexpr):
    if scale_ptr is not None:
        scale_K = widen(tl.load(scale_ptr + head_K * scale_stride, mask=m_K, other=1.0))
        return code(widen(x_TKD), scale_K[None, :, None], CODES)
    else:
        return x_TKD


@triton.jit
def _write_cache_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    slot_ptr,
    x_strides,
    strides,
    scale_strides,
    T,
    K,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    CODES: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token_T = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head_K = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    o_D = tl.arange(0, BLOCK_D)
    slot_T = tl.load(slot_ptr + token_T, mask=token_T < T, other=-1).to(tl.int64)
    m_K = head_K < K
    m_KD = m_K[:, None] & (o_D < D)[None, :]
    m_TKD = (slot_T >= 0)[:, None, None] & m_KD[None, :, :]
    x_KD = head_K[:, None] * D + o_D[None, :]
    k_ptrs = k_ptr + token_T[:, None, None] * x_strides[0] + x_KD[None, :, :]
    v_ptrs = v_ptr + token_T[:, None, None] * x_strides[1] + x_KD[None, :, :]
    k_TKD = tl.load(k_ptrs, mask=m_TKD, other=0.0)
    v_TKD = tl.load(v_ptrs, mask=m_TKD, other=0.0)
    k_TKD = _encoded(k_TKD, k_scale_ptr, scale_strides[0], head_K, m_K, CODES)
    v_TKD = _encoded(v_TKD, v_scale_ptr, scale_strides[1], head_K, m_K, CODES)
    o_T = slot_offset(slot_T, strides, BLOCK)
    o_KD = head_K.to(tl.int64)[:, None] * strides[2] + o_D[None, :]
    o_TKD = o_T[:, None, None] + o_KD[None, :, :]
    tl.store(k_cache_ptr + o_TKD, k_TKD, mask=m_TKD)
    tl.store(v_cache_ptr + o_TKD, v_TKD, mask=m_TKD)


def _check(x_TKD: Tensor, cache: Tensor, scale: Tensor | None) -> Tensor:
    """The input with dense heads; raise ValueError where it, cache and scale do not fit."""
    K, D = x_TKD.shape[1:]
    if cache.ndim != 4 or tuple(cache.shape[2:]) != (K, D) or cache.stride(3) != 1:
        raise ValueError(f"cache {list(cache.shape)} does not hold {K} heads of {D}")
    fp8 = cache.dtype == torch.float8_e4m3fn
    if fp8 != (scale is not None) or not (fp8 or cache.dtype == x_TKD.dtype):
        raise ValueError(f"scales are for E4M3 caches: {x_TKD.dtype} into {cache.dtype}")
    if scale is not None and scale.numel() not in (1, K):
        raise ValueError(f"{scale.numel()} scales for {K} heads, want 1 or {K}")
    return x_TKD if x_TKD.stride()[1:] == (D, 1) else x_TKD.contiguous()


def write_cache(
    key_TKD: Tensor,
    value_TKD: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_T: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write tokens to their slots; a slot of -1 is skipped. Caches are [blocks, tokens, K, D].

    There may be fewer slots than tokens: the tokens after them pad a batch and are not written.
    E4M3 caches take k_scale and v_scale, 1 or K entries of any shape ([1], [K, 1, 1]): codes are
    the nearest to x / scale, saturating. Caches of the input's dtype take the values as they are.

    Raises ValueError for shapes, dtypes or scales that do not fit.
    """
    key_TKD = _check(key_TKD, key_cache, k_scale)
    value_TKD = _check(value_TKD, value_cache, v_scale)
    for key, value in ((key_TKD, value_TKD), (key_cache, value_cache)):
        if key.shape != value.shape or key.dtype != value.dtype:
            raise ValueError("keys and values, and their caches, must be shaped and typed alike")
    if value_cache.stride() != key_cache.stride():
        raise ValueError("the caches of keys and values must be laid out alike")
    check_slots(slot_T, len(key_TKD), key_cache)
    (_, K, D), T = key_TKD.shape, len(slot_T)
    k_scale, v_scale = (
        None if s is None else s.reshape(-1).contiguous() for s in (k_scale, v_scale)
    )
    codes = None
    if k_scale is not None and v_scale is not None:
        wide = torch.promote_types(k_scale.dtype, v_scale.dtype)
        codes = code_switches(key_TKD, wide, torch.float8_e4m3fn)
        key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
    block_d = triton.next_power_of_2(D)
    heads = min(triton.next_power_of_2(K), max(1, 1024 // block_d))
    tokens = max(1, 1024 // (heads * block_d))
    _write_cache_kernel[(triton.cdiv(T, tokens), triton.cdiv(K, heads))](
        *(key_TKD, value_TKD, key_cache, value_cache, k_scale, v_scale),
        *(slot_T.contiguous(), (key_TKD.stride(0), value_TKD.stride(0)), key_cache.stride()[:3]),
        tuple(int(s is not None and s.numel() > 1) for s in (k_scale, v_scale)),
        *(T, K),
        D=D,
        BLOCK=key_cache.shape[1],
        CODES=codes,
        TOKENS=tokens,
        HEADS=heads,
        BLOCK_D=block_d,
        num_warps=2,
        enable_fp_fusion=False,
    )
