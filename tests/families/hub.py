"""What the hub's checkpoints have and transformers' saves have not: names, fused experts, MTP.

A variant starts from a family's tensors and changes them. None of it needs a model to be built.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Names = tuple[tuple[str, str], ...]

TOWER: Names = ((r"^((?:model\.)?vision_tower)\.(?!vision_model\.)", r"\1.vision_model."),)
HUB_NAMES: dict[str, Names] = {
    **dict.fromkeys(
        (
            "llava",
            "llava_qwen2",
            "llava_next",
            "llava_next_video",
            "llava_onevision",
            "paligemma",
            "gemma3",
            "aya_vision",
            "cohere2_vision",
        ),
        TOWER,
    ),
    "lfm2_vl": TOWER,
    "kimi_linear": ((r"(layers\.0)\.block_sparse_moe\.", r"\1.mlp."),),
}
"""Where transformers 5.17 saves other names than the hub has, which vLLM 0.32 does not load."""


def renamed(tensors: Mapping[str, torch.Tensor], names: Names) -> Tensors:
    """The same tensors under other names; each pattern is replaced once."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        for pattern, new in names:
            name = re.sub(pattern, new, name, count=1)
        result[name] = tensor
    return result


def transposed(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Fused experts [E, out, in] as [E, in, out]: Qwen3-VL-MoE's on the hub."""
    return {
        name: tensor.transpose(1, 2) if ".experts." in name else tensor
        for name, tensor in tensors.items()
    }


def fuse_experts(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """`experts.3.up_proj.weight` and all its kind -> `experts.gate_up_proj` [E, 2I, H]."""
    result = {n: t for n, t in tensors.items() if ".experts." not in n}
    parents = {n.partition(".experts.")[0] + ".experts" for n in tensors if ".experts." in n}
    for parent in sorted(parents):
        count = len({n.split(".experts.")[1].split(".")[0] for n in tensors if parent in n})
        experts = [
            {p: tensors[f"{parent}.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")}
            for e in range(count)
        ]
        result[f"{parent}.gate_up_proj"] = torch.stack(
            [torch.cat([expert["gate"], expert["up"]]) for expert in experts]
        )
        result[f"{parent}.down_proj"] = torch.stack([expert["down"] for expert in experts])
    return result


def add_mtp_layer(tensors: Mapping[str, torch.Tensor], layer: int, head: bool = True) -> Tensors:
    """One more decoder layer that predicts a further token, as DeepSeek-V3 and GLM-4.5 have it."""
    last = f"model.layers.{layer - 1}."
    new = f"model.layers.{layer}."
    result = dict(tensors)
    result |= {new + n.removeprefix(last): t.clone() for n, t in tensors.items() if last in n}
    embedding = tensors["model.embed_tokens.weight"]
    width = embedding.shape[1]
    norm = tensors["model.norm.weight"]
    result |= {
        f"{new}eh_proj.weight": torch.randn(width, 2 * width, dtype=norm.dtype) * 0.05,
        f"{new}enorm.weight": norm.clone(),
        f"{new}hnorm.weight": norm.clone(),
        f"{new}shared_head.norm.weight": norm.clone(),
    }
    if head:
        result[f"{new}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        result[f"{new}embed_tokens.weight"] = embedding.clone()
    return result


def add_mtp_block(tensors: Mapping[str, torch.Tensor], root: str, like: str) -> Tensors:
    """`mtp.fc`, norms and `mtp.layers.0`, as Qwen3-Next and Qwen3.5 have them."""
    result = dict(tensors)
    prefix = f"{root}layers.{like}."
    result |= {
        "mtp.layers.0." + n.removeprefix(prefix): t.clone()
        for n, t in tensors.items()
        if n.startswith(prefix)
    }
    norm = tensors[f"{root}norm.weight"]
    width = len(norm)
    result["mtp.fc.weight"] = torch.randn(width, 2 * width, dtype=norm.dtype) * 0.05
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        result[f"mtp.{name}.weight"] = norm.clone()
    return result


Change = Callable[[Mapping[str, torch.Tensor]], Tensors]

VARIANTS: dict[str, tuple[str, Change, dict[str, Any]]] = {
    "qwen3_5_moe_fused": ("qwen3_5_moe", fuse_experts, {}),
    "qwen3_5_moe_hub": (
        "qwen3_5_moe",
        lambda t: fuse_experts(add_mtp_block(t, "model.language_model.", "3")),
        {},
    ),
    "qwen3_5_mtp": ("qwen3_5", lambda t: add_mtp_block(t, "model.language_model.", "3"), {}),
    "qwen3_next_mtp": ("qwen3_next", lambda t: add_mtp_block(t, "model.", "3"), {}),
    "deepseek_v3_mtp": (
        "deepseek_v3",
        lambda t: add_mtp_layer(t, 4),
        {"num_nextn_predict_layers": 1},
    ),
    "glm4_moe_mtp": ("glm4_moe", lambda t: add_mtp_layer(t, 4), {"num_nextn_predict_layers": 1}),
    "qwen3_vl_moe_hub": ("qwen3_vl_moe", transposed, {}),
    "kimi_k2": ("deepseek_v3", dict, {"model_type": "kimi_k2"}),
}
"""Family -> what it is made from, how, and what its config.json says more."""


FP8_BLOCK: dict[str, str] = {
    "qwen3_fp8": "qwen3",
    "qwen3_moe_fp8": "qwen3_moe",
    "deepseek_v3_fp8": "deepseek_v3",
    "glm4_moe_fp8": "glm4_moe",
    "minimax_m2_fp8": "minimax_m2",
}
"""Families as the hub has them in FP8 with a scale for each block -> what they are made from."""

BLOCK = 128
FP8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
KEPT_BY_FP8 = re.compile(r"embed|lm_head|norm|\.gate\.weight$")


def in_fp8_blocks(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Every matrix of a decoder layer but routers as codes and `weight_scale_inv`."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or KEPT_BY_FP8.search(name):
            result[name] = tensor
            continue
        blocks = [-(-size // BLOCK) for size in tensor.shape]
        scales = torch.full(blocks, float(tensor.abs().max()) / 448)
        result[name] = (tensor.float() / scales[0, 0]).to(torch.float8_e4m3fn)
        result[f"{name}_scale_inv"] = scales
    return result
