"""What the rotation gains a KV cache of few bits, with and without outlier channels.

    python benchmarks/bench_rotation.py MODEL [--report FILE]

MODEL is a Llama (no norm between k_proj and the cache), for example one that
`examples/make_checkpoint.py --family llama --no-outliers` has made. Its copy with outliers computes
the same: two channels of every key head, and one of every value head, are multiplied by a power of
two that is divided out of the query, or out of the output projection. RoPE turns channels i and
i + D/2 into one another, so keys' channels come in pairs.

Shape letters: D head dimension.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import transformers

from ckptq.checkpoint.open import open_checkpoint
from ckptq.evaluate.caches.kv_cache import ROTATED, UNROTATED
from ckptq.evaluate.result import Evaluation
from ckptq.evaluate.run import evaluate
from ckptq.evaluate.text import Text, read_questions, text_of

FACTORS = (1, 8, 64)
CHANNEL = 5
FORMATS = ("int8-per-token-head", "int4-per-token-head", "int2-per-token-head")
CACHES = ("bf16", *(f"{name}{suffix}" for name in FORMATS for suffix in ("", UNROTATED, ROTATED)))


@torch.no_grad()
def with_outliers(model: Path, factor: int, out: Path) -> Path:
    """A copy whose keys and values have channels `factor` times as large, and the same logits."""
    llama = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    for layer in llama.model.layers:
        attention = layer.self_attn
        D, groups = attention.head_dim, attention.num_key_value_groups
        pair = [CHANNEL, CHANNEL + D // 2]
        attention.k_proj.weight.unflatten(0, (-1, D))[:, pair] *= factor
        attention.q_proj.weight.unflatten(0, (-1, D))[:, pair] /= factor
        attention.v_proj.weight.unflatten(0, (-1, D))[:, CHANNEL] *= factor
        read = attention.o_proj.weight.unflatten(1, (-1, D))
        assert read.shape[1] == attention.k_proj.weight.shape[0] // D * groups
        read[:, :, CHANNEL] /= factor
    llama.save_pretrained(out)
    return out


def measured(model: Path, text: Text) -> Evaluation:
    return evaluate(open_checkpoint(model), text, caches=CACHES, batch_size=64)


def rows(found: Evaluation, factor: int) -> list[str]:
    """A line of the table for each cache: outliers, cache, KL, agreement, exact match."""
    return [
        f"| {factor}x | `{row.kv_cache}` | {row.measures.kl:.5f} | "
        f"{row.measures.agreement:.1%} | {row.measures.accuracy or 0:.1%} |"
        for row in found.rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--report", type=Path, help="write the table there as well")
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    text = text_of(None, read_questions(asked.model / "task.jsonl", asked.model), "task.jsonl")
    lines = ["| outliers | cache | KL | agreement | exact |", "|---|---|---:|---:|---:|"]
    for factor in FACTORS:
        with tempfile.TemporaryDirectory() as folder:
            lines += rows(measured(with_outliers(asked.model, factor, Path(folder)), text), factor)
    print("\n".join(lines))
    if asked.report is not None:
        asked.report.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
