"""Codes and scales made better after GPTQ: coordinate descent on what a Linear does to its inputs.

GPTQ passes the error of a column on to those that follow, and never comes back to one; scales it
takes as they are. Here every group of columns is visited again, several times over: its scale
becomes the one with the least error sum of (w - q) H (w - q)^T for its codes, by least squares, and
then each code the best for all other codes. So the error never grows.

Shape letters: B Linears of one shape, R rows, C columns, G groups of a row, L columns of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ckptq.gptq.choose import Choice, Chosen
from ckptq.gptq.graph import Graph
from ckptq.quantize.codes import round_to_numbers
from ckptq.quantize.formats import Scratch
from ckptq.quantize.regrid import storable, with_divisors
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.recipes.scheme import Gptq

if TYPE_CHECKING:
    from torch import Tensor

STRIDE = 128
"""Columns after which a change is passed on to all others."""


def descend(
    choices: Sequence[Choice], chosen: Sequence[Chosen], scheme: WeightScheme, how: Gptq
) -> list[Chosen]:
    """What GPTQ made of each choice, made better; as it is where GPTQ could not solve it.

    All have the same shape and scheme, whose scales belong to one row. Zero points and global
    scales stay.
    """
    made = list(chosen)
    solved = [number for number, each in enumerate(chosen) if each.solved]
    if solved and how.descents:
        starts = [(choices[number], chosen[number].weight_RC) for number in solved]
        for number, better in zip(solved, _descended(starts, scheme, how), strict=True):
            made[number] = better
    return made


def _descended(
    starts: Sequence[tuple[Choice, Tensor]], scheme: WeightScheme, how: Gptq
) -> list[Chosen]:
    work = _Descent(starts, scheme, how.dampening_frac)
    for _ in range(how.descents):
        work.settle()  # sums in float32 drift
        for group in range(work.groups):
            work.refit(group)
            work.recode(group)
    found = work.number_BRC * work.over_columns(work.scale_BRG)
    return [
        Chosen(q_RC, True, with_divisors(start.on, scale_RG))
        for (start, _), q_RC, scale_RG in zip(starts, found, work.scale_BRG, strict=True)
    ]


class _Descent:
    """Linears of one shape at work."""

    def __init__(
        self, starts: Sequence[tuple[Choice, Tensor]], scheme: WeightScheme, frac: float
    ) -> None:
        self._grids, self._scheme = [each.on for each, _ in starts], scheme
        self._w_BRC = torch.stack([each.w_RC.float() for each, _ in starts])
        self._hessian_BCC = _damped(torch.stack([each.hessian_CC for each, _ in starts]), frac)
        self._scratch = Scratch(self._w_BRC.device)
        self.scale_BRG = torch.stack([on.divisor.float() for on in self._grids])
        zeros = [on.zero_point for on in self._grids if on.zero_point is not None]
        self._zero_BRG = torch.stack(zeros).float() if zeros else None
        C = self._w_BRC.shape[2]
        self.groups = self.scale_BRG.shape[2]
        self._width = C // self.groups
        chosen_BRC = torch.stack([chosen_RC.float() for _, chosen_RC in starts])
        zero_BRC = None if self._zero_BRG is None else self.over_columns(self._zero_BRG)
        self.number_BRC = self._nearest(chosen_BRC / self.over_columns(self.scale_BRG), zero_BRC)
        """What the codes stand for, in units of their scales."""
        self._graphs: dict[int, Graph] = {}

    def over_columns(self, each_BRG: Tensor) -> Tensor:
        return each_BRG.repeat_interleave(self._width, dim=2)

    def settle(self) -> None:
        """How the error pulls at each weight: minus half its slope."""
        wrong_BRC = self._w_BRC - self.number_BRC * self.over_columns(self.scale_BRG)
        self._pull_BRC = wrong_BRC @ self._hessian_BCC

    def refit(self, group: int) -> None:
        """The scale of a group by least squares, as near to it as can be stored, if that helps."""
        columns = self._columns(group)
        number_BRL, old_BR = self.number_BRC[..., columns], self.scale_BRG[..., group]
        own_BR = (number_BRL @ self._hessian_BCC[:, columns, columns] * number_BRL).sum(-1)
        pull_BR = (self._pull_BRC[..., columns] * number_BRL).sum(-1)
        best_BR = torch.where(own_BR > 0, old_BR + pull_BR / own_BR, old_BR)
        new_BR = self._storable(best_BR, old_BR)
        step_BR = new_BR - old_BR
        helps_BR = step_BR * (2 * pull_BR - step_BR * own_BR) > 0
        self.scale_BRG[..., group] = torch.where(helps_BR, new_BR, old_BR)
        self._pass_on(columns, torch.where(helps_BR, step_BR, 0)[..., None] * number_BRL)

    def recode(self, group: int) -> None:
        """Each code of a group in turn: the one with the least error, as all others are."""
        whole = self._columns(group)
        for start in range(whole.start, whole.stop, STRIDE):
            columns = slice(start, min(start + STRIDE, whole.stop))
            scale_BR = self.scale_BRG[..., group]
            given = [self._hessian_BCC[:, columns, columns], self._pull_BRC[..., columns]]
            given += [self.number_BRC[..., columns], scale_BR]
            if self._zero_BRG is not None:
                given.append(self._zero_BRG[..., group])
            new_BRL = self._recode(columns.stop - columns.start)(*given)
            moved_BRL = new_BRL - self.number_BRC[..., columns]
            self.number_BRC[..., columns] = new_BRL
            self._pass_on(columns, moved_BRL * scale_BR[..., None])

    def _recode(self, count: int) -> Callable[..., Tensor]:
        """`_recoded` for so many columns; on a GPU as one launch."""
        if self._w_BRC.device.type != "cuda":
            return self._recoded
        if count not in self._graphs:
            self._graphs[count] = Graph(self._recoded)
        return self._graphs[count]

    def _recoded(
        self,
        hessian_BLL: Tensor,
        pull_BRL: Tensor,
        number_BRL: Tensor,
        scale_BR: Tensor,
        zero_BR: Tensor | None = None,
    ) -> Tensor:
        """Columns few enough that a change is passed on among them alone."""
        pull_BRL, number_BRL = pull_BRL.clone(), number_BRL.clone()
        for at in range(number_BRL.shape[2]):
            number_BR = number_BRL[..., at]
            lacking_BR = pull_BRL[..., at] / hessian_BLL[:, at, at, None]
            new_BR = self._nearest(number_BR + lacking_BR / scale_BR, zero_BR)
            step_BR = (new_BR - number_BR) * scale_BR
            number_BRL[..., at] = new_BR
            pull_BRL -= step_BR[..., None] * hessian_BLL[:, None, at]
        return number_BRL

    def _nearest(self, x: Tensor, zero_point: Tensor | None) -> Tensor:
        return round_to_numbers(x, zero_point, self._scheme, self._scratch)

    def _pass_on(self, columns: slice, moved_BRL: Tensor) -> None:
        self._pull_BRC -= moved_BRL @ self._hessian_BCC[:, columns]

    def _storable(self, best_BR: Tensor, old_BR: Tensor) -> Tensor:
        """The stored scales nearest to these; the old ones where that has another sign, or none."""
        near = [storable(best_R, on) for best_R, on in zip(best_BR, self._grids, strict=True)]
        near_BR = torch.stack(near)
        return torch.where((near_BR * old_BR > 0) & near_BR.isfinite(), near_BR, old_BR)

    def _columns(self, group: int) -> slice:
        return slice(group * self._width, (group + 1) * self._width)


def _damped(hessian_BCC: Tensor, dampening_frac: float) -> Tensor:
    """In place, as GPTQ solves with it: with 1 for an input that is always zero."""
    diagonal_BC = hessian_BCC.diagonal(dim1=1, dim2=2)
    diagonal_BC.masked_fill_(diagonal_BC == 0, 1)
    diagonal_BC.add_(dampening_frac * diagonal_BC.mean(1, keepdim=True))
    return hessian_BCC
