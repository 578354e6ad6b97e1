"""Models whose q/k rows an engine permutes while it loads: formats that it cannot move along.

vLLM permutes the rows of Llama-4's q_proj and k_proj, of their packed weights and of their scales
per channel and group. It cannot move block scales, and does not move packed zero points: block FP8
and asymmetric INT4 would load, and be wrong (head_dim 256), or be refused. So q, k and v of such a
group get a group of their own: symmetric, and per channel instead of per block. v goes along,
because the three are one matrix in vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckptq.models.modules import Layout
from ckptq.recipes.args import Args
from ckptq.recipes.names import read_names
from ckptq.recipes.scheme import Group, Recipe

QKV = r"re:.*self_attn\.(q|k|v|qkv)_proj$"
"""With the name of vLLM's merged Linear: up to 0.25 vLLM looks for the class of a merged Linear
before the names of its parts, and would find the group of all Linears."""

TOKEN_FP8 = Args(type="float", strategy="token", dynamic=True)


def keep_permutable(recipe: Recipe, layout: Layout, chosen: Mapping[str, Group]) -> Recipe:
    """The recipe with q/k/v in a format that survives the permutation; others unchanged.

    `chosen` says what the recipe as it stands quantizes: Linear -> group.
    """
    if layout.family.rope != "interleaved":
        return recipe
    groups: list[Group] = []
    qkv = read_names([QKV])
    for group in recipe.groups:
        linears = [name for name, g in chosen.items() if g is group]
        attention = list(filter(qkv.match, linears))
        safe = _permutable(group)
        if attention and safe is not group:
            # Before the group it leaves: engines take the first pattern that matches
            groups.append(replace(safe, name=_name(group), targets=(QKV,)))
        if attention != linears or safe is group:
            groups.append(group)
    return replace(recipe, groups=tuple(groups))


def permutable(group: Group, name: str) -> Group:
    """A group of a recipe as the plan has it in the group of this name: its own, or q/k/v's."""
    return _permutable(group) if name == _name(group) else group


def _name(group: Group) -> str:
    return f"{group.name}_qkv"


def _permutable(group: Group) -> Group:
    """The same group, or its nearest relative that engines can permute."""
    weights = group.weights
    if weights is None:
        return group
    if weights.strategy == "block":
        weights = replace(weights, strategy="channel", block_structure=None)
        return replace(group, weights=weights, input_activations=TOKEN_FP8)
    if not weights.symmetric:
        return replace(group, weights=replace(weights, symmetric=True, zp_dtype=None))
    return group
