"""What attention means: a whole score matrix, a softmax, in float64.

Shape letters: B batch, H query heads, K key/value heads, S positions, D head dimension of q and k,
E of v.
"""

import torch
from reference_quantize import nearest_e4m3
from torch import Tensor

from ckptq.kernels.attention.maxima import Maxima


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen_B1SS: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    e4m3_weights: bool = False,
) -> Tensor:
    """[B, Sq, H, E] in float64. Queries that see nothing give zeros.

    With `e4m3_weights`, values are multiplied with weights rounded to E4M3, of which the largest is
    256, and their sum is of those before (FlashAttention 3 in FP8).
    """
    group = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (key, value))
    score = query.double() @ key.mT * scaling
    if softcap is not None:
        score = torch.tanh(score / softcap) * softcap
    score = score.masked_fill(~seen_B1SS, float("-inf"))
    weight = score.softmax(-1).nan_to_num(0.0)
    if e4m3_weights:
        lift = 256.0 / weight.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        weight = nearest_e4m3((weight * lift).float()).double() / lift
    return (weight @ value).transpose(1, 2)


def fold_maxima(
    maxima: Maxima,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fold the absolute maxima of the real tokens of q, k, v [B, heads, S, D] into `maxima`."""
    real_B1S1 = torch.ones(1, dtype=torch.bool, device=query.device)
    if spans is not None:
        start_B1, length_B1 = (x.view(-1, 1) for x in spans)
        position_S = torch.arange(query.shape[2], device=query.device)
        real_BS = (position_S >= start_B1) & (position_S < start_B1 + length_B1)
        real_B1S1 = real_BS[:, None, :, None]
    for x, buffer in ((query, maxima.q_H), (key, maxima.k_K), (value, maxima.v_K)):
        amax = torch.where(real_B1S1, x.float().abs(), 0.0).amax((0, 2, 3))
        buffer.copy_(torch.maximum(buffer, amax))  # unlike max of floats elsewhere, keeps NaN
