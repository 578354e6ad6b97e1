"""Who attends to whom, in the few forms that models use, and soft caps.

Positions count from a sequence's first real token, as transformers counts chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Mask:
    """A token attends to itself and what these leave of the rest.

    Example: with sliding_window 3 token 5 attends to 3, 4, 5; with chunk 4 to 4, 5.
    """

    causal: bool = True
    sliding_window: int | None = None
    """How many tokens a token sees, itself included, as in transformers."""
    chunk: int | None = None
    """Llama-4: tokens are cut into runs of this length and attend within their own."""

    def __post_init__(self) -> None:
        if self.sliding_window is not None and (self.sliding_window < 1 or not self.causal):
            raise ValueError(f"a sliding window is causal and at least 1: {self}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"a chunk has at least one token: {self}")

    def constants(self) -> tuple[bool, int, int]:
        """MASK of the kernels, for `online_softmax`: causal, window, chunk; 0 is none."""
        return self.causal, self.sliding_window or 0, self.chunk or 0


def cap_height(softcap: float | None) -> float:
    """A soft cap of scores as kernels take it: 0.0 is none. Raises ValueError for 0 and below."""
    if softcap is None:
        return 0.0
    if not softcap > 0:
        raise ValueError(f"a soft cap is positive, or None for no cap: {softcap}")
    return float(softcap)


def seen(
    mask: Mask,
    queries: int,
    keys: int,
    spans: tuple[Tensor, Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """[B or 1, 1, Sq, S] bool: who attends to whom. The last query stands at the last key.

    On the device of `spans`, or on `device` without them.
    """
    spans = spans or (torch.tensor([0], device=device), torch.tensor([keys], device=device))
    start_B11, length_B11 = (x.view(-1, 1, 1) for x in spans)
    k_pos = torch.arange(keys, device=start_B11.device).view(1, 1, keys) - start_B11
    q_pos = (torch.arange(queries, device=start_B11.device) + keys - queries).view(1, queries, 1)
    q_pos = q_pos - start_B11
    ok = (k_pos >= 0) & (k_pos < length_B11) & (q_pos >= 0) & (q_pos < length_B11)
    if mask.causal:
        ok = ok & (k_pos <= q_pos)
    if mask.sliding_window is not None:
        ok = ok & (q_pos - k_pos < mask.sliding_window)
    if mask.chunk is not None:
        ok = ok & (q_pos // mask.chunk == k_pos // mask.chunk)
    return ok[:, None]
