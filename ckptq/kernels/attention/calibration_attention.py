"""Attention that also takes the per-head maxima of q, k and v: what calibration runs.

Where `gpu.on_gpu` says so the Triton kernel takes them while it computes; else it is torch's
SDPA and a pass over q, k and v.

Shape letters: B batch, H query heads, K key/value heads, S positions, D head dimension of q and k,
E of v.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ckptq.kernels.attention import reference
from ckptq.kernels.attention.mask import Mask, cap_height
from ckptq.kernels.attention.maxima import Maxima
from ckptq.kernels.gpu import on_gpu


def attention_with_maxima(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    causal: bool = True,
    sliding_window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    spans: tuple[Tensor, Tensor] | None = None,
    maxima: Maxima | None = None,
) -> Tensor:
    """Attention of query [B, H, Sq, D] over key [B, K, S, D] and value [B, K, S, E]: [B, Sq, H, E].

    Folds the absolute maxima of q, k and v into `maxima`, which may hold those of earlier batches.
    `spans` are the first real token and the number of real tokens of each sequence, int32 [B] each
    (`mask.spans_of` makes them of a padding mask): padding is not attended to, does not count in
    the maxima, and comes out as zeros. `sliding_window` counts the token itself; `chunk` is the
    length of the runs of tokens that see only each other.

    Raises ValueError for shapes, dtypes or masks that do not fit.
    """
    mask = Mask(causal=causal, sliding_window=sliding_window, chunk=chunk)
    if on_gpu(query):
        from ckptq.kernels.attention.dense_attention import attention as fast

        return fast(
            *(query, key, value),
            scaling=scaling,
            mask=mask,
            softcap=softcap,
            spans=spans,
            maxima=maxima,
        )
    if maxima is not None:
        maxima.check(query.shape[1], key.shape[1], query.device)
        if query.shape[2] != key.shape[2]:
            raise ValueError(f"maxima: {key.shape[2]} keys under {query.shape[2]} queries")
        reference.fold_maxima(maxima, query, key, value, spans)
    return _by_torch(query, key, value, scaling, mask, softcap, spans)


def _by_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    mask: Mask,
    softcap: float | None,
    spans: tuple[Tensor, Tensor] | None,
) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    if mask == Mask() and spans is None and softcap is None and queries == keys:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        ).transpose(1, 2)
    seen_B1SS = reference.seen(mask, queries, keys, spans, query.device)
    if cap_height(softcap):
        return reference.attention(
            query, key, value, seen_B1SS, scaling=scaling, softcap=softcap, dtype=torch.float32
        ).to(query.dtype)
    out_BHSE = scaled_dot_product_attention(
        query, key, value, attn_mask=seen_B1SS, scale=scaling, enable_gqa=True
    )
    return torch.where(seen_B1SS.any(-1, keepdim=True), out_BHSE, 0.0).transpose(1, 2)
