"""Tiny checkpoints of every layout, recipes for every format, and what each must become.

The expectation is made from whole tensors with plain indexing, and shares with the converter only
the arithmetic of `ckptq.quantize`.

Shape letters: R rows (out), C columns (in), E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny.formats import FORMATS as ALL
from tiny.formats import RARE, Format
from tiny.tensors import Tensors
from torch import Tensor

from ckptq.checkpoint.open import open_checkpoint
from ckptq.convert.output import RunOptions
from ckptq.convert.run import Result, write_quantized
from ckptq.plan.make import make_plan
from ckptq.quantize.formats import (
    WeightScheme,
    constants,
    merge_statistic,
    needs_statistic,
    quantize,
    statistic,
)
from ckptq.recipes.args import Args
from ckptq.recipes.scheme import Group, Recipe
from ckptq.spec import spec_of

E, H, I = 4, 128, 192
LAYERS = 2
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

FORMATS: dict[str, Format] = {
    "fp8 channel": ALL["fp8-channel"],
    "fp8 tensor": ALL["fp8-tensor"],
    "fp8 block": ALL["fp8-block"],
    "int8 channel": ALL["int8"],
    "int4 channel": ALL["int4-channel"],
    "int8 tensor asym": RARE["int8-tensor-asym"],
    "int4 group": ALL["int4"],
    "int4 group asym": ALL["int4-asym"],
    "mxfp4": ALL["mxfp4"],
    "nvfp4": ALL["nvfp4"],
}


def scheme_of(name: str) -> WeightScheme:
    format, args = FORMATS[name]
    return Args.read(args).weight_scheme(format)


def recipe_of(name: str) -> Recipe:
    format, args = FORMATS[name]
    group = Group(name="group_0", targets=("Linear",), weights=Args.read(args), format=format)
    return Recipe(name="test", groups=(group,), text=f"# {name}\n")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A checkpoint, and where each Linear of it lies."""

    config: dict[str, Any]
    tensors: Tensors
    linears: dict[str, Callable[[Tensors], Tensor]]
    """Linear -> its weight [R, C], cut out of the source."""
    biases: dict[str, Callable[[Tensors], Tensor]]
    fused: tuple[str, ...] = ()
    """3-D tensors that are not in the output any more."""


def weights(*shape: int) -> Tensor:
    """Rows and columns of very different size, so that a scale of another row shows."""
    w = torch.randn(*shape)
    return (w * torch.randn(*shape[:-1], 1).exp() * torch.randn(shape[-1]).exp() * 0.02).bfloat16()


def plain_layout() -> Layout:
    """Llama: q/k/v and gate/up as Linears of their own; a bias; head and embedding."""
    tensors = {"model.embed_tokens.weight": weights(33, H)}
    shapes = {
        "self_attn.q_proj": (H, H),
        "self_attn.k_proj": (H // 2, H),
        "self_attn.v_proj": (H // 2, H),
        "self_attn.o_proj": (H, H),
        "mlp.gate_proj": (I, H),
        "mlp.up_proj": (I, H),
        "mlp.down_proj": (H, I),
    }
    names = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in shapes]
    for name in names:
        tensors[f"{name}.weight"] = weights(*shapes[name.split(".", 3)[3]])
        if name.endswith("q_proj"):
            tensors[f"{name}.bias"] = weights(H)
    for i in range(LAYERS):
        tensors[f"model.layers.{i}.input_layernorm.weight"] = torch.rand(H)
    tensors["lm_head.weight"] = weights(33, H)
    return Layout(
        config={"model_type": "llama", "num_hidden_layers": LAYERS},
        tensors=tensors,
        linears={n: lambda t, n=n: t[f"{n}.weight"] for n in names},
        biases={},
    )


def llama4_layout() -> Layout:
    """Experts fused as [E, in, out]: gate and up one after the other, transposed."""
    return _experts(
        "llama4_text",
        "feed_forward.experts",
        {
            "gate_proj": lambda w, e: w["gate_up_proj"][e][:, :I].t(),
            "up_proj": lambda w, e: w["gate_up_proj"][e][:, I:].t(),
            "down_proj": lambda w, e: w["down_proj"][e].t(),
        },
        {"gate_up_proj": (E, H, 2 * I), "down_proj": (E, I, H)},
        {},
    )


def qwen35_layout() -> Layout:
    """Experts fused as [E, out, in]: their rows stream."""
    return _experts(
        "qwen3_5_moe_text",
        "mlp.experts",
        {
            "gate_proj": lambda w, e: w["gate_up_proj"][e][:I],
            "up_proj": lambda w, e: w["gate_up_proj"][e][I:],
            "down_proj": lambda w, e: w["down_proj"][e],
        },
        {"gate_up_proj": (E, 2 * I, H), "down_proj": (E, H, I)},
        {},
    )


Cut = Callable[[Tensors, int], Tensor]


def _experts(
    model_type: str,
    module: str,
    cuts: dict[str, Cut],
    shapes: dict[str, tuple[int, ...]],
    bias_cuts: dict[str, Cut],
) -> Layout:
    tensors: Tensors = {}
    linears, biases = {}, {}
    for layer in range(LAYERS):
        experts = f"model.layers.{layer}.{module}"
        tensors |= {f"{experts}.{name}": weights(*shape) for name, shape in shapes.items()}
        for e in range(E):
            for made, source in ((linears, cuts), (biases, bias_cuts)):
                for projection, cut in source.items():
                    made[f"{experts}.{e}.{projection}"] = lambda t, x=experts, e=e, cut=cut: cut(
                        {n.removeprefix(x + "."): v for n, v in t.items()}, e
                    )
    fused = tuple(tensors)
    tensors |= {f"model.layers.{i}.input_layernorm.weight": torch.rand(H) for i in range(LAYERS)}
    config = {
        "model_type": model_type, "num_hidden_layers": LAYERS, "hidden_size": H,
        "intermediate_size": I, "moe_intermediate_size": I, "num_local_experts": E,
        "num_experts": E,
    }  # fmt: skip
    return Layout(config=config, tensors=tensors, linears=linears, biases=biases, fused=fused)


LAYOUTS = {
    "llama": plain_layout,
    "llama4": llama4_layout,
    "qwen3.5": qwen35_layout,
}


def save(folder: Path, layout: Layout, shards: int = 2) -> Path:
    """Write the checkpoint, its tensors dealt out in turn so that fused sets are torn apart."""
    folder.mkdir(parents=True)
    names = list(layout.tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: layout.tensors[n].contiguous() for n in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(layout.config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def convert(
    source: Path,
    out: Path,
    recipe: Recipe,
    ignore: tuple[str, ...] = (),
    shard_bytes: int = 100_000,
    **kwargs: Any,
) -> Result:
    ckpt = open_checkpoint(source)
    plan = make_plan(ckpt, recipe, ignore=ignore, shard_bytes=shard_bytes)
    names = [field.name for field in fields(RunOptions)]
    options = RunOptions(**{name: kwargs.pop(name) for name in names if name in kwargs})
    arguments = {"ignore": list(ignore)}
    return write_quantized(ckpt, plan, out, arguments=arguments, options=options, **kwargs)


def expected(layout: Layout, scheme: WeightScheme, left: Callable[[str], bool]) -> Tensors:
    """Every tensor of the output, from whole weights. `left` says which Linears are left alone."""
    made: Tensors = {}
    for name, tensor in layout.tensors.items():
        if name not in layout.fused and name.removesuffix(".weight") not in layout.linears:
            made[name] = tensor
    made |= {f"{name}.bias": cut(layout.tensors) for name, cut in layout.biases.items()}
    for name, cut in layout.linears.items():
        w_RC = cut(layout.tensors)
        if left(name):
            made[f"{name}.weight"] = w_RC
            continue
        shared = None
        if needs_statistic(scheme):
            members = [layout.linears[m](layout.tensors) for m in fused_set(name, layout)]
            shared = reduce(merge_statistic, (statistic(w, scheme) for w in members))
        stored = quantize(w_RC, scheme, shared) | constants(spec_of(w_RC), scheme, shared)
        made |= {f"{name}.{local}": tensor for local, tensor in stored.items()}
    return {name: tensor.contiguous() for name, tensor in made.items()}


def fused_set(name: str, layout: Layout) -> list[str]:
    parent, _, projection = name.rpartition(".")
    for names in FUSED:
        if projection in names:
            return [f"{parent}.{n}" for n in names if f"{parent}.{n}" in layout.linears]
    return [name]
