"""Give a trained model heads of very different size without changing what it computes.

What is multiplied into one weight is divided out of its partner: rows of v_proj against columns
of o_proj, rows of k_proj against rows of q_proj (RoPE commutes with a factor per head). All
factors are powers of two, so not even the rounding of bf16 changes. Real models have such heads,
though not by so much; here they make a wrong attention scale show in the accuracy.

Where q and k are normed, factors in their projections are undone. Llama 4's norm has no weights,
so there K stays alike in the layers that have it. Qwen 3's has one weight per dimension, shared by
all heads: k_norm against q_norm spreads its heads, once training has given each head dimensions of
its own (`separate_key_heads`).

Shape letters: H heads (of q or of k/v), K KV heads, D head dimension, R rows, C columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from attention_fp8 import attention_hook, head_sizes
from training import answer_loss

K_LOG2_TARGETS = ((-8, 12), (-10, 8), (-9, 11), (-9, 9))
V_LOG2_TARGETS = ((-1, 12), (-11, 2), (0, 13), (-10, 3))
"""log2 of the largest magnitude in layer i (row i % 4): the most needed head's, the others'.

E4M3 spans 2^8.8 down to 2^-9, so with a scale of 1.0 the large heads saturate and the small ones
vanish. K's spread of 2^18 and more is too much for one scale per tensor as well. V's stays at
2^13, because o_proj's columns carry the inverse: beyond that, FP8 weights and FP8 activations per
token could not hold the heads of o_proj's input together either.
"""

UNUSED_ROW = 2.0**-30
"""Far below the last bit of the rows that are used, even after the factors above."""


class WeightedNorm(Protocol):
    """An RMS norm over a head's dimensions."""

    weight: nn.Parameter


class Attention(Protocol):
    """The attributes of an attention module that matter here; only some families have norms."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    k_norm: WeightedNorm
    q_norm: WeightedNorm
    head_dim: int
    num_key_value_groups: int


def attention_layers(model: PreTrainedModel) -> list[Attention]:
    """The text decoder's attention modules, in order."""
    decoder = model.get_decoder()
    # Llama 4's multimodal class names its text decoder with the head on top
    decoder = getattr(decoder, "model", decoder)
    return [layer.self_attn for layer in decoder.layers]


def has_weighted_norm(attention: Attention) -> bool:
    """Whether k passes a norm with weights before it is cached, as in Qwen 3."""
    return hasattr(attention, "k_norm")


def has_plain_norm(attention: Attention) -> bool:
    """Whether k passes a norm without weights, as in Llama 4's layers with RoPE."""
    return hasattr(attention, "qk_norm")


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
def scale_key_dimensions(attention: Attention, factor_K: Tensor) -> None:
    """Multiply the dimensions that each KV head owns in k_norm, divide them in q_norm."""
    owner_D = owner_of_dimension(len(factor_K), attention.head_dim)
    attention.k_norm.weight.mul_(factor_K[owner_D])
    attention.q_norm.weight.div_(factor_K[owner_D])


def owner_of_dimension(num_kv_heads: int, head_dim: int) -> Tensor:
    """Which KV head owns each dimension; d and d + D/2 rotate together and have one owner.

    Example: two heads of 8 dimensions give [0, 1, 0, 1, 0, 1, 0, 1].
    """
    return (torch.arange(head_dim // 2) % num_kv_heads).repeat(2)


@torch.no_grad()
def separate_key_heads(model: PreTrainedModel) -> None:
    """Before training: let each KV head, and the q heads that read it, use its own dimensions.

    The rows of the others' dimensions become too small to matter and get no gradient. They are
    not zero, so that no channel of the checkpoint is.
    """
    for attention in attention_layers(model):
        if not has_weighted_norm(attention):
            continue
        num_kv_heads = attention.k_proj.out_features // attention.head_dim
        owner_D = owner_of_dimension(num_kv_heads, attention.head_dim)
        owned_KD = owner_D == torch.arange(num_kv_heads)[:, None]
        owned_HD = owned_KD.repeat_interleave(attention.num_key_value_groups, dim=0)
        restrict_rows(attention.k_proj, owned_KD.flatten())
        restrict_rows(attention.q_proj, owned_HD.flatten())


def restrict_rows(projection: nn.Linear, used_R: Tensor) -> None:
    """Train only the used rows; leave the others `UNUSED_ROW` times what they were."""
    projection.weight.mul_(torch.where(used_R, 1.0, UNUSED_ROW)[:, None])
    projection.weight.register_hook(lambda gradient_RC: gradient_RC * used_R[:, None])


@torch.no_grad()
def scale_rows(projection: nn.Linear, factor_H: Tensor, head_dim: int) -> None:
    """Multiply each head's rows of a projection, and its bias if it has one."""
    factor_R = factor_H.repeat_interleave(head_dim)
    projection.weight.mul_(factor_R[:, None])
    if projection.bias is not None:
        projection.bias.mul_(factor_R)


@torch.no_grad()
def most_needed_head(model: PreTrainedModel, layer: int, num_kv_heads: int, ids_BT: Tensor) -> int:
    """The KV head without whose keys, all of them zero, the answers get least likely."""

    def loss_without(head: int) -> float:
        def zero_keys(at: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if at == layer:
                k = k.clone()
                k[:, head] = 0
            return q, k, v

        with attention_hook(model, zero_keys):
            return answer_loss(model(input_ids=ids_BT, use_cache=False).logits, ids_BT).item()

    return max(range(num_kv_heads), key=loss_without)


def power_of_two_towards(size_K: Tensor, small_head: int, log2_targets: tuple[int, int]) -> Tensor:
    """Factors that bring each head's size within sqrt(2) of its target.

    Example: sizes (3.0, 5.0), small head 1 and targets (-8, 12) give (2^10, 2^-10).
    """
    small, large = log2_targets
    log2_target_K = torch.full_like(size_K, large)
    log2_target_K[small_head] = small
    return torch.exp2((log2_target_K - size_K.log2()).round())


def spread_heads(model: PreTrainedModel, ids_BT: Tensor) -> None:
    """Scale the heads of V, and of K where no norm undoes it, to the targets above.

    The head that matters most becomes the small one, the first that a shared scale loses.
    """
    sizes = head_sizes(model, ids_BT)
    for i, attention in enumerate(attention_layers(model)):
        small_head = most_needed_head(model, i, len(sizes[i].k), ids_BT)
        value_targets = V_LOG2_TARGETS[i % len(V_LOG2_TARGETS)]
        scale_value_heads(attention, power_of_two_towards(sizes[i].v, small_head, value_targets))
        key_targets = K_LOG2_TARGETS[i % len(K_LOG2_TARGETS)]
        key_factor_K = power_of_two_towards(sizes[i].k, small_head, key_targets)
        if has_weighted_norm(attention):
            scale_key_dimensions(attention, key_factor_K)
        elif not has_plain_norm(attention):
            scale_key_heads(attention, key_factor_K)
