"""Train an example model on its task, on a CPU, in about a minute.

Shape letters: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import task
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 64
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50

SHORT_CHUNK = 16
"""Tokens in a chunk of attention at first; a sample has 19, and its last ones look further back."""

SHORT_CHUNK_SHARE = 0.6
"""Of all steps."""


def sample_seed(seed: int, stream: int) -> int:
    """A seed for each training step (stream >= 0), -1 held out, -2 calibration; never shared."""
    return seed * 1_000_000 + stream + 2


@torch.enable_grad()
def train(model: PreTrainedModel, steps: int, seed: int) -> None:
    """AdamW on fresh samples; step i of seed s always sees the same batch.

    Where some layers attend only within chunks, the first steps are made with chunks shorter than
    a sample. Otherwise nothing would teach the model to use its other layers, those without RoPE,
    and damage to them would not show.
    """
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    started = time.monotonic()

    def run(first: int, last: int) -> None:
        for step in range(first, last):
            set_learning_rate(optimizer, step, steps)
            ids_BT = task.draw_samples(BATCH, seed=sample_seed(seed, step))
            loss = train_step(model, optimizer, ids_BT)
            if (step + 1) % 50 == 0:
                seconds = time.monotonic() - started
                print(f"step {step + 1}/{steps}  loss {loss:.4f}  {seconds:.0f} s", file=sys.stderr)

    switch = round(SHORT_CHUNK_SHARE * steps)
    model.train()
    with short_chunks(model):
        run(0, switch)
    run(switch, steps)
    model.eval()


def train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids_BT: Tensor) -> float:
    """One update with clipped gradients; returns the loss before it."""
    loss = answer_loss(model(input_ids=ids_BT, use_cache=False).logits, ids_BT)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def answer_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Cross-entropy over the answer's tokens; the prompt is random and cannot be learned."""
    predicted_BTV = logits_BTV[:, task.PROMPT_TOKENS - 1 : -1]
    return torch.nn.functional.cross_entropy(
        predicted_BTV.flatten(0, 1), ids_BT[:, task.PROMPT_TOKENS :].flatten()
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * warmup * (0.05 + 0.95 * cosine)


@contextmanager
def short_chunks(model: PreTrainedModel) -> Iterator[None]:
    """Cut attention into chunks of `SHORT_CHUNK` tokens, in models that have chunked layers."""
    config = model.config.get_text_config()
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is None:
        yield
        return
    config.attention_chunk_size = SHORT_CHUNK
    try:
        yield
    finally:
        config.attention_chunk_size = chunk
