"""What a paged cache means: slot by slot when written, gathered and dense when attended to.

Shape letters: T tokens (queries), H query heads, K key/value heads, D head dimension, S keys of a
sequence.
"""

import reference_attention as dense
import torch
from reference_quantize import nearest_e4m3
from torch import Tensor

from ckptq.kernels.attention.mask import Mask, seen
from ckptq.kernels.cache.paging import Sequences


def write(x_TKD: Tensor, cache: Tensor, slot_T: Tensor, scale: Tensor | None = None) -> None:
    """Write token by token; a slot of -1 is skipped. With a scale (1 or K) as E4M3 of x / scale."""
    block = cache.shape[1]
    for x_KD, slot in zip(x_TKD, slot_T.tolist(), strict=True):
        if slot < 0:
            continue
        if scale is not None:
            x_KD = nearest_e4m3(x_KD.float() / scale.float().reshape(-1, 1))
        cache[slot // block, slot % block] = x_KD


def gather(cache: Tensor, sequence: int, sequences: Sequences) -> Tensor:
    """The entries of one sequence in order: [S, heads, ...]."""
    block, length = cache.shape[1], int(sequences.lengths[sequence])
    position = torch.arange(length, device=cache.device)
    page = sequences.block_table[sequence][position // block].long()
    return cache[page, position % block]


def attention(
    query_THD: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    sequences: Sequences,
    *,
    scaling: float,
    mask: Mask = Mask(),  # noqa: B008, frozen
    softcap: float | None = None,
    e4m3_weights: bool = False,
) -> Tensor:
    """[T, H, D] in float64, sequence by sequence; keys and values are lists of [S, K, D]."""
    bounds, outs = sequences.query_starts.tolist(), []
    for n, (k_SKD, v_SKD) in enumerate(zip(keys, values, strict=True)):
        q_HTD = query_THD[bounds[n] : bounds[n + 1]].transpose(0, 1)
        seen_1SS = seen(mask, q_HTD.shape[1], len(k_SKD), device=query_THD.device)
        k_KSD, v_KSD = k_SKD.transpose(0, 1), v_SKD.transpose(0, 1)
        outs.append(
            dense.attention(
                *(q_HTD[None], k_KSD[None], v_KSD[None], seen_1SS),
                scaling=scaling,
                softcap=softcap,
                e4m3_weights=e4m3_weights,
            )[0]
        )
    return torch.cat(outs)
