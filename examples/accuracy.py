"""Exact match of checkpoints on the examples' task, in transformers, as a table.

    python examples/accuracy.py CHECKPOINT [CHECKPOINT ...]

The first is the reference. transformers applies the FP8 scales of q, k and v as an engine would.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))

import task

SAMPLES, SEED = 512, 999_983
"""A seed that neither training nor calibration uses."""


def accuracy(checkpoint: str) -> float:
    """Share of samples answered without a mistake."""
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    model_class = getattr(transformers, config.architectures[0])
    model = model_class.from_pretrained(checkpoint, dtype="auto", attn_implementation="sdpa")
    return task.exact_match(model, task.draw_samples(SAMPLES, seed=SEED))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    for checkpoint in sys.argv[1:]:
        print(f"{checkpoint:40} {accuracy(checkpoint):7.1%}")
