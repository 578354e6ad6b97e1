"""Train a small model on a real task in about a minute, and save it as Hugging Face would.

    python examples/make_checkpoint.py --family llama OUT

The result is a folder like one from the hub: config, tokenizer with chat template, sharded bf16
safetensors with an index, generation config. Beside them lie `task.jsonl` (held-out questions) and
`calibration.txt` (text of the same task). Ends by printing the share of held-out questions answered
without a mistake, in bf16 and with FP8 attention under right and wrong scales.

Shape letters: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

sys.path.insert(0, str(Path(__file__).parent))

import architectures
import attention_fp8
import outliers
import task
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 128
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
MAX_SHARD = "220KB"
"""So small that there are several shards, and q, k and v of some layers do not share one."""

THREADS = 2
"""Fixed, because the order of torch's sums and so the trained weights depend on it."""

HELD_OUT, CALIBRATION = 512, 128
"""Samples that accuracy is measured on, and samples for scales; the seeds follow the training's."""


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return LEARNING_RATE * warmup * (0.05 + 0.95 * cosine)


def answer_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Cross-entropy over the answer's tokens; the prompt is random and cannot be learned."""
    predicted_BTV = logits_BTV[:, task.PROMPT_TOKENS - 1 : -1]
    return torch.nn.functional.cross_entropy(
        predicted_BTV.flatten(0, 1), ids_BT[:, task.PROMPT_TOKENS :].flatten()
    )


def train(model: PreTrainedModel, steps: int, seed: int) -> None:
    """AdamW on fresh samples; step i of seed s always sees the same batch."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    started = time.monotonic()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        ids_BT = task.draw_samples(BATCH, seed=sample_seed(seed, step))
        loss = answer_loss(model(input_ids=ids_BT, use_cache=False).logits, ids_BT)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - started
            print(f"step {step + 1}/{steps}  loss {loss:.4f}  {seconds:.0f} s", file=sys.stderr)
    model.eval()


def sample_seed(seed: int, stream: int) -> int:
    """A seed for each training step (stream >= 0), -1 held out, -2 calibration; never shared."""
    return seed * 1_000_000 + stream + 2


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


def save(model: PreTrainedModel, out: Path, held_out_BT: Tensor, calibration_BT: Tensor) -> None:
    """Write the checkpoint, its tokenizer and the task's text."""
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = task.NUM_SYMBOLS + 1
    model.save_pretrained(out, max_shard_size=MAX_SHARD)
    task.build_tokenizer().save_pretrained(out)
    task.write_task(out, held_out_BT)
    task.write_calibration(out, calibration_BT)


def make_checkpoint(
    out: Path, family: str, *, steps: int | None, seed: int, with_outliers: bool
) -> dict[str, float]:
    """Train, cast to bf16, spread the heads, save to `out`; returns the accuracy table."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    example = architectures.EXAMPLES[family]
    model = architectures.build_model(example.config())
    train(model, example.steps if steps is None else steps, seed)

    held_out_BT = task.draw_samples(HELD_OUT, sample_seed(seed, -1))
    calibration_BT = task.draw_samples(CALIBRATION, sample_seed(seed, -2))
    model.to(torch.bfloat16)
    if with_outliers:
        outliers.spread_heads(model, calibration_BT)
    save(model, out, held_out_BT, calibration_BT)
    return accuracy_table(model, held_out_BT, calibration_BT)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train and save a small example checkpoint.")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--family", choices=list(architectures.EXAMPLES), default="llama")
    parser.add_argument("--steps", type=int, help="training steps (default: the family's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-outliers",
        action="store_true",
        help="leave the heads as trained, alike in size",
    )
    parsed = parser.parse_args(arguments)
    if parsed.out.exists():
        parser.error(f"{parsed.out} already exists")
    return parsed


def main() -> None:
    arguments = parse_arguments()
    table = make_checkpoint(
        arguments.out,
        arguments.family,
        steps=arguments.steps,
        seed=arguments.seed,
        with_outliers=not arguments.no_outliers,
    )
    print(f"saved {arguments.out}; exact match on {HELD_OUT} held-out questions:")
    for name, accuracy in table.items():
        print(f"  {accuracy:6.3f}  {name}")


if __name__ == "__main__":
    main()
