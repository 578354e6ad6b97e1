"""The doors to paged caches: Triton for CUDA tensors, else their meaning in torch.

Writers give the same bytes on both sides, attention the same but for the order in which it sums.
Arguments are documented by the functions of the same name in this folder, which refuse what does
not fit.
"""

import torch
from torch import Tensor

from ckptq.kernels.attention.mask import Mask
from ckptq.kernels.cache import reference
from ckptq.kernels.cache.paging import Sequences
from ckptq.kernels.gpu import door


@door("ckptq.kernels.cache.write_cache:write_cache")
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
    """New keys and values into a paged cache, as they are or as E4M3 under static scales."""
    reference.write(key_TKD[: len(slot_T)], key_cache, slot_T, k_scale)
    reference.write(value_TKD[: len(slot_T)], value_cache, slot_T, v_scale)


@door("ckptq.kernels.cache.paged_attention:paged_attention")
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
    """Attention [T, H, D] over a paged cache in the query's dtype, or E4M3 with descales."""
    q, k, v = descales or [torch.ones(1, device=query_THD.device)] * 3
    numbers = range(len(sequences.lengths))
    keys = [_values(reference.gather(key_cache, n, sequences), k) for n in numbers]
    values = [_values(reference.gather(value_cache, n, sequences), v) for n in numbers]
    fp8_query = query_THD.dtype == torch.float8_e4m3fn
    out_THD = reference.attention(
        *(_values(query_THD, q), keys, values, sequences),
        scaling=scaling,
        mask=mask,
        softcap=softcap,
        e4m3_weights=fp8_query,
    )
    return out_THD.to(dtype if fp8_query else query_THD.dtype)


def _values(code: Tensor, descale: Tensor) -> Tensor:
    """float64 of [..., heads, D] under one descale or one a head."""
    return code.double() * descale.double().reshape(-1, 1)
