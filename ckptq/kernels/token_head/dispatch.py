"""The doors to caches scaled by token and head: Triton for CUDA tensors, else plain torch.

Writers give the same bytes on both sides, attention the same but for the order in which it sums.
Arguments are documented by the functions of the same name in this folder, which refuse what does
not fit.
"""

from torch import Tensor

from ckptq.kernels.attention.mask import Mask
from ckptq.kernels.cache import reference as paged
from ckptq.kernels.cache.paging import Sequences
from ckptq.kernels.gpu import door
from ckptq.kernels.token_head import reference
from ckptq.kernels.token_head.token_head_cache import TokenHeadCache


@door("ckptq.kernels.token_head.write_token_head:write_token_head")
def write_token_head(x_TKD: Tensor, cache: TokenHeadCache, slot_T: Tensor) -> None:
    """Keys or values quantized by token and head into their slots."""
    packed = reference.quantize(x_TKD[: len(slot_T)], cache.fmt, cache.rotation)
    for made, held in (
        (packed.code, cache.code),
        (packed.scale, cache.scale),
        (packed.zero, cache.zero),
    ):
        if made is not None and held is not None:
            paged.write(made, held, slot_T)


@door("ckptq.kernels.token_head.token_head_attention:token_head_attention")
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
    keys, values = (
        [_sequence(cache, n, sequences) for n in range(len(sequences.lengths))]
        for cache in (key, value)
    )
    out_THD = paged.attention(
        query_THD, keys, values, sequences, scaling=scaling, mask=mask, softcap=softcap
    )
    return out_THD.to(query_THD.dtype)


def _sequence(cache: TokenHeadCache, n: int, sequences: Sequences) -> Tensor:
    """fp32 [S, K, D]: the keys or values of one sequence."""
    code, scale, zero = (
        None if part is None else paged.gather(part, n, sequences)
        for part in (cache.code, cache.scale, cache.zero)
    )
    assert code is not None
    assert scale is not None
    return reference.dequantize(reference.Packed(code, scale, zero), cache.fmt, cache.rotation)
