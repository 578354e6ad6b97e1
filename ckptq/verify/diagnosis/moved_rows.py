"""Rows of the source in other places: reordered, or mixed with a sibling's.

Rows are recognized by direction, so that wrong row scales do not hide them.
Shape letters: R rows, K columns of a sample, N rows that are looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

LOOKED_UP = 64
"""Rows, evenly spaced: enough to distinguish a pattern from an accident."""

FIRST = 16
"""Rows at the top besides: they show the step of an order."""

ALIKE = 0.95
"""Cosine; 4-bit codes keep 0.99, and rows of any weight are near 0."""

KNOWN, MOVED = 0.9, 0.1
"""Share of the rows that must be recognized, and of them that must stand elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MovedRows:
    """(row, whose row stands there, which of its rows, whether with the other sign)."""

    places: tuple[tuple[int, str, int, bool], ...]

    def said(self, mine: str) -> str:
        """ "row 1 holds 2, row 2 holds 4 of up_proj"."""
        if all(row == other and name == mine for row, name, other, _ in self.places):
            return "the source's rows with the other sign"
        moved = [p for p in self.places if (p[0], mine) != (p[2], p[1])]
        return ", ".join(
            f"row {row} holds {other}" + ("" if name == mine else f" of {name.rpartition('.')[2]}")
            for row, name, other, _ in moved[:6]
        )


def moved_rows(found_RK: Tensor, mine: str, sources: Mapping[str, Tensor]) -> MovedRows | None:
    """Where the source's rows went. `sources`: Linear -> its source [R, K]; `mine` is among them.

    None where they are not recognized, or all stand in their place.
    """
    spread = torch.linspace(0, len(found_RK) - 1, min(LOOKED_UP, len(found_RK))).long()
    rows = torch.cat((torch.arange(min(FIRST, len(found_RK))), spread)).unique()
    found_NK = normalize(found_RK[rows].nan_to_num(), dim=1)
    best_N = torch.zeros(len(rows))
    owner, at = [mine] * len(rows), rows.tolist()
    for name, source_RK in sources.items():
        cosine_NR = found_NK @ normalize(source_RK, dim=1).t()
        largest_N, index_N = cosine_NR.abs().max(1)
        for n in (largest_N > best_N.abs()).nonzero().flatten().tolist():
            owner[n], at[n] = name, int(index_N[n])
            best_N[n] = cosine_NR[n, index_N[n]]
    known = (best_N.abs() > ALIKE).tolist()
    places = tuple(
        (row, owner[n], at[n], bool(best_N[n] < 0))
        for n, row in enumerate(rows.tolist())
        if known[n]
    )
    away = sum((row, mine) != (other, name) or turned for row, name, other, turned in places)
    if len(places) < KNOWN * len(rows) or away < MOVED * len(rows):
        return None
    return MovedRows(places=places)
