"""One choice for each set: the least total value within a limit on total weight, exactly.

A multiple-choice knapsack problem. A Lagrange multiplier gives a bound, which rules out almost all
choices; dynamic programming over what is left, without states that another one beats in both,
finds the best. All sums are of integers, so the answer does not depend on their order.

Shape letters: S states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray

Table = Sequence[Sequence[int]]
"""[set][choice]"""

HALVINGS = 100
"""Of the interval in which the multiplier is looked for: beyond what float64 tells apart."""
ROUNDING = 1.0
"""Values are whole numbers, and bounds are float64: what may be lost there, and more."""


def least(values: Table, weights: Table, limit: int) -> tuple[int, ...] | None:
    """The choice of each set, with the least sum of `values` and a sum of `weights` up to `limit`.

    Of equals the one with the least weight, and then the first. None where nothing is light enough.
    Numbers are not negative, and their sums are below 2^50.
    """
    if sum(map(min, weights)) > limit:
        return None
    free = _choices(values, weights, 0.0)
    if _total(weights, free) <= limit:
        return free
    multiplier = _multiplier(values, weights, limit)
    known = _improved(_choices(values, weights, multiplier), values, weights, limit)
    return _dynamic(values, weights, limit, multiplier, _total(values, known))


def _choices(values: Table, weights: Table, multiplier: float) -> tuple[int, ...]:
    """What is best where a unit of weight costs this much; of equals the lightest."""

    def best(v: Sequence[int], w: Sequence[int]) -> int:
        return min((v[c] + multiplier * w[c], w[c], c) for c in range(len(v)))[2]

    return tuple(map(best, values, weights))


def _total(table: Table, chosen: Sequence[int]) -> int:
    return sum(row[c] for row, c in zip(table, chosen, strict=True))


def _multiplier(values: Table, weights: Table, limit: int) -> float:
    """About the least with which the best choices are light enough."""
    low, high = 0.0, 1.0 + max(map(max, values))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _total(weights, _choices(values, weights, middle)) <= limit:
            high = middle
        else:
            low = middle
    return high


def _improved(chosen: Sequence[int], values: Table, weights: Table, limit: int) -> tuple[int, ...]:
    """Other choices, one by one, as long as one of them is better and light enough."""
    found = list(chosen)
    slack = limit - _total(weights, found)
    while True:
        gain, at, c = max(
            (
                (values[i][found[i]] - values[i][c], -i, -c)
                for i in range(len(found))
                for c in range(len(values[i]))
                if weights[i][c] - weights[i][found[i]] <= slack
            ),
        )
        if gain <= 0:
            return tuple(found)
        slack -= weights[-at][-c] - weights[-at][found[-at]]
        found[-at] = -c


@dataclass(frozen=True, slots=True)
class _Level:
    """How each state of a level came about."""

    before_S: ndarray
    choice_S: ndarray


def _dynamic(
    values: Table, weights: Table, limit: int, multiplier: float, known: int
) -> tuple[int, ...]:
    """By dynamic programming, where a solution of value `known` is there.

    A choice costs value + multiplier x weight; what it costs above the least of its set is its
    excess. A solution's value is the bound, its excesses, and the multiplier times what it leaves
    of the limit: excesses of more than `known` - bound rule it out.
    """
    import numpy as np

    costs = [
        [v + multiplier * w for v, w in zip(*rows, strict=True)]
        for rows in zip(values, weights, strict=True)
    ]
    bound = sum(map(min, costs)) - multiplier * limit
    gap = known - bound + ROUNDING
    lightest = [sum(map(min, weights[at:])) for at in range(1, len(weights) + 1)]
    value_S, weight_S = np.zeros(1, np.int64), np.zeros(1, np.int64)
    excess_S = np.zeros(1)
    levels: list[_Level] = []
    for at, cost in enumerate(costs):
        excess = [each - min(cost) for each in cost]
        allowed = [c for c in range(len(cost)) if excess[c] <= gap]
        S = len(value_S)
        before_S, choice_S = np.tile(np.arange(S), len(allowed)), np.repeat(allowed, S)
        value_S = value_S[before_S] + np.asarray(values[at], np.int64)[choice_S]
        weight_S = weight_S[before_S] + np.asarray(weights[at], np.int64)[choice_S]
        excess_S = excess_S[before_S] + np.asarray(excess)[choice_S]
        possible = (weight_S + lightest[at] <= limit) & (excess_S <= gap)
        kept = _unbeaten(value_S, weight_S, np.flatnonzero(possible))
        value_S, weight_S, excess_S = value_S[kept], weight_S[kept], excess_S[kept]
        levels.append(_Level(before_S[kept], choice_S[kept]))
    state = int(np.lexsort((weight_S, value_S))[0])
    chosen: list[int] = []
    for level in reversed(levels):
        chosen.append(int(level.choice_S[state]))
        state = int(level.before_S[state])
    return tuple(reversed(chosen))


def _unbeaten(value_S: ndarray, weight_S: ndarray, among_S: ndarray) -> ndarray:
    """Those of which no other has less of one and not more of the other; of equals the first."""
    import numpy as np

    order_S = among_S[np.lexsort((among_S, value_S[among_S], weight_S[among_S]))]
    lowest_S = np.minimum.accumulate(value_S[order_S])
    first = np.ones(len(order_S), bool)
    first[1:] = lowest_S[1:] < lowest_S[:-1]
    return order_S[first]
