"""Attention that also takes the per-head maxima of q, k and v: what calibration runs.

The Triton kernel takes them while it computes; for tensors on a CPU it is torch's SDPA and a pass
over q, k and v.

Shape letters: B batch, H query heads, K key/value heads, S positions, D head dimension of q and k,
E of v.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ckptq.kernels.attention import reference
from ckptq.kernels.attention.mask import Mask, cap_height
from ckptq.kernels.attention.maxima import Maxima
from ckptq.kernels.gpu import door


@door("ckptq.kernels.attention.dense_attention:attention")
def attention_with_maxima(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    mask: Mask = Mask(),  # noqa: B008, frozen
    softcap: float | None = None,
    spans: tuple[Tensor, Tensor] | None = None,
    maxima: Maxima | None = None,
) -> Tensor:
    """`dense_attention.attention`: of query [B, H, Sq, D] over key and value, [B, Sq, H, E].

    Folds the absolute maxima of q, k and v into `maxima`, which may hold those of earlier batches.
    Padding, outside `spans`, does not count in them.
    """
    queries, keys = query.shape[2], key.shape[2]
    if maxima is not None:
        maxima.check(query.shape[1], key.shape[1], query.device)
        if queries != keys:
            raise ValueError(f"maxima: {keys} keys under {queries} queries")
        reference.fold_maxima(maxima, query, key, value, spans)
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
