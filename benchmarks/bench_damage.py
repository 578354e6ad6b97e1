"""What `verify --data` sees of damage among codes that were chosen by text.

    python benchmarks/bench_damage.py OUT --source MODEL --data TEXT [--samples 8] [--groups 8]

OUT is a `w4a16-g32-gptq` or `-refined` result. In every Linear, groups at random are damaged in one
way at a time, in memory, and verify judges it by TEXT, which should not be the text that the codes
were chosen by: how many of the damaged groups (or pairs of columns) it names, and how many it names
where nothing is damaged.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from measure import machine
from record import Row, add_option, publish
from torch import Tensor

from ckptq.verify import by_text
from ckptq.verify.run import verify

CODE = ["ckptq/verify", "ckptq/forward", "ckptq/gptq"]
GROUP = 32
Place = tuple[int, int]
"""A row and the first column of a group of it."""


def negated(code_RC: Tensor, scale_RG: Tensor, at: Place) -> None:
    scale_RG[at[0], at[1] // GROUP] *= -1


def doubled(code_RC: Tensor, scale_RG: Tensor, at: Place) -> None:
    scale_RG[at[0], at[1] // GROUP] *= 2


def halved(code_RC: Tensor, scale_RG: Tensor, at: Place) -> None:
    scale_RG[at[0], at[1] // GROUP] /= 2


def moved(code_RC: Tensor, scale_RG: Tensor, at: Place) -> None:
    part = code_RC[at[0], at[1] : at[1] + GROUP]
    part.copy_(part.roll(1))


def flipped(code_RC: Tensor, scale_RG: Tensor, at: Place) -> None:
    """The upper bit of a code: it is 8 too large or too small."""
    code = code_RC[at]
    code_RC[at] = code - 8 if code >= 0 else code + 8


def exchanged(code_RC: Tensor, scale_RG: Tensor, at: Place) -> None:
    """Two neighbouring columns, in all rows."""
    code_RC[:, [at[1], at[1] + 1]] = code_RC[:, [at[1] + 1, at[1]]]


WAYS: dict[str, Callable[[Tensor, Tensor, Place], None]] = {
    "codes negated": negated,
    "scale doubled": doubled,
    "scale halved": halved,
    "codes moved on by a column": moved,
    "the upper bit of a code flipped": flipped,
    "two columns exchanged": exchanged,
}


class Tried:
    """In place of verify's `damage`: the same for damaged copies, counted."""

    def __init__(self, groups: int) -> None:
        self._groups, self._draw = groups, torch.Generator().manual_seed(0)
        self._damage = by_text.damage
        self.seen, self.done = Counter[str](), Counter[str]()

    def __call__(self, w_RC: Tensor, held: dict[str, Tensor], *rest: Any, **more: Any) -> list[str]:
        scheme, hessian_CC = rest
        said = self._damage(w_RC, held, scheme, hessian_CC.clone(), **more)
        self._count("nothing", said, 1)
        R, C = w_RC.shape
        for name, way in WAYS.items():
            count = 1 if way is exchanged else self._groups
            code_RC = unpack_from_int32(held["weight_packed"], 4, torch.Size((R, C)))
            scale_RG = held["weight_scale"].clone()
            for cell in torch.randperm(R * C // GROUP, generator=self._draw)[:count].tolist():
                way(code_RC, scale_RG, (cell * GROUP // C, cell * GROUP % C))
            changed = {"weight_packed": pack_to_int32(code_RC, 4), "weight_scale": scale_RG}
            found = self._damage(w_RC, held | changed, scheme, hessian_CC.clone(), **more)
            self._count(name, found, 2 if way is exchanged else count)
        return said

    def _count(self, name: str, said: list[str], wanted: int) -> None:
        kind = "columns" if name == "two columns exchanged" else "groups"
        numbers = [re.match(r"(\d+) of [\d,]+ (\w+)", each) for each in said]
        self.seen[name] += sum(int(n[1]) for n in numbers if n and n[2] == kind)
        self.done[name] += wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--groups", type=int, default=8, help="of each Linear")
    parser.add_argument("--name", default="damage", help="of the record")
    add_option(parser)
    given = parser.parse_args()
    by_text.damage = tried = Tried(given.groups)  # type: ignore[assignment]
    verify(given.out, given.source, text=given.data, samples=given.samples)
    rows: list[Row] = [
        {"damage": name, "seen": tried.seen[name], "of": count, "%": 100 * tried.seen[name] / count}
        for name, count in tried.done.items()
    ]
    what = f"What verify sees by text, {given.out.name}"
    publish(given.name, what, rows, code=CODE, machine=machine(), folder=given.record)


if __name__ == "__main__":
    main()
