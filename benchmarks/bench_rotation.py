"""What the rotation gains a KV cache of few bits, with and without outlier channels.

    python benchmarks/bench_rotation.py MODEL [--record FOLDER]

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
from measure import machine
from record import Row, Value, add_option, publish

from ckptq.checkpoint.open import open_checkpoint
from ckptq.evaluate.caches.kv_cache import ROTATED, UNROTATED
from ckptq.evaluate.result import Evaluation
from ckptq.evaluate.run import evaluate
from ckptq.evaluate.text import Text, read_questions, text_of

CODE = ("ckptq/evaluate", "ckptq/forward", "ckptq/kernels/token_head")
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


def figures(found: Evaluation, factor: int) -> dict[str, dict[str, Value]]:
    """Cache -> what it does to a model with such outliers."""
    return {
        row.kv_cache: {
            f"{factor}x: KL": row.measures.kl,
            f"{factor}x: exact": 100 * (row.measures.accuracy or 0),
        }
        for row in found.rows
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    add_option(parser)
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    text = text_of(None, read_questions(asked.model / "task.jsonl", asked.model), "task.jsonl")
    rows: dict[str, dict[str, Value]] = {cache: {"cache": cache} for cache in CACHES}
    for factor in FACTORS:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(with_outliers(asked.model, factor, Path(folder)), text)
        for cache, more in figures(found, factor).items():
            rows[cache] |= more
    what = "What the rotation gains a KV cache: outliers of 1, 8 and 64 times"
    table: list[Row] = list(rows.values())
    publish("rotation", what, table, code=CODE, machine=machine(), folder=asked.record)


if __name__ == "__main__":
    main()
