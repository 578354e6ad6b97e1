"""KL of checkpoints against their source in transformers, on given text.

    python examples/kl.py SOURCE CHECKPOINT [CHECKPOINT ...] --data held-out.jsonl

Uses nothing of ckptq: transformers loads each checkpoint and rounds activations, q, k and v as its
config says. The text is a .jsonl of {"text": ...} rows, each cut at `--seq-len` tokens. Prints the
mean of KL(source‖checkpoint) over all tokens but the first of a row, in nats, and the perplexity,
as `ckptq evaluate` does; with `--json` as one object.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

AT_ONCE = 8
"""Tokens whose log-probabilities, float64 over the vocabulary, a CPU's cache holds."""


@dataclass
class Distance:
    """Of a checkpoint from its source: sums over tokens."""

    kl: float = 0.0
    loss: float = 0.0
    tokens: int = 0

    def add(self, source_TV: Tensor, logits_TV: Tensor, targets_T: Tensor) -> None:
        """Fold in one row."""
        parts = (each.split(AT_ONCE) for each in (source_TV, logits_TV, targets_T))
        for source, logits, targets in zip(*parts, strict=True):
            p, q = source.double().log_softmax(-1), logits.double().log_softmax(-1)
            self.kl += float((p.exp() * (p - q)).sum())
            self.loss -= float(q.gather(1, targets[:, None]).sum())
        self.tokens += len(targets_T)

    def means(self) -> dict[str, float]:
        return {"kl": self.kl / self.tokens, "perplexity": math.exp(self.loss / self.tokens)}


def load(checkpoint: str) -> transformers.PreTrainedModel:
    """The model in the dtype of its config. ValueError where a tensor is missing or left over."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype="auto", attn_implementation="sdpa", output_loading_info=True
    )
    if faults := {kind: sorted(map(str, names))[:3] for kind, names in report.items() if names}:
        raise ValueError(f"{checkpoint}: {faults}")
    return model.eval()


def read_lines(source: str, data: Path, seq_len: int) -> list[Tensor]:
    """Token ids of every row."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    rows = (json.loads(row)["text"] for row in data.read_text().splitlines())
    return [torch.tensor(tokenizer(row).input_ids[:seq_len]) for row in rows]


@torch.no_grad()
def logits(model: transformers.PreTrainedModel, lines: Sequence[Tensor]) -> Iterator[Tensor]:
    """Of every line, [T - 1, V]: the last position predicts nothing that is known."""
    for ids_T in lines:
        yield model(input_ids=ids_T[None], use_cache=False).logits[0, :-1]


def distances(source: str, checkpoints: Sequence[str], lines: Sequence[Tensor]) -> dict[str, dict]:
    """By checkpoint; one model beside the source's logits at a time."""
    reference = list(logits(load(source), lines))
    found = {}
    for checkpoint in checkpoints:
        distance = Distance()
        said = logits(load(checkpoint), lines)
        for source_TV, logits_TV, ids_T in zip(reference, said, lines, strict=True):
            distance.add(source_TV, logits_TV, ids_T[1:])
        found[checkpoint] = distance.means()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="a .jsonl of text")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    lines = read_lines(asked.source, asked.data, asked.seq_len)
    found = distances(asked.source, asked.checkpoints, lines)
    if asked.json:
        print(json.dumps(found))
        return
    for checkpoint, each in found.items():
        print(f"{checkpoint:40} KL {each['kl']:.5f}   perplexity {each['perplexity']:.3f}")


if __name__ == "__main__":
    main()
