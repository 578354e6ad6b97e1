"""Write a model with random weights that differ: by tails, rows, columns, blocks, Linears, experts.

    python benchmarks/uneven.py OUT [--experts]

What a sample of rows misses shows on it more than on trained models.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

SIZES = {
    "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    "intermediate_size": 8192, "vocab_size": 64,
}  # fmt: skip
EXPERTS = {"num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 768}


def fill(w_RC: Tensor, seed: torch.Generator) -> None:
    R, C = w_RC.shape

    def spread(sigma: float, *shape: int) -> Tensor:
        return torch.exp(sigma * torch.randn(*shape, generator=seed))

    x_RC = torch.randn(R, C, generator=seed)
    x_RC = x_RC.sign() * x_RC.abs() ** (0.8 + 1.2 * torch.rand(R, 1, generator=seed))
    x_RC *= spread(0.7, R, 1) * spread(0.5, 1, C)
    x_RC *= spread(0.7, -(-R // 128), 1).repeat_interleave(128, 0)[:R]
    w_RC.copy_(0.02 * spread(1, 1) * x_RC)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--experts", action="store_true")
    asked = parser.parse_args()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        if asked.experts:
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS, num_hidden_layers=3))
        else:
            model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=4))
    model, seed = model.to_empty(device="cpu"), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
                continue
            for w_RC in parameter if parameter.dim() == 3 else [parameter]:
                fill(w_RC, seed)
    model.save_pretrained(asked.out)


if __name__ == "__main__":
    main()
