"""Killed, failed, damaged, meddled with: equal bytes, a refusal, or a redo.

`ordeal.py` does more of it, and other trials.
"""

from __future__ import annotations

import pytest
from ordeal import TEMPTED, Trials

MISSED = ("other bytes", "of the user's", "is not whole")


@pytest.fixture(scope="module")
def trials(tmp_path_factory) -> Trials:
    return Trials(tmp_path_factory.mktemp("ordeal"))


@pytest.mark.parametrize("seed", range(8))
def test_every_trial_ends_as_it_must(trials, seed):
    assert trials.one(seed)


@pytest.mark.parametrize("left_out", TEMPTED)
def test_a_guard_that_is_left_out_is_missed(trials, left_out):
    """The twins: without it some trial ends in other bytes, or in a loss of the user's."""
    missed = []
    for seed in range(1000, 1020):
        try:
            trials.one(seed, left_out)
        except AssertionError as error:
            missed.append(str(error))
            break
    assert missed, f"{left_out}: not needed in any trial"
    assert any(said in missed[0] for said in MISSED), missed
