"""The doors to the kernels of KV caches: Triton for CUDA tensors, else their meaning in torch.

`dispatch.on_gpu` is the rule here too. Writers give the same bytes on both sides, attention the
same but for the order in which it sums. Arguments are those of the functions of the same name in
this package, which have the documentation and refuse what does not fit.
"""

import torch
from torch import Tensor

from ckptq.kernels.dispatch import on_gpu
from ckptq.kernels.mask import Mask
from ckptq.kernels.paging import Layout, Sequences
from ckptq.kernels.reference import kv
from ckptq.kernels.reference import paged as reference
from ckptq.kernels.token_head_cache import TokenHeadCache

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
        from ckptq.kernels.kv_cache import write_cache as fast

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
        from ckptq.kernels.paged_attention import paged_attention as fast

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
        [_values(reference.gather(cache, n, sequences, layout), descale) for n in _all(sequences)]
        for cache, descale in ((key_cache, k), (value_cache, v))
    ]
    out_THD = reference.attention(
        *(_values(query_THD, q), held[0], held[1], sequences),
        scaling=scaling,
        mask=mask,
        softcap=softcap,
    )
    return out_THD.to(dtype if query_THD.dtype == torch.float8_e4m3fn else query_THD.dtype)


def write_token_head(x_TKD: Tensor, cache: TokenHeadCache, slot_T: Tensor) -> None:
    """Keys or values quantized by token and head into their slots."""
    if on_gpu(x_TKD):
        from ckptq.kernels.kv_token_head import write_token_head as fast

        fast(x_TKD, cache, slot_T)
        return
    packed = kv.quantize(x_TKD[: len(slot_T)], cache.fmt, cache.rotation)
    for made, held in (
        (packed.code, cache.code),
        (packed.scale, cache.scale),
        (packed.zero, cache.zero),
    ):
        if made is not None and held is not None:
            reference.write(made, held, slot_T, cache.layout)


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
    """Attention [T, H, D] over caches that `write_token_head` filled."""
    if on_gpu(query_THD):
        from ckptq.kernels.token_head_attention import token_head_attention as fast

        return fast(
            *(query_THD, key, value, sequences), scaling=scaling, mask=mask, softcap=softcap
        )
    keys, values = (
        [_sequence(cache, n, sequences) for n in _all(sequences)] for cache in (key, value)
    )
    out_THD = reference.attention(
        query_THD, keys, values, sequences, scaling=scaling, mask=mask, softcap=softcap
    )
    return out_THD.to(query_THD.dtype)


def _all(sequences: Sequences) -> range:
    return range(len(sequences.lengths))


def _values(code: Tensor, descale: Descale) -> Tensor:
    """float64 of [..., heads, D] under one descale or one a head."""
    descale = torch.as_tensor(descale, dtype=torch.float64, device=code.device)
    return code.double() * descale.reshape(-1, 1)


def _sequence(cache: TokenHeadCache, n: int, sequences: Sequences) -> Tensor:
    """fp32 [S, K, D]: the keys or values of one sequence."""
    code, scale, zero = (
        None if part is None else reference.gather(part, n, sequences, cache.layout)
        for part in (cache.code, cache.scale, cache.zero)
    )
    assert code is not None
    assert scale is not None
    return kv.dequantize(kv.Packed(code, scale, zero), cache.fmt, cache.rotation)
