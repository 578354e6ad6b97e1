"""Whether vLLM's class loads what a quantizer writes: one Linear at a time, each with its scale.

Experts are written one by one, under the names by which vLLM looks up their scheme; scales of the
KV cache beside the projections of their attention. Weights do not matter here; each scale is
filled with 1, and those that are still not 1 were filled by no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

FP8 = torch.float8_e4m3fn
UNFILLED = -1.0

Facts = Mapping[str, Mapping[str, Any]]
Disk = Mapping[str, torch.Tensor]


def load_written(
    model: Any, disk: Disk, landed: Mapping[str, list[str]], facts: Facts
) -> dict[str, Any]:
    """Load the checkpoint as it would be written in FP8: how its two halves ended.

    `weights` are the Linears and all that is not quantized, `cache` the scales of k and v, by the
    names that work. Each is {} where all went well.
    """
    places = {tensor: name for name, tensors in landed.items() for tensor in tensors}
    parameters = dict(model.named_parameters())
    weights = dict(tensors_written(parameters, disk, places, facts))
    outcomes = [
        {"names": f"{inner}k_scale", **loaded(model, cache_scales(places, facts, inner), "cache")}
        for inner in ("", "attn.")
    ]
    best = next((o for o in outcomes if len(o) == 1), outcomes[0])
    return {
        "weights": loaded(model, weights, "weights"),
        "cache": {} if best == {"names": "k_scale"} else best,
    }


ENDS = {"weights": ("weight_scale",), "cache": ("k_scale", "v_scale")}


def loaded(model: Any, tensors: Mapping[str, torch.Tensor], half: str) -> dict[str, Any]:
    """{}, or the error, or the scales that none of these tensors filled."""
    scales = {n: p for n, p in model.named_parameters() if n.endswith(ENDS[half])}
    for parameter in scales.values():
        torch.nn.init.constant_(parameter, UNFILLED)
    try:
        model.load_weights(iter(tensors.items()))
    except Exception as error:  # vLLM raises many kinds
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    empty = [name for name, parameter in scales.items() if is_unfilled(parameter)]
    return {"unfilled": empty} if empty else {}


def is_unfilled(parameter: torch.Tensor) -> bool:
    return bool(torch.any(torch.eq(parameter.data.float(), UNFILLED)))


def tensors_written(
    parameters: Mapping[str, torch.Tensor], disk: Disk, places: Mapping[str, str], facts: Facts
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the quantized checkpoint; what is not quantized goes as it is."""
    for name, tensor in disk.items():
        module, _, local = places.get(name, "").rpartition(".")
        quantized = facts.get(module, {}).get("fate") == "quantized"
        if not quantized or local == "bias":
            yield name, tensor
        elif "experts" in facts[module] and name.removesuffix(".weight").split(".")[-2].isdigit():
            yield from linear(name.removesuffix(".weight"), tensor.shape)
        elif "experts" in facts[module] and local in ("w13_weight", "w2_weight"):
            shape = parameters[f"{module}.{local}"].shape
            yield from experts(name, local, shape, facts[module]["experts"])
        elif name.endswith(".weight"):
            # alone in its place it has the place's rows, also where it is stored transposed
            alone = list(places.values()).count(places[name]) == 1
            rows = parameters[places[name]].shape[0] if alone else tensor.shape[0]
            yield from linear(name.removesuffix(".weight"), tensor.shape, rows)
        else:
            yield name, tensor


def linear(
    module: str, shape: torch.Size, rows: int | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{module}.weight", torch.ones(shape).to(FP8)
    yield f"{module}.weight_scale", torch.ones(rows or shape[0], 1)


def experts(
    name: str, local: str, shape: torch.Size, names: list[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A fused tensor, one Linear for each expert: `...experts.3.up_proj` beside `...experts`."""
    parent = name.removesuffix(".weight").rpartition(".")[0]
    parent = parent if parent.endswith("experts") else f"{parent}.experts"
    gate, up, down = names
    count, out, inner = shape
    gates = [n for n in dict.fromkeys((gate, up)) if n]
    for expert in range(count):
        for part in [down] if local == "w2_weight" else gates:
            rows = out if local == "w2_weight" else out // len(gates)
            yield from linear(f"{parent}.{expert}.{part}", torch.Size((rows, inner)))


def cache_scales(places: Mapping[str, str], facts: Facts, inner: str) -> dict[str, torch.Tensor]:
    """k_scale and v_scale of each attention, in the module of its projections on disk."""
    inside = {
        module.rpartition(".")[0]
        for module, f in facts.items()
        if f.get("attention") in ("heads", "latent")
    }
    nested = (".mla_attn", ".dpa_list")  # Zamba-2 has one attention for each use of a shared block
    inside |= {module.rpartition(".")[0] for module in inside if module.endswith(nested)}
    parents = {
        tensor.removesuffix(".weight").rpartition(".")[0]
        for tensor, parameter in places.items()
        if facts.get(module := parameter.removesuffix(".weight"), {}).get("fate") == "quantized"
        and module.rpartition(".")[0] in inside
    }
    return {
        f"{parent}.{inner}{which}_scale": torch.ones(1)
        for parent in sorted(parents)
        for which in "kv"
    }
