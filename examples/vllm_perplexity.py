"""Perplexity of a checkpoint in vLLM, on given text; vLLM's own Python runs it.

    VLLM_PYTHON examples/vllm_perplexity.py CHECKPOINT held-out.jsonl [--seq-len 512]

The last line printed is one object of JSON. On a CPU vLLM has no product for weight-only NVFP4, and
only torch's slow reference for FP8. There the product alone is done here, in float32 (`stand_in`
names it): vLLM still builds the layers, loads them, and quantizes what goes into them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

# One process, so that an error in the engine surfaces here; 1 GiB of cache is plenty. By default
# vLLM's CPU product of INT4 weights rounds activations to INT8, which no W4A16 scheme asks for.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes that three bits of NVFP4 stand for; the fourth is the sign."""


def read_lines(checkpoint: Path, data: Path, seq_len: int) -> list[list[int]]:
    """Token ids of every row, cut at `seq_len`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    rows = (json.loads(row)["text"] for row in data.read_text().splitlines())
    return [tokenizer.encode(row).ids[:seq_len] for row in rows]


def perplexity(checkpoint: Path, lines: list[list[int]]) -> float:
    """Of every token but the first of a line."""
    import vllm

    engine = vllm.LLM(
        model=str(checkpoint),
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=max(map(len, lines)) + 1,
        max_num_seqs=4,
    )
    wanted = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": line} for line in lines]
    outputs = engine.generate(prompts, wanted, use_tqdm=False)
    losses = [
        -output.prompt_logprobs[at][line[at]].logprob
        for line, output in zip(lines, outputs, strict=True)
        for at in range(1, len(line))
    ]
    return math.exp(sum(losses) / len(losses))


def stand_in(checkpoint: Path) -> str | None:
    """Give vLLM the product that it lacks on this machine, and say which; None where it has it."""
    from vllm.platforms import current_platform

    config = json.loads((checkpoint / "config.json").read_text())
    stored = config.get("quantization_config", {}).get("format", "")
    if not current_platform.is_cpu():
        return None
    if stored == "nvfp4-pack-quantized":
        multiply_nvfp4()
        return "NVFP4 product"
    if stored == "float-quantized":
        multiply_fp8()
        return "FP8 product"
    return None


def multiply_fp8() -> None:
    """The same sums as torch's reference, hundreds of times as fast."""
    import torch

    def product(a, b, scale_a, scale_b, bias=None, out_dtype=None):
        scaled = (a.float() @ b.float()) * scale_a * scale_b
        return (scaled if bias is None else scaled + bias).to(out_dtype)

    torch._scaled_mm = product


def multiply_nvfp4() -> None:
    """Weights are decoded once, after vLLM has loaded them."""
    import torch
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w4a4_nvfp4 as scheme,
    )

    class Decoded:
        def input_quant_key(self) -> None:
            return None

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            codes = torch.stack([layer.weight & 15, layer.weight >> 4], dim=-1).flatten(-2).int()
            values = torch.tensor(E2M1)[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
            scales = layer.weight_scale.float().repeat_interleave(16, dim=-1)
            decoded = values * scales * layer.weight_global_scale
            layer.weight = torch.nn.Parameter(decoded.bfloat16(), requires_grad=False)

        def apply_weights(self, layer, x, bias=None):
            return torch.nn.functional.linear(x, layer.weight, bias)

    scheme.init_nvfp4_linear_kernel = lambda use_a16=False: Decoded()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path, help="a .jsonl of text")
    parser.add_argument("--seq-len", type=int, default=512)
    asked = parser.parse_args()
    lines = read_lines(asked.checkpoint, asked.data, asked.seq_len)
    replaced = stand_in(asked.checkpoint)
    print(json.dumps({"perplexity": perplexity(asked.checkpoint, lines), "stand_in": replaced}))


if __name__ == "__main__":
    main()
    # vLLM's threads may outlive it and hang the interpreter's shutdown
    sys.stdout.flush()
    os._exit(0)
