"""The doors to paged caches: Triton for CUDA tensors (`gpu.on_gpu`), else their meaning in torch.

Writers give the same bytes on both sides, attention the same but for the order in which it sums.
Arguments are those of the functions of the same name in this folder, which have the documentation
and refuse what does not fit.
"""

import torch
from torch import Tensor

from ckptq.kernels.attention.mask import Mask
from ckptq.kernels.cache import reference
from ckptq.kernels.cache.paging import Layout, Sequences
from ckptq.kernels.gpu import on_gpu

Descale = Tensor | float


def write_cache(
    key_TKD: Tensor,
    value_TKD: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_T: Tensor,
    *,
    layout: Layout = Layout.NHD,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """New keys and values into a paged cache, as they are or as E4M3 under static scales."""
    if on_gpu(key_TKD):
        from ckptq.kernels.cache.write_cache import write_cache as fast

        fast(
            *(key_TKD, value_TKD, key_cache, value_cache, slot_T),
            layout=layout,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        return
    reference.write(key_TKD[: len(slot_T)], key_cache, slot_T, layout, k_scale)
    reference.write(value_TKD[: len(slot_T)], value_cache, slot_T, layout, v_scale)


def paged_attention(
    query_THD: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    sequences: Sequences,
    *,
    scaling: float,
    layout: Layout = Layout.NHD,
    mask: Mask = Mask(),  # noqa: B008, frozen
    softcap: float | None = None,
    descales: tuple[Descale, Descale, Descale] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Attention [T, H, D] over a paged cache in the query's dtype, or E4M3 with descales."""
    if on_gpu(query_THD):
        from ckptq.kernels.cache.paged_attention import paged_attention as fast

        return fast(
            *(query_THD, key_cache, value_cache, sequences),
            scaling=scaling,
            layout=layout,
            mask=mask,
            softcap=softcap,
            descales=descales,
            dtype=dtype,
        )
    q, k, v = descales or (1.0, 1.0, 1.0)
    held = [
        [
            _values(reference.gather(cache, n, sequences, layout), descale)
            for n in range(len(sequences.lengths))
        ]
        for cache, descale in ((key_cache, k), (value_cache, v))
    ]
    fp8_query = query_THD.dtype == torch.float8_e4m3fn
    out_THD = reference.attention(
        *(_values(query_THD, q), held[0], held[1], sequences),
        scaling=scaling,
        mask=mask,
        softcap=softcap,
        e4m3_weights=fp8_query,
    )
    return out_THD.to(dtype if fp8_query else query_THD.dtype)


def _values(code: Tensor, descale: Descale) -> Tensor:
    """float64 of [..., heads, D] under one descale or one a head."""
    descale = torch.as_tensor(descale, dtype=torch.float64, device=code.device)
    return code.double() * descale.reshape(-1, 1)
