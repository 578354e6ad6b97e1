"""Give a trained model heads of very different size without changing what it computes.

What is multiplied into one projection is divided out of its partner: rows of v_proj against
columns of o_proj, rows of k_proj against rows of q_proj (RoPE commutes with a factor per head).
All factors are powers of two, so not even the rounding of bf16 changes. Real models have such
heads, though not by so much; here they make a wrong attention scale show in the accuracy.

Shape letters: K KV heads, G query heads per KV head, D head dimension, R rows, C columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from attention_fp8 import head_sizes

K_LOG2_TARGETS = ((12, -8), (-10, 8), (11, -9), (-9, 9))
V_LOG2_TARGETS = ((12, -1), (-11, 2), (13, 0), (-10, 3))
"""log2 of the largest magnitude that layer i's (even, odd) KV heads get; row i % 4 is used.

E4M3 spans 2^8.8 down to 2^-9, so with a scale of 1.0 the large heads saturate and the small ones
vanish. K's spread of 2^18 and more is too much for one scale per tensor as well. V's stays at
2^13, because o_proj's columns carry the inverse: beyond that, FP8 weights and FP8 activations per
token could not hold the heads of o_proj's input together either.
"""


class Attention(Protocol):
    """What the attention modules of all families have in common."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    head_dim: int
    num_key_value_groups: int


def attention_layers(model: PreTrainedModel) -> list[Attention]:
    """The text decoder's attention modules, in order."""
    decoder = model.get_decoder()
    # Llama 4's multimodal class names its text decoder with the head on top
    decoder = getattr(decoder, "model", decoder)
    return [layer.self_attn for layer in decoder.layers]


def keys_are_normed(attention: Attention) -> bool:
    """Whether a norm after k_proj would undo what is multiplied into it."""
    return hasattr(attention, "k_norm") or hasattr(attention, "qk_norm")


@torch.no_grad()
def scale_value_heads(attention: Attention, factor_K: Tensor) -> None:
    """Multiply V's heads, divide the columns of o_proj that read them."""
    scale_rows(attention.v_proj, factor_K, attention.head_dim)
    factor_C = factor_K.repeat_interleave(attention.num_key_value_groups * attention.head_dim)
    attention.o_proj.weight.div_(factor_C)


@torch.no_grad()
def scale_key_heads(attention: Attention, factor_K: Tensor) -> None:
    """Multiply K's heads, divide the q heads that are compared with them."""
    scale_rows(attention.k_proj, factor_K, attention.head_dim)
    factor_KG = factor_K.repeat_interleave(attention.num_key_value_groups)
    scale_rows(attention.q_proj, 1 / factor_KG, attention.head_dim)


@torch.no_grad()
def scale_rows(projection: nn.Linear, factor_H: Tensor, head_dim: int) -> None:
    """Multiply each head's rows of a projection, and its bias if it has one."""
    factor_R = factor_H.repeat_interleave(head_dim)
    projection.weight.mul_(factor_R[:, None])
    if projection.bias is not None:
        projection.bias.mul_(factor_R)


def power_of_two_towards(size_K: Tensor, log2_targets: tuple[int, int]) -> Tensor:
    """Factors that bring each head's size within sqrt(2) of its target, even and odd heads apart.

    Example: sizes (3.0, 5.0) and targets (12, -8) give (2^10, 2^-10).
    """
    log2_target_K = torch.tensor([log2_targets[i % 2] for i in range(len(size_K))])
    return torch.exp2((log2_target_K - size_K.log2()).round())


def spread_heads(model: PreTrainedModel, ids_BT: Tensor) -> None:
    """Scale the heads of V, and of K where no norm undoes it, to the targets above."""
    sizes = head_sizes(model, ids_BT)
    for i, attention in enumerate(attention_layers(model)):
        value_targets = V_LOG2_TARGETS[i % len(V_LOG2_TARGETS)]
        scale_value_heads(attention, power_of_two_towards(sizes[i].v, value_targets))
        if not keys_are_normed(attention):
            key_targets = K_LOG2_TARGETS[i % len(K_LOG2_TARGETS)]
            scale_key_heads(attention, power_of_two_towards(sizes[i].k, key_targets))
