"""Faults to inject into a good checkpoint: each with the code by which `verify` must name it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from verify_checkpoints import FAMILIES, HEAD_DIM, HEADS, KV_HEADS, Editor

from ckptq.permute.apply import permute_tensor
from ckptq.permute.effect import Move, Part, Projection, effect_on
from ckptq.rope_order import Heads, RopeOrder
from ckptq.spec import spec_of

ALL = tuple(FAMILIES)
MOE = ("llama4", "mixtral", "qwen3-moe")
PER_ROW = ("fp8-channel", "int8", "int4", "int4-channel", "int8-packed", "mxfp4", "nvfp4")
GROUPED = ("int4", "int4-asym", "mxfp8", "mxfp4", "nvfp4")
ROPE_WEIGHTS = ("fp8-channel", "int8", "int4", "int4-channel", "mxfp4", "nvfp4")
ASYM = ("int4-asym",)
NIBBLES = ("int4", "int4-asym", "int4-channel", "mxfp4", "nvfp4")
MODULES = "model.layers.0.self_attn"


@dataclass(frozen=True)
class Fault:
    """One way to break a checkpoint."""

    name: str
    code: str
    inject: Callable[[Editor], str | None]
    """Breaks it; gives a part of the name of the tensor that must be named."""
    weights: tuple[str, ...] = ("fp8-channel",)
    families: tuple[str, ...] = ("llama",)
    kv: bool = False
    also: tuple[str, ...] = ()
    """Codes that may come along, because one thing that is wrong can be wrong in two ways."""
    alone: bool = False
    """Whether it is named without a source too, under the same code."""


def collector(faults: list[Fault]):
    """A decorator that adds to a module's list."""

    def fault(code: str, **options):
        def keep(inject: Callable[[Editor], str | None]) -> Callable[[Editor], str | None]:
            name = inject.__name__.replace("_", "-")
            faults.append(Fault(name=name, code=code, inject=inject, **options))
            return inject

        return keep

    return fault


def q_proj(e: Editor, layer: int = 0) -> str:
    return module(e, f"layers.{layer}.self_attn.q_proj")


def k_proj(e: Editor) -> str:
    return module(e, "layers.0.self_attn.k_proj")


def module(e: Editor, suffix: str) -> str:
    """The language model's module of this name."""
    found = (n.rpartition(".")[0] for n in e.tensors if "vision" not in n)
    return next(name for name in found if name.endswith(suffix))


def mlp(e: Editor, projection: str = "down") -> str:
    """A Linear of an MLP that is not fused with others, or of expert 1."""
    names = {"down": ("down_proj", "w2"), "gate": ("gate_proj", "w1"), "up": ("up_proj", "w3")}
    pattern = rf".*(mlp|feed_forward|experts\.1)\.({'|'.join(names[projection])})\.weight_scale$"
    return next(n for n in sorted(e.tensors) if re.match(pattern, n)).removesuffix(".weight_scale")


def codes(e: Editor, name: str) -> str:
    packed = f"{name}.weight_packed"
    return packed if packed in e.tensors else f"{name}.weight"


def locals_of(e: Editor, name: str) -> list[str]:
    return [n for n in e.tensors if n.rpartition(".")[0] == name]


def swap(e: Editor, a: str, b: str) -> None:
    e.tensors[a], e.tensors[b] = e.tensors[b], e.tensors[a]


def turn(e: Editor, parts: tuple[Part, ...], to: RopeOrder = RopeOrder.HALF_SPLIT) -> None:
    """Put some parts of all q and k into another RoPE order, as somebody's tool might."""
    sides = (("q_proj", Heads(HEADS, HEAD_DIM)), ("k_proj", Heads(KV_HEADS, HEAD_DIM)))
    for name in list(e.tensors):
        for projection, heads in sides:
            parent, _, local = name.rpartition(".")
            if not parent.endswith(projection) or "vision" in name:
                continue
            effect = effect_on(local, spec_of(e.tensors[name]), Projection(parent, heads, bits=4))
            if effect.part in parts and effect.move is not Move.KEPT:
                e.tensors[name] = permute_tensor(e.tensors[name], effect, to)
