"""What vLLM's own class for a checkpoint does with it.

The class is built in float32 and loads the checkpoint through its own `load_weights`, but every
tensor holds one number, its own: the numbers found in a parameter tell which tensors landed in it,
and in which order, whatever renaming, stacking or transposing lies between. Then the class is
built under a scheme that takes every Linear, and each module is asked which method it got and by
which name it looked its scheme up.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from build import FP8_DYNAMIC, built, start_process_groups
from safetensors import safe_open
from written import load_written


def observe(checkpoint: Path) -> dict[str, Any]:
    """All that vLLM tells of one checkpoint: the line of the output."""
    start_process_groups()
    disk = dict(tensors_of(checkpoint))
    with built(checkpoint, None) as model:
        landed, unfilled = load_numbers(model, disk)
    with recorded_lookups() as lookups, built(checkpoint, FP8_DYNAMIC) as model:
        facts = facts_of(model, lookups)
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        return {
            "class": type(model).__name__,
            "packed": dict(getattr(model, "packed_modules_mapping", {}) or {}),
            "renames": renames(mapper.get_rename_mapper()) if mapper else {},
            "tensors": {name: list(tensor.shape) for name, tensor in disk.items()},
            "landed": landed,
            "unfilled": unfilled,
            "modules": facts,
            "written": load_written(model, disk, landed, facts),
        }


def tensors_of(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(glob.glob(f"{checkpoint}/*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  safe_open is no mapping
                yield name, file.get_tensor(name)


def load_numbers(
    model: Any, disk: dict[str, torch.Tensor]
) -> tuple[dict[str, list[str]], list[str]]:
    """Parameter -> the tensors that it holds, in its own order; parameters that hold none."""
    numbered = [
        (name, torch.full(tensor.shape, number, dtype=torch.float32))
        if tensor.is_floating_point()
        else (name, tensor)
        for number, (name, tensor) in enumerate(disk.items(), start=1)
    ]
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for tensor in state.values():
            if tensor.is_floating_point():
                torch.nn.init.constant_(tensor, -1.0)  # the number of no tensor
    model.load_weights(iter(numbered))
    names = {float(number): name for number, name in enumerate(disk, start=1)}
    landed = {
        parameter: [names[value] for value in in_order(tensor) if value in names]
        for parameter, tensor in state.items()
        if tensor.is_floating_point() and tensor.numel()
    }
    unfilled = [name for name, _ in model.named_parameters() if not landed.get(name)]
    return {name: tensors for name, tensors in landed.items() if tensors}, unfilled


def in_order(tensor: torch.Tensor) -> list[float]:
    """The values of a tensor, each once, in the order of their first place."""
    flat = tensor.detach().to(torch.float32).flatten()
    first_of_run = torch.ones_like(flat, dtype=torch.bool)
    first_of_run[1:] = torch.ne(flat[1:], flat[:-1])
    return list(dict.fromkeys(flat[first_of_run].tolist()))


@contextlib.contextmanager
def recorded_lookups() -> Iterator[dict[int, str]]:
    """id of a module -> the name by which it asked for its scheme."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    lookups: dict[int, str] = {}
    original = CompressedTensorsConfig.get_quant_method

    def get_quant_method(self: Any, layer: torch.nn.Module, prefix: str) -> Any:
        lookups[id(layer)] = prefix
        return original(self, layer, prefix)

    CompressedTensorsConfig.get_quant_method = get_quant_method
    try:
        yield lookups
    finally:
        CompressedTensorsConfig.get_quant_method = original


def facts_of(model: torch.nn.Module, lookups: dict[int, str]) -> dict[str, dict[str, Any]]:
    """Name of a module -> what it is; Linears, experts, embeddings and attention only."""
    facts = {name: asked(name, module, lookups) for name, module in model.named_modules()}
    for name, owner in tied(model).items():
        facts[name]["tied_to"] = owner
    return {name: found for name, found in facts.items() if found}


def asked(name: str, module: torch.nn.Module, lookups: dict[int, str]) -> dict[str, Any]:
    """Facts of one module, {} where it is neither a Linear, nor experts, nor attention."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    facts: dict[str, Any] = {}
    kind = type(module).__name__
    method = type(getattr(module, "quant_method", None)).__name__
    if isinstance(module, AttentionLayerBase):
        facts["attention"] = attention_kind(module)
        if getattr(module, "kv_sharing_target_layer_name", None):
            facts["shares_cache_of"] = module.kv_sharing_target_layer_name
    elif is_embedding(module):
        facts["fate"] = "quantized" if method.startswith("CompressedTensors") else "plain"
    elif method != "NoneType":
        facts["fate"] = "plain" if "Unquantized" in method else "quantized"
    elif isinstance(module, torch.nn.Linear):
        facts["fate"] = "plain"
    if not facts:
        return {}
    if hasattr(module, "ckpt_gate_proj_name"):
        facts["experts"] = [
            module.ckpt_gate_proj_name,
            module.ckpt_up_proj_name,
            module.ckpt_down_proj_name,
        ]
    if lookups.get(id(module), name) not in ("", name):
        facts["asks_as"] = lookups[id(module)]
    return facts | {"class": kind}


def tied(model: torch.nn.Module) -> dict[str, str]:
    """Output heads that have no weight of their own, and whose they use."""
    owners: dict[int, str] = {}
    found = {}
    for name, module in model.named_modules():
        if is_embedding(module):
            owner = owners.setdefault(id(module.weight), name)
            if owner != name:
                found[name] = owner
    return found


def is_embedding(module: torch.nn.Module) -> bool:
    """Whether it is one of vLLM's, an output head included."""
    return any(base.__name__ == "VocabParallelEmbedding" for base in type(module).__mro__)


def attention_kind(module: torch.nn.Module) -> str:
    """heads: k and v per head; latent: MLA's one vector; state: no cache of keys and values."""
    classes = {base.__name__ for base in type(module).__mro__}
    if "MambaBase" in classes:
        return "state"
    if classes & {"MLAAttention", "MultiHeadLatentAttention"}:
        return "latent"
    return "heads" if "Attention" in classes else "other"


def renames(mapper: Any) -> dict[str, Any]:
    """A class's map of names without its stackings: what vLLM applies to `ignore` and targets."""
    rules = {
        "renaming": [
            [list(r.source_patterns), list(r.target_patterns)] for r in mapper.orig_to_new_renaming
        ],
        "regex": [[p.pattern, new] for p, new in mapper.orig_to_new_regex.items()],
        "substr": [list(pair) for pair in mapper.orig_to_new_substr.items()],
        "prefix": [list(pair) for pair in mapper.orig_to_new_prefix.items()],
        "suffix": [list(pair) for pair in mapper.orig_to_new_suffix.items()],
    }
    return {kind: found for kind, found in rules.items() if found}
