"""Codes that were chosen by what a Linear is given: are they choices, or damage?

A choice may be as far from the weight as it likes, because other columns make up for it: its error
pulls against theirs, and the second moments H of the inputs say so. Nothing makes up for damage.
So the errors e of some columns are damage where taking them back would spare the outputs about all
that they cost by themselves, 2 e H (w - q)^T - e H e^T against e H e^T, and where that is much of
what the columns give to the outputs, w H w^T. H may be of other text than the codes were chosen by.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ckptq.printable import listed
from ckptq.quantize.weight_scheme import WeightScheme
from ckptq.verify.roundtrip import nearest

if TYPE_CHECKING:
    from torch import Tensor

DAMPENING = 0.01
"""Of the mean second moment, as GPTQ's: columns that are never used tell nothing."""

UNANSWERED = 0.6
"""Taking damage back spares this share of what it costs, and more; taking a choice back costs."""

LOST_GROUP, LOST_GROUP_REFITTED, LOST_COLUMN, LOST_ROW = 2.0, 0.8, 1.4, 0.5
"""Noise over signal, of a group where each column counts as much as its inputs are large. In
results of SmolLM2 that nothing had damaged these were 0.64, 0.46, 0.89 and 0.10 at most."""

FOREMOST = 4.0
"""Times the median: columns, and groups of one span of columns, that cost less are given up by
choice, because little goes into them."""

WIDEST = 128
"""Columns of a group, where scales are of whole rows."""


def damage(
    w_RC: Tensor,
    held: Mapping[str, Tensor],
    scheme: WeightScheme,
    hessian_CC: Tensor,
    *,
    refitted: bool,
    rows: bool = True,
) -> list[str]:
    """What is no choice among the codes of these rows, in words: groups, columns, rows.

    `hessian_CC` is changed in place. `refitted` says that codes were chosen several times over,
    which leaves fewer of them far from their weights. Without `rows` a row may be given up.
    """
    q_RC = nearest.weights(held, scheme, w_RC.shape[1]).to(hessian_CC.device)
    w_RC = w_RC.float().to(hessian_CC.device)
    diagonal_C = hessian_CC.diagonal()
    diagonal_C.add_(DAMPENING * diagonal_C.mean())
    error_RC = w_RC - q_RC
    pull_RC = error_RC @ hessian_CC
    pulled_RC = error_RC * pull_RC
    noise_RC, signal_RC = (x_RC.square() * diagonal_C for x_RC in (error_RC, w_RC))

    places, count = [], 0
    width, limit = scheme.group_size or WIDEST, LOST_GROUP_REFITTED if refitted else LOST_GROUP
    for start in range(0, len(diagonal_C), width):
        part, count = slice(start, start + width), count + len(w_RC)
        own_R = ((error_RC[:, part] @ hessian_CC[part, part]) * error_RC[:, part]).sum(1)
        alone_R = _alone(own_R, pulled_RC[:, part].sum(1))
        noise_R, signal_R = noise_RC[:, part].sum(1), signal_RC[:, part].sum(1)
        lost_R = alone_R & _foremost(noise_R) & (noise_R >= limit * signal_R)
        places += [f"row {row} from column {start}" for row in _where(lost_R)]
    noise_C, signal_C = noise_RC.sum(0), signal_RC.sum(0)
    alone_C = _alone(noise_C, pulled_RC.sum(0))
    lost_C = alone_C & _foremost(noise_C) & (noise_C >= LOST_COLUMN * signal_C)
    signal_R = ((w_RC @ hessian_CC) * w_RC).sum(1)
    lost_R = (pulled_RC.sum(1) >= LOST_ROW * signal_R) & rows
    return [
        *_said(places, count, "groups"),
        *_said(_where(lost_C), len(lost_C), "columns"),
        *_said(_where(lost_R & (signal_R > 0)), len(lost_R), "rows"),
    ]


def _alone(own: Tensor, pulled: Tensor) -> Tensor:
    """Whether nothing makes up for errors that cost `own` by themselves."""
    return (2 * pulled - own >= UNANSWERED * own) & (own > 0)


def _foremost(noise: Tensor) -> Tensor:
    return noise >= FOREMOST * noise.median()


def _where(lost: Tensor) -> list[int]:
    found: list[int] = lost.nonzero().flatten().tolist()
    return found


def _said(places: Sequence[object], count: int, what: str) -> list[str]:
    return [f"{len(places)} of {count:,} {what} ({listed(places)})"] if places else []
