"""Write a checkpoint with the real shapes of a model family, without its weights.

    python benchmarks/make_synthetic.py OUT --shapes llama-8b --layers 8
    python benchmarks/make_synthetic.py OUT --shapes llama-70b --sparse

Random weights by default. With `--sparse` the files have their full size and take no disk: every
weight reads as zero, which is enough to measure memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ckptq.checkpoint.write import lay_out, write_index
from ckptq.spec import TensorSpec

SHARD_BYTES = 1_000_000_000

Specs = dict[str, TensorSpec]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """What decides the shapes of a decoder's tensors."""

    architecture: str
    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int = 128
    experts: int = 0
    """Fused routed experts of every layer, beside a shared one; 0 is a dense model."""


SHAPES = {
    "llama-8b": Shapes(
        architecture="LlamaForCausalLM",
        model_type="llama",
        layers=32,
        hidden=4096,
        intermediate=14336,
        heads=32,
        kv_heads=8,
        vocab=32000,
    ),
    "llama-70b": Shapes(
        architecture="LlamaForCausalLM",
        model_type="llama",
        layers=80,
        hidden=8192,
        intermediate=28672,
        heads=64,
        kv_heads=8,
        vocab=128256,
    ),
    "llama-405b": Shapes(
        architecture="LlamaForCausalLM",
        model_type="llama",
        layers=126,
        hidden=16384,
        intermediate=53248,
        heads=128,
        kv_heads=8,
        vocab=128256,
    ),
    "llama4-maverick": Shapes(
        architecture="Llama4ForCausalLM",
        model_type="llama4_text",
        layers=1,
        hidden=5120,
        intermediate=8192,
        heads=40,
        kv_heads=8,
        vocab=202048,
        experts=128,
    ),
    "tiny": Shapes(
        architecture="LlamaForCausalLM",
        model_type="llama",
        layers=4,
        hidden=128,
        intermediate=256,
        heads=4,
        kv_heads=2,
        vocab=128,
        head_dim=32,
    ),
}
"""Llama 8B has the vocabulary of Llama 2, so that a few layers of it are mostly Linears."""


def tensors(s: Shapes) -> Iterator[tuple[str, TensorSpec]]:
    """Names and specs in the order in which they are stored."""
    yield "model.embed_tokens.weight", bf16(s.vocab, s.hidden)
    for index in range(s.layers):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", bf16(s.hidden)
        yield f"{layer}.self_attn.q_proj.weight", bf16(s.heads * s.head_dim, s.hidden)
        yield f"{layer}.self_attn.k_proj.weight", bf16(s.kv_heads * s.head_dim, s.hidden)
        yield f"{layer}.self_attn.v_proj.weight", bf16(s.kv_heads * s.head_dim, s.hidden)
        yield f"{layer}.self_attn.o_proj.weight", bf16(s.hidden, s.heads * s.head_dim)
        yield f"{layer}.post_attention_layernorm.weight", bf16(s.hidden)
        if s.experts:
            moe = f"{layer}.feed_forward"
            yield f"{moe}.router.weight", bf16(s.experts, s.hidden)
            yield f"{moe}.experts.gate_up_proj", bf16(s.experts, s.hidden, 2 * s.intermediate)
            yield f"{moe}.experts.down_proj", bf16(s.experts, s.intermediate, s.hidden)
        mlp = f"{layer}.feed_forward.shared_expert" if s.experts else f"{layer}.mlp"
        yield f"{mlp}.gate_proj.weight", bf16(s.intermediate, s.hidden)
        yield f"{mlp}.up_proj.weight", bf16(s.intermediate, s.hidden)
        yield f"{mlp}.down_proj.weight", bf16(s.hidden, s.intermediate)
    yield "model.norm.weight", bf16(s.hidden)
    yield "lm_head.weight", bf16(s.vocab, s.hidden)


def bf16(*shape: int) -> TensorSpec:
    return TensorSpec("BF16", shape)


def config(s: Shapes) -> dict[str, object]:
    """config.json of the model."""
    made: dict[str, object] = {
        "architectures": [s.architecture],
        "model_type": s.model_type,
        "dtype": "bfloat16",
        "num_hidden_layers": s.layers,
        "hidden_size": s.hidden,
        "intermediate_size": s.intermediate,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "vocab_size": s.vocab,
    }
    if s.experts:
        made |= {"num_local_experts": s.experts, "interleave_moe_layer_step": 1}
        made |= {"num_experts_per_tok": 1, "intermediate_size_mlp": 2 * s.intermediate}
    return made


def make(out: Path, shapes: Shapes, *, sparse: bool = False, shard_bytes: int = SHARD_BYTES) -> int:
    """Write the checkpoint into the new folder `out`; returns the bytes of its tensors."""
    runs: list[Specs] = [{}]
    room = shard_bytes
    for name, spec in tensors(shapes):
        if runs[-1] and spec.nbytes > room:
            runs.append({})
            room = shard_bytes
        runs[-1][name] = spec
        room -= spec.nbytes
    out.mkdir(parents=True)
    names = [f"model-{i:05d}-of-{len(runs):05d}.safetensors" for i in range(1, len(runs) + 1)]
    shards = dict(zip(names if len(runs) > 1 else ["model.safetensors"], runs, strict=True))
    for seed, (file, specs) in enumerate(shards.items()):
        write_shard(out / file, specs, None if sparse else seed)
    write_index(out, shards)
    (out / "config.json").write_text(json.dumps(config(shapes), indent=2))
    return sum(spec.nbytes for specs in runs for spec in specs.values())


def write_shard(file: Path, specs: Specs, seed: int | None) -> None:
    """One file of normally distributed weights, or of holes where there is no seed."""
    head, _ = lay_out(specs, {"format": "pt"})
    with file.open("wb") as handle:
        handle.write(head)
        if seed is None:
            handle.truncate(len(head) + sum(spec.nbytes for spec in specs.values()))
            return
        import torch

        generator = torch.Generator().manual_seed(seed)
        pool = torch.randn(1 << 24, generator=generator).mul_(0.02).bfloat16().view(torch.uint8)
        left, start = sum(spec.nbytes for spec in specs.values()), 0
        while left:
            # another part of the pool each time, so that no two tensors are alike
            start = (start + 2 * 7919) % pool.numel()
            step = min(left, pool.numel() - start)
            handle.write(pool[start : start + step].numpy().data)
            left -= step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", choices=SHAPES, default="llama-8b")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--sparse", action="store_true", help="files of zeros that take no disk")
    given = parser.parse_args()
    shapes = SHAPES[given.shapes]
    if given.layers is not None:
        shapes = replace(shapes, layers=given.layers)
    print(f"{given.out}: {make(given.out, shapes, sparse=given.sparse):,} bytes")


if __name__ == "__main__":
    main()
