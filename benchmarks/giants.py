"""Published models that exist quantized only, as headers: names, shapes, config.json, no weights.

    python benchmarks/giants.py OUT --model deepseek-v3

Files have their full size and take no disk. DeepSeek-V3 and Kimi-K2 are FP8 in blocks of 128x128,
gpt-oss-120b has its experts in MXFP4.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from make_synthetic import Specs, bf16, write_shard

from ckptq.checkpoint.write import lay_out, write_index
from ckptq.spec import TensorSpec

SHARD_BYTES = 5_000_000_000
BLOCK = 128

Named = Iterator[tuple[str, TensorSpec]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Latent:
    """A model of DeepSeek-V3's architecture."""

    model_type: str
    layers: int
    dense: int
    heads: int
    experts: int
    vocab: int
    groups: int
    mtp: int
    hidden: int = 7168
    intermediate: int = 18432
    expert: int = 2048
    q_rank: int = 1536
    kv_rank: int = 512
    rope: int = 64
    head: int = 128


DEEPSEEK_V3 = Latent(
    model_type="deepseek_v3", layers=61, dense=3, heads=128, experts=256, vocab=129280, groups=8,
    mtp=1,
)  # fmt: skip
KIMI_K2 = Latent(
    model_type="kimi_k2", layers=61, dense=1, heads=64, experts=384, vocab=163840, groups=1, mtp=0,
)  # fmt: skip


def fp8(name: str, rows: int, columns: int) -> Named:
    """Codes, and a scale for each block."""
    yield f"{name}.weight", TensorSpec("F8_E4M3", (rows, columns))
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    yield f"{name}.weight_scale_inv", TensorSpec("F32", blocks)


def mlp(name: str, hidden: int, inner: int) -> Named:
    yield from fp8(f"{name}.gate_proj", inner, hidden)
    yield from fp8(f"{name}.up_proj", inner, hidden)
    yield from fp8(f"{name}.down_proj", hidden, inner)


def latent_layer(m: Latent, index: int) -> Named:
    layer = f"model.layers.{index}"
    attention = f"{layer}.self_attn"
    yield f"{layer}.input_layernorm.weight", bf16(m.hidden)
    yield f"{layer}.post_attention_layernorm.weight", bf16(m.hidden)
    yield from fp8(f"{attention}.q_a_proj", m.q_rank, m.hidden)
    yield f"{attention}.q_a_layernorm.weight", bf16(m.q_rank)
    yield from fp8(f"{attention}.q_b_proj", m.heads * (m.head + m.rope), m.q_rank)
    yield from fp8(f"{attention}.kv_a_proj_with_mqa", m.kv_rank + m.rope, m.hidden)
    yield f"{attention}.kv_a_layernorm.weight", bf16(m.kv_rank)
    yield from fp8(f"{attention}.kv_b_proj", m.heads * 2 * m.head, m.kv_rank)
    yield from fp8(f"{attention}.o_proj", m.hidden, m.heads * m.head)
    if index < m.dense:
        yield from mlp(f"{layer}.mlp", m.hidden, m.intermediate)
        return
    yield f"{layer}.mlp.gate.weight", bf16(m.experts, m.hidden)
    yield f"{layer}.mlp.gate.e_score_correction_bias", TensorSpec("F32", (m.experts,))
    yield from mlp(f"{layer}.mlp.shared_experts", m.hidden, m.expert)
    for expert in range(m.experts):
        yield from mlp(f"{layer}.mlp.experts.{expert}", m.hidden, m.expert)


def latent_tensors(m: Latent) -> Named:
    yield "model.embed_tokens.weight", bf16(m.vocab, m.hidden)
    for index in range(m.layers + m.mtp):
        yield from latent_layer(m, index)
    for index in range(m.layers, m.layers + m.mtp):
        layer = f"model.layers.{index}"
        yield f"{layer}.embed_tokens.weight", bf16(m.vocab, m.hidden)
        yield f"{layer}.enorm.weight", bf16(m.hidden)
        yield f"{layer}.hnorm.weight", bf16(m.hidden)
        yield f"{layer}.eh_proj.weight", bf16(m.hidden, 2 * m.hidden)
        yield f"{layer}.shared_head.norm.weight", bf16(m.hidden)
        yield f"{layer}.shared_head.head.weight", bf16(m.vocab, m.hidden)
    yield "model.norm.weight", bf16(m.hidden)
    yield "lm_head.weight", bf16(m.vocab, m.hidden)


def latent_config(m: Latent) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": m.model_type,
        "torch_dtype": "bfloat16",
        "num_hidden_layers": m.layers,
        "num_nextn_predict_layers": m.mtp,
        "first_k_dense_replace": m.dense,
        "moe_layer_freq": 1,
        "hidden_size": m.hidden,
        "intermediate_size": m.intermediate,
        "moe_intermediate_size": m.expert,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.heads,
        "n_routed_experts": m.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": m.groups,
        "topk_group": max(1, m.groups // 2),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": m.q_rank,
        "kv_lora_rank": m.kv_rank,
        "qk_rope_head_dim": m.rope,
        "qk_nope_head_dim": m.head,
        "v_head_dim": m.head,
        "vocab_size": m.vocab,
        "max_position_embeddings": 4096,
        "rope_theta": 10000,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        },
    }  # fmt: skip


def gpt_oss_tensors() -> Named:
    hidden, inner, heads, kv, experts, vocab = 2880, 2880, 64, 8, 128, 201088
    yield "model.embed_tokens.weight", bf16(vocab, hidden)
    for layer in (f"model.layers.{i}" for i in range(36)):
        yield f"{layer}.input_layernorm.weight", bf16(hidden)
        yield f"{layer}.post_attention_layernorm.weight", bf16(hidden)
        for name, rows in (("q", heads), ("k", kv), ("v", kv)):
            yield f"{layer}.self_attn.{name}_proj.weight", bf16(rows * 64, hidden)
            yield f"{layer}.self_attn.{name}_proj.bias", bf16(rows * 64)
        yield f"{layer}.self_attn.o_proj.weight", bf16(hidden, heads * 64)
        yield f"{layer}.self_attn.o_proj.bias", bf16(hidden)
        yield f"{layer}.self_attn.sinks", bf16(heads)
        yield f"{layer}.mlp.router.weight", bf16(experts, hidden)
        yield f"{layer}.mlp.router.bias", bf16(experts)
        for name, rows, columns in (
            ("gate_up_proj", 2 * inner, hidden),
            ("down_proj", hidden, inner),
        ):
            whole = f"{layer}.mlp.experts.{name}"
            yield f"{whole}_blocks", TensorSpec("U8", (experts, rows, columns // 32, 16))
            yield f"{whole}_scales", TensorSpec("U8", (experts, rows, columns // 32))
            yield f"{whole}_bias", bf16(experts, rows)
    yield "model.norm.weight", bf16(hidden)
    yield "lm_head.weight", bf16(vocab, hidden)


def gpt_oss_config() -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": 36,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                *("model.layers.*.self_attn", "model.layers.*.mlp.router"),
                *("model.embed_tokens", "lm_head"),
            ],
        },
    }


Model = tuple[Callable[[], Named], Callable[[], dict[str, Any]]]


def latent(m: Latent) -> Model:
    return lambda: latent_tensors(m), lambda: latent_config(m)


MODELS: dict[str, Model] = {
    "gpt-oss-120b": (gpt_oss_tensors, gpt_oss_config),
    "deepseek-v3": latent(DEEPSEEK_V3),
    "kimi-k2": latent(KIMI_K2),
}


def pools(seed: int) -> dict[str, memoryview]:
    """Dtype -> bytes to fill tensors with: FP8 codes of any value but NaN, scales of their blocks,
    and weights near zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 126, (1 << 24,), dtype=torch.uint8, generator=generator)
    codes |= torch.randint(0, 2, codes.shape, dtype=torch.uint8, generator=generator) << 7
    made = {
        "F8_E4M3": codes,
        "BF16": torch.randn(1 << 22, generator=generator).mul_(0.02).bfloat16().view(torch.uint8),
        "F32": torch.rand(1 << 18, generator=generator).mul_(1e-4).add_(1e-5).view(torch.uint8),
    }
    return {dtype: memoryview(pool.numpy()) for dtype, pool in made.items()}


def write_random(file: Path, specs: Specs, seed: int) -> None:
    """One file of random numbers."""
    made = pools(seed)
    head, starts = lay_out(specs, {"format": "pt"})
    with file.open("wb") as handle:
        handle.write(head)
        for name in sorted(specs, key=lambda name: starts[name]):
            left, pool = specs[name].nbytes, made[specs[name].dtype]
            while left:
                left -= handle.write(pool[: min(left, len(pool))])


def make(out: Path, model: Model, seed: int | None = None) -> tuple[int, int]:
    """Write the model into the new folder `out`; returns how many tensors, and their bytes. With a
    seed its codes are random, not holes: zeros are quicker to quantize."""
    tensors, config = model
    runs: list[Specs] = [{}]
    for name, spec in tensors():
        if runs[-1] and sum(s.nbytes for s in runs[-1].values()) + spec.nbytes > SHARD_BYTES:
            runs.append({})
        runs[-1][name] = spec
    out.mkdir(parents=True)
    files = (f"model-{i:05d}-of-{len(runs):05d}.safetensors" for i in range(1, len(runs) + 1))
    shards = dict(zip(files, runs, strict=True))
    for file, specs in shards.items():
        if seed is None:
            write_shard(out / file, specs, None)
        else:
            write_random(out / file, specs, seed)
    write_index(out, shards)
    (out / "config.json").write_text(json.dumps(config(), indent=2))
    return sum(map(len, runs)), sum(s.nbytes for specs in runs for s in specs.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=MODELS, default="deepseek-v3")
    given = parser.parse_args()
    count, nbytes = make(given.out, MODELS[given.model])
    print(f"{given.out}: {count:,} tensors, {nbytes:,} bytes")


if __name__ == "__main__":
    main()
