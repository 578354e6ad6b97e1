"""Train a small model on a real task in about a minute, and save it as Hugging Face would.

    python examples/make_checkpoint.py --family llama OUT

The result is a folder like one from the hub: config, tokenizer with chat template, sharded bf16
safetensors with an index, generation config. Beside them lie `task.jsonl` (held-out questions) and
`calibration.txt` (text of the same task). Ends by printing the share of held-out questions answered
without a mistake, in bf16 and with FP8 attention under right and wrong scales.

Shape letters: B samples, T tokens.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Read when torch is imported. Threads that spin while they wait make training several times
# slower where other work shares the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

sys.path.insert(0, str(Path(__file__).parent))

import architectures
import attention_fp8
import outliers
import task
import training
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_SHARD = "220KB"
"""So small that there are several shards, and q, k and v of some layers do not share one."""

HELD_OUT, CALIBRATION = 512, 128
"""Samples that accuracy is measured on, and samples for scales; the seeds follow the training's."""


def accuracy_table(
    model: PreTrainedModel, held_out_BT: Tensor, calibration_BT: Tensor
) -> dict[str, float]:
    """Exact match in the model's own dtype, and with FP8 attention under right and wrong scales."""
    per_head = attention_fp8.scales_per_head(attention_fp8.head_sizes(model, calibration_BT))
    cases = {
        "one scale per head": per_head,
        "one scale shared by all heads": attention_fp8.shared_by_all_heads(per_head),
        "scales of two heads swapped": attention_fp8.swapped(per_head),
        "scales lost (1.0)": attention_fp8.lost(per_head),
    }
    table = {"bf16": task.exact_match(model, held_out_BT)}
    for name, scales in cases.items():
        with attention_fp8.quantized_attention(model, scales):
            table[f"FP8 attention, {name}"] = task.exact_match(model, held_out_BT)
    return table


def cast_to_bf16(model: PreTrainedModel) -> None:
    """Parameters only: RoPE's frequencies stay fp32, as they are in a model loaded from disk."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def save(model: PreTrainedModel, out: Path, held_out_BT: Tensor, calibration_BT: Tensor) -> None:
    """Write the checkpoint, its tokenizer and the task's text."""
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = task.NUM_SYMBOLS + 1
    model.save_pretrained(out, max_shard_size=MAX_SHARD)
    task.build_tokenizer().save_pretrained(out)
    task.write_task(out, held_out_BT)
    task.write_calibration(out, calibration_BT)


def make_checkpoint(
    out: Path, name: str, *, steps: int | None, seed: int, with_outliers: bool, threads: int
) -> dict[str, float]:
    """Train, cast to bf16, spread the heads, save to `out`; returns the accuracy table.

    `name` is a key of `architectures.EXAMPLES`. Seed and threads decide the weights: the order of
    torch's sums depends on the threads.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    example = architectures.EXAMPLES[name]
    model = architectures.build_model(example.config())
    if with_outliers:
        outliers.separate_key_heads(model)
    training.train(model, example.steps if steps is None else steps, seed)

    held_out_BT = task.draw_samples(HELD_OUT, training.sample_seed(seed, -1))
    calibration_BT = task.draw_samples(CALIBRATION, training.sample_seed(seed, -2))
    cast_to_bf16(model)
    if with_outliers:
        outliers.spread_heads(model, calibration_BT)
    save(model, out, held_out_BT, calibration_BT)
    reloaded = type(model).from_pretrained(out, dtype="auto", attn_implementation="sdpa")
    return accuracy_table(reloaded, held_out_BT, calibration_BT)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train and save a small example checkpoint.")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--family", choices=architectures.FAMILIES, default="llama")
    parser.add_argument(
        "--variant",
        choices=architectures.VARIANTS,
        help="of llama4: without q/k norm (maverick), without experts (guard)",
    )
    parser.add_argument("--steps", type=int, help="training steps (default: the family's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument(
        "--no-outliers",
        action="store_true",
        help="leave the heads as trained, alike in size, as INT8 activations need them in o_proj",
    )
    parsed = parser.parse_args(arguments)
    if parsed.variant and parsed.family != "llama4":
        parser.error(f"--variant {parsed.variant} is of llama4, not of {parsed.family}")
    if parsed.out.exists():
        parser.error(f"{parsed.out} already exists")
    return parsed


def main() -> None:
    arguments = parse_arguments()
    table = make_checkpoint(
        arguments.out,
        f"{arguments.family}-{arguments.variant}" if arguments.variant else arguments.family,
        steps=arguments.steps,
        seed=arguments.seed,
        with_outliers=not arguments.no_outliers,
        threads=arguments.threads,
    )
    print(f"saved {arguments.out}; exact match on {HELD_OUT} held-out questions:")
    for name, accuracy in table.items():
        print(f"  {accuracy:6.3f}  {name}")


if __name__ == "__main__":
    main()
