"""Tiny Llamas in other makers' formats, written from the formats' descriptions, number by number.

Shares nothing with ckptq. Every weight comes with what it stands for.

Shape letters: R rows (out), C columns (in), G groups.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

H, I, V, LAYERS, GROUP = 128, 192, 64, 2, 32
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": H,
    "intermediate_size": I,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": V,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
SHAPES = {
    "self_attn.q_proj": (H, H),
    "self_attn.k_proj": (H // 2, H),
    "self_attn.v_proj": (H // 2, H),
    "self_attn.o_proj": (H, H),
    "mlp.gate_proj": (I, H),
    "mlp.up_proj": (I, H),
    "mlp.down_proj": (H, I),
}
LINEARS = {
    f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in SHAPES.items()
}

Stored = dict[str, Tensor]
Maker = Callable[[Tensor], tuple[Stored, Tensor]]
"""[R, C] float32 -> (stored tensors by local name, the weight that they stand for)."""


@dataclass(frozen=True)
class Foreign:
    """A checkpoint on disk, and the weights that it stands for."""

    folder: Path
    weights: Stored
    """Linear -> [R, C] in the model's dtype."""
    stored: Stored = field(repr=False)


def write(
    folder: Path,
    maker: Maker,
    method: dict[str, Any],
    dtype: torch.dtype = torch.float16,
    more: Stored | None = None,
) -> Foreign:
    """A Llama whose Linears are all in the format."""
    torch.manual_seed(0)
    tensors: Stored = {
        "model.embed_tokens.weight": torch.randn(V, H).to(dtype),
        "model.norm.weight": torch.ones(H).to(dtype),
        "lm_head.weight": (torch.randn(V, H) * 0.3).to(dtype),
    }
    weights: Stored = {}
    for i in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.ones(H).to(dtype)
    for name, (R, C) in LINEARS.items():
        w_RC = torch.randn(R, C) * torch.randn(R, 1).exp() * 0.05
        made, weights[name] = maker(w_RC)
        tensors |= {f"{name}.{local}": t.contiguous() for local, t in made.items()}
    tensors |= more or {}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = LLAMA | {"dtype": str(dtype).removeprefix("torch."), "quantization_config": method}
    (folder / "config.json").write_text(json.dumps(config))
    return Foreign(folder, weights, tensors)


def unquantized(foreign: Foreign, folder: Path) -> Path:
    """The same model with the weights themselves."""
    plain = {
        name: tensor
        for name, tensor in foreign.stored.items()
        if name.rpartition(".")[0] not in foreign.weights
    }
    plain |= {f"{name}.weight": weight for name, weight in foreign.weights.items()}
    folder.mkdir(parents=True)
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((foreign.folder / "config.json").read_text())
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def words(code_NC: Tensor, bits: int) -> Tensor:
    """[N, C] codes from 0 -> [N, C * bits / 32] int32, a little-endian stream of bits."""
    place = np.arange(bits)
    bit = (code_NC.numpy()[..., None] >> place & 1).astype(np.uint8).reshape(len(code_NC), -1)
    data = np.packbits(bit, axis=1, bitorder="little")
    return torch.from_numpy(data.view("<i4").astype(np.int32).copy())


def codes(w_RC: Tensor, bits: int, sym: bool, group_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes from 0 [R, C], scales [R, G] float16, zero points [R, G] from 1)."""
    most, G = 2**bits - 1, int(group_C.max()) + 1
    scale, zero = torch.empty(len(w_RC), G), torch.empty(len(w_RC), G)
    for g in range(G):
        x = w_RC[:, group_C == g]
        low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
        reach = torch.maximum(-low, high)
        scale[:, g] = (2 * reach if sym else high - low) / most
        zero[:, g] = (most + 1) / 2 if sym else -low / scale[:, g]
    scale, zero = scale.half(), zero.round().clamp(1, most).int()
    code = (w_RC / scale.float()[:, group_C]).round().int() + zero[:, group_C]
    return code.clamp(0, most), scale, zero


def gptq(bits: int = 4, sym: bool = True, version: int = 1, ordered: bool = False) -> Maker:
    def make(w_RC: Tensor) -> tuple[Stored, Tensor]:
        C = w_RC.shape[1]
        group_C = torch.arange(C, dtype=torch.int32) // GROUP
        if ordered:
            group_C = group_C[torch.randperm(C)]
        code_RC, scale_RG, zero_RG = codes(w_RC, bits, sym, group_C)
        held = {
            "qweight": words(code_RC, bits).t(),
            "qzeros": words(zero_RG.t().contiguous() - int(version == 1), bits),
            "scales": scale_RG.t(),
            "g_idx": group_C,
        }
        w = (code_RC - zero_RG[:, group_C]).half() * scale_RG[:, group_C]
        return held, w

    return make


def gptq_method(
    bits: int = 4, sym: bool = True, version: int = 1, ordered: bool = False
) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": sym,
        "desc_act": ordered, "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }  # fmt: skip


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
AWQ_METHOD: dict[str, Any] = {
    "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
    "modules_to_not_convert": None,
}  # fmt: skip


def awq(w_RC: Tensor) -> tuple[Stored, Tensor]:
    group_C = torch.arange(w_RC.shape[1]) // GROUP
    code_RC, scale_RG, zero_RG = codes(w_RC, 4, False, group_C)

    def packed(code_NR: Tensor) -> Tensor:
        return words(code_NR.unflatten(1, (-1, 8))[..., list(AWQ_ORDER)].flatten(1), 4)

    held = {
        "qweight": packed(code_RC.t().contiguous()),
        "qzeros": packed(zero_RG.t().contiguous()),
        "scales": scale_RG.t(),
    }
    return held, (code_RC - zero_RG[:, group_C]).half() * scale_RG[:, group_C]
