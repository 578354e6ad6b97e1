"""Which tensors of a checkpoint a RoPE permutation affects, from headers and config alone.

It affects q_proj and k_proj of every decoder layer of the language model, with RoPE or without, and
the attention modules that hold them. Vision towers have their own RoPE and are left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import Checkpoint
from ckptq.engines.vllm import group_of
from ckptq.errors import PlanError
from ckptq.models.heads import config_head_dim, config_heads
from ckptq.models.witnesses import read_witnesses
from ckptq.permute.effect import Effect, Projection, effect_on, effect_on_attention
from ckptq.recipes.declared import Declared, declared
from ckptq.rope_order import Heads

PROJECTIONS = {"q_proj": "q", "k_proj": "k"}
_UNTURNED = ("v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class Permutation:
    """Which tensors of a checkpoint a permutation affects, and where their rows go."""

    modules: Collection[str]
    """The attention modules of the decoder layers."""
    heads: Mapping[str, Heads]
    """Of "q" and of "k"."""
    said: Declared
    """The declared quantization, for the layout of weights."""

    def effect_on(self, stored: StoredTensor) -> Effect | None:
        """What happens to a stored tensor; None for tensors of other modules.

        PlanError, naming the tensor, for one that is unknown or cannot be permuted.
        """
        module, local = _split(stored.name, self.modules)
        child, _, rest = local.partition(".")
        if module is None or (rest and child in _UNTURNED):
            return None
        if child in PROJECTIONS:
            projection = self._projection(f"{module}.{child}", self.heads[PROJECTIONS[child]])
            return effect_on(rest, stored.spec, projection)
        sides = {side: Projection(module, heads) for side, heads in self.heads.items()}
        return effect_on_attention(local, stored.spec, sides)

    def _projection(self, name: str, heads: Heads) -> Projection:
        group = group_of(self.said, name)
        weights = group.weights if group else None
        if weights is None:
            return Projection(name, heads)
        return Projection(name, heads, block=weights.block_structure, bits=weights.num_bits)


def read_permutation(ckpt: Checkpoint) -> Permutation:
    """From headers and config alone. PlanError for a model without q_proj and k_proj (fused qkv,
    latent attention)."""
    modules = _attention_modules(ckpt, read_witnesses(ckpt).layers)
    if not modules:
        raise PlanError(
            f"{ckpt.path}: no decoder layer has both a q_proj and a k_proj; ckptq "
            "permutes no other attention layout"
        )
    heads = head_geometry(ckpt.text_config)
    return Permutation(modules, heads, declared(ckpt))


def plan_permutation(ckpt: Checkpoint, *, skip_unfit: bool = False) -> dict[str, Effect]:
    """Tensor name -> what happens to it, for every tensor of q/k and of their attention modules.

    Raises PlanError as `read_permutation` does, and for a tensor that is unknown or cannot be
    permuted; with `skip_unfit`, such tensors are left out.
    """
    permutation = read_permutation(ckpt)
    effects = {}
    for name, stored in ckpt.tensors.items():
        try:
            effect = permutation.effect_on(stored)
        except PlanError:
            if not skip_unfit:
                raise
            continue
        if effect is not None:
            effects[name] = effect
    return effects


def head_geometry(text_config: Mapping[str, Any]) -> dict[str, Heads]:
    """The heads of "q" and of "k", from a language model's config.

    head_dim defaults to hidden_size / num_attention_heads, as in transformers; the rotated share
    of a head is `rotary_dim` or `partial_rotary_factor`, wherever the config keeps it.
    """
    counts = config_heads(text_config)
    if counts is None:
        raise PlanError("config.json: num_attention_heads is missing, so the heads are unknown")
    head_dim = config_head_dim(text_config, counts[0])
    rotary_dim = _rotary_dim(text_config, head_dim)
    q_count, k_count = counts
    return {"q": Heads(q_count, head_dim, rotary_dim), "k": Heads(k_count, head_dim, rotary_dim)}


def _rotary_dim(text_config: Mapping[str, Any], head_dim: int) -> int:
    if isinstance(text_config.get("rotary_dim"), int):
        return int(text_config["rotary_dim"])
    ropes = text_config.get("rope_parameters") or {}
    if not isinstance(ropes, Mapping):
        raise PlanError(f"config.json: rope_parameters is {ropes!r}, expected an object")
    # one set of parameters, or one for each kind of layer
    sets = [text_config, ropes, *(r for r in ropes.values() if isinstance(r, Mapping))]
    names = ("partial_rotary_factor", "rotary_pct")
    shares = {_share(name, s[name]) for s in sets for name in names if s.get(name) is not None}
    if len(shares) > 1:
        raise PlanError(
            f"config.json: layers rotate different shares of a head ({sorted(shares)}); ckptq "
            "permutes only models that rotate the same rows in all layers"
        )
    return int(head_dim * shares.pop()) if shares else head_dim


def _share(key: str, found: object) -> float:
    if isinstance(found, int | float) and not isinstance(found, bool) and 0 < found <= 1:
        return float(found)
    raise PlanError(f"config.json: {key} is {found!r}, expected a number from 0 to 1")


def _attention_modules(ckpt: Checkpoint, layers: str) -> set[str]:
    """The modules of decoder layers that own both a q_proj and a k_proj."""
    owners: dict[str, set[str]] = {child: set() for child in PROJECTIONS}
    for name in ckpt.tensors:
        for child, found in owners.items():
            module, dot, _ = name.partition(f".{child}.")
            if dot and layers and module.startswith(layers + "."):
                found.add(module)
    return set.intersection(*owners.values())


def _split(name: str, modules: Collection[str]) -> tuple[str | None, str]:
    """(attention module, rest of the name), or (None, name) for a tensor of anything else."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        if module in modules:
            return module, ".".join(parts[end:])
    return None, name
