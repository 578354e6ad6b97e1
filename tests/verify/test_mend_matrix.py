"""Every fault of the suite, mended or told what it needs, as the table says.

`FULL_MATRIX=1` tries all of them without the source too, instead of those alone that are mended.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest
from mend_trials import OUTCOMES, WAYS, read_table, tried
from test_verify_faults import FAULTS
from verify_faults import Fault

TABLE = read_table()
MENDED = ("equal", "right", "partly")


def is_tried(fault: Fault, way: str) -> bool:
    wanted = TABLE[fault.name][way]
    return bool(os.environ.get("FULL_MATRIX")) or wanted in MENDED or way == "source"


CASES = [
    pytest.param(fault, way, id=f"{fault.name}-{way}")
    for fault in FAULTS
    for way in WAYS
    if is_tried(fault, way)
]


@pytest.mark.parametrize(("fault", "way"), CASES)
def test_each_fault_is_mended_or_told(broken, good, fault: Fault, way: str):
    family, weights = fault.families[0], fault.weights[0]
    editor, source = broken(family, weights, fault.kv)
    wanted, _ = good(family, weights, fault.kv)
    assert tried(fault, editor, source, wanted, way) == TABLE[fault.name][way]


def test_the_table_has_every_fault_and_no_other():
    assert set(TABLE) == {fault.name for fault in FAULTS}
    assert all(set(row) == set(WAYS) and set(row.values()) <= OUTCOMES.keys()
               for row in TABLE.values())  # fmt: skip


def test_the_docs_count_what_the_table_holds():
    text = (Path(__file__).parents[2] / "docs" / "mend.md").read_text()
    for way, row in zip(WAYS, ("without the source", "with the source"), strict=True):
        counts = Counter(outcomes[way] for outcomes in TABLE.values())
        found = re.search(rf"\| {row} \|(.*)\|\n", text)
        assert found, row
        assert [int(cell) for cell in found[1].split("|")] == [counts[name] for name in OUTCOMES]
