"""The solver against all possible answers."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptq.search.solve import least

CHOICE = st.tuples(st.integers(0, 40), st.integers(0, 40))
PROBLEM = st.lists(st.lists(CHOICE, min_size=1, max_size=3), min_size=1, max_size=6)


def split(problem):
    values = [[v for v, _ in row] for row in problem]
    weights = [[w for _, w in row] for row in problem]
    return values, weights


def total(table, chosen):
    return sum(row[c] for row, c in zip(table, chosen, strict=True))


def by_trying_all(values, weights, limit):
    """The least (value, weight) of all combinations."""
    every = product(*(range(len(row)) for row in values))
    light = [c for c in every if total(weights, c) <= limit]
    return min(((total(values, c), total(weights, c)) for c in light), default=None)


@settings(max_examples=300, deadline=None)
@given(PROBLEM, st.integers(0, 200))
def test_the_answer_is_the_best_of_all(problem, limit):
    values, weights = split(problem)
    found = least(values, weights, limit)
    wanted = by_trying_all(values, weights, limit)
    if wanted is None:
        assert found is None
    else:
        assert (total(values, found), total(weights, found)) == wanted


@settings(max_examples=100, deadline=None)
@given(PROBLEM, st.integers(0, 200), st.integers(0, 50))
def test_a_larger_limit_is_never_worse(problem, limit, more):
    values, weights = split(problem)
    small, large = least(values, weights, limit), least(values, weights, limit + more)
    if small is not None:
        assert total(values, large) <= total(values, small)


def test_choosing_set_by_set_is_not_enough():
    """The twin: the best gain a unit of weight first, as long as it fits, misses the best."""
    values = [[10, 0], [9, 0], [9, 0]]
    weights = [[0, 6], [0, 5], [0, 5]]
    assert least(values, weights, 10) == (0, 1, 1)
    greedy = [0, 0, 0]
    for at in (0, 1, 2):
        trial = [*greedy[:at], 1, *greedy[at + 1 :]]
        greedy = trial if total(weights, trial) <= 10 else greedy
    assert total(values, greedy) > total(values, (0, 1, 1))


def test_of_equals_the_lightest_and_then_the_first():
    assert least([[5, 5, 5]], [[3, 2, 2]], 9) == (1,)
    assert least([[5, 5], [5, 1]], [[3, 2], [1, 4]], 6) == (1, 1)
    assert least([[1]], [[2]], 1) is None


@pytest.mark.parametrize("seed", [1, 2])
def test_hundreds_of_sets_are_solved_exactly(seed):
    """As a large model has them: the bound that excuses from trying all is near enough."""
    import random

    draw = random.Random(seed)
    sizes = [589_824 + 16 * 960, 331_776, 1_769_472, 884_736]
    values, weights = [], []
    for at in range(400):
        base = draw.lognormvariate(20, 1.5)
        values.append([int(base), int(base / 60), int(base / 300), 0])
        weights.append([sizes[at % 4] * bits // 16 for bits in (9, 17, 18, 32)])
    limit = sum(row[0] for row in weights) * 5 // 4
    chosen = least(values, weights, limit)
    assert total(weights, chosen) <= limit
    for at in range(400):  # no change of one set, and none of two, is better
        for c in range(4):
            one = [*chosen[:at], c, *chosen[at + 1 :]]
            assert total(weights, one) > limit or total(values, one) >= total(values, chosen)
