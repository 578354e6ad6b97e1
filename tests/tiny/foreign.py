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


def fp8_method(**more: Any) -> dict[str, Any]:
    """As ModelOpt writes it into config.json."""
    part = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"input_activations": part, "weights": part, "targets": ["Linear"]}
    return {
        "quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"],
        "config_groups": {"group_0": group}, "producer": {"name": "modelopt", "version": "0.47.0"},
        **more,
    }  # fmt: skip


def fp8(w_RC: Tensor) -> tuple[Stored, Tensor]:
    """ModelOpt's, with static inputs."""
    scale = w_RC.abs().max() / 448
    code_RC = (w_RC / scale).to(torch.float8_e4m3fn)
    held = {"weight": code_RC, "weight_scale": scale, "input_scale": torch.tensor(0.03)}
    return held, (code_RC.float() * scale).bfloat16()


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e2m1_codes(x: Tensor) -> Tensor:
    """The nearest of the sixteen numbers, by trying them all."""
    return (x[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)


def nvfp4(w_RC: Tensor) -> tuple[Stored, Tensor]:
    """ModelOpt's, with static inputs."""
    second = w_RC.abs().max() / (6 * 448)
    x = w_RC.unflatten(1, (-1, 16))
    scale = (x.abs().amax(-1) / 6 / second).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    step = (scale.float() * second)[..., None]
    code = e2m1_codes(x / step)
    code_RC = code.flatten(1)
    held = {
        "weight": code_RC[:, ::2] | code_RC[:, 1::2] << 4,
        "weight_scale": scale,
        "weight_scale_2": second,
        "input_scale": torch.tensor(0.0007),
    }
    return held, (E2M1[code.long()] * step).flatten(1).bfloat16()


def nvfp4_method(**more: Any) -> dict[str, Any]:
    return fp8_method(quant_algo="NVFP4", group_size=16, **more)


EXPERTS = 4
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": V,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 16,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "max_position_embeddings": 256,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            *("model.layers.*.self_attn", "model.layers.*.mlp.router"),
            *("model.embed_tokens", "lm_head"),
        ],
    },
}


def gpt_oss(folder: Path) -> Foreign:
    """Experts in MXFP4 blocks of random codes, exponents of the size that real ones have."""
    torch.manual_seed(0)
    hidden, inner, wide = 64, 96, 128

    def plain(*shape: int, scale: float = 0.1) -> Tensor:
        return (torch.randn(*shape) * scale).bfloat16()

    tensors: Stored = {
        "model.embed_tokens.weight": plain(V, hidden, scale=1.0),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
        "lm_head.weight": plain(V, hidden, scale=0.3),
    }
    weights: Stored = {}
    for layer in (f"model.layers.{i}" for i in range(2)):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = torch.ones(hidden).bfloat16()
        shapes = {"q": (wide, hidden), "k": (64, hidden), "v": (64, hidden), "o": (hidden, wide)}
        for name, shape in shapes.items():
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = plain(*shape)
            tensors[f"{layer}.self_attn.{name}_proj.bias"] = plain(shape[0])
        tensors[f"{layer}.self_attn.sinks"] = plain(4)
        tensors[f"{layer}.mlp.router.weight"] = plain(EXPERTS, hidden)
        tensors[f"{layer}.mlp.router.bias"] = plain(EXPERTS)
        for name, (outs, ins) in {
            "gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)
        }.items():  # fmt: skip
            whole = f"{layer}.mlp.experts.{name}"
            blocks = torch.randint(0, 256, (EXPERTS, outs, ins // 32, 16), dtype=torch.uint8)
            scales = torch.randint(116, 124, (EXPERTS, outs, ins // 32), dtype=torch.uint8)
            tensors |= {f"{whole}_blocks": blocks, f"{whole}_scales": scales}
            tensors[f"{whole}_bias"] = plain(EXPERTS, outs)
            pair = torch.stack((E2M1[(blocks & 15).long()], E2M1[(blocks >> 4).long()]), -1)
            w = pair.flatten(3) * torch.exp2(scales.float() - 127)[..., None]
            weights[whole] = w.flatten(2).transpose(1, 2).contiguous().bfloat16()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(GPT_OSS))
    return Foreign(folder, weights, tensors)


def fp8_rows(name: str = "weight_scale", flat: bool = False) -> Maker:
    """A scale for each row, [R, 1] or [R]."""

    def make(w_RC: Tensor) -> tuple[Stored, Tensor]:
        scale = w_RC.abs().amax(1, keepdim=True) / 448
        code = (w_RC / scale).to(torch.float8_e4m3fn)
        held = {"weight": code, name: scale.flatten() if flat else scale}
        return held, (code.float() * scale).bfloat16()

    return make


def deepseek(w_RC: Tensor) -> tuple[Stored, Tensor]:
    """As DeepSeek-V4 has it: FP8 in blocks for attention, pairs of FP4 for its experts' MLPs, both
    with exponents named `scale`. The number of rows tells which."""
    R, C = w_RC.shape
    if R == I or C == I:
        x = w_RC.unflatten(1, (-1, 32))
        exponent = (x.abs().amax(-1) / 6).log2().ceil()
        code = e2m1_codes(x / torch.exp2(exponent)[..., None])
        w = (E2M1[code.long()] * torch.exp2(exponent)[..., None]).flatten(1)
        code_RC = code.flatten(1)
        pairs = (code_RC[:, ::2] | code_RC[:, 1::2] << 4).view(torch.int8)
        return {
            "weight": pairs,
            "scale": torch.exp2(exponent).to(torch.float8_e8m0fnu),
        }, w.bfloat16()
    scale = torch.exp2(torch.randint(-14, -10, (-(-R // 128), -(-C // 128))).float())
    whole = scale.repeat_interleave(128, 0)[:R].repeat_interleave(128, 1)[:, :C]
    code = (w_RC / whole).clamp(-448, 448).to(torch.float8_e4m3fn)
    held = {"weight": code, "scale": scale.to(torch.float8_e8m0fnu)}
    return held, (code.float() * whole).bfloat16()


FP8_METHOD: dict[str, Any] = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "ue8m0"
}  # fmt: skip
