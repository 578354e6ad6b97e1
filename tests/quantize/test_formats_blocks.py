"""A weight quantized a few rows at a time is the weight quantized whole."""

from __future__ import annotations

import pytest
import torch
from format_cases import SCHEMES, awkward, case_name, convert
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny.tensors import differences
from torch import Tensor

from ckptq.quantize import scratch
from ckptq.quantize.formats import (
    WeightScheme,
    constants,
    merge_statistic,
    needs_statistic,
    quantize,
    row_quantum,
    statistic,
)
from ckptq.spec import spec_of

ROWS = 300
small = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


def convert_in_parts(w_RC: Tensor, scheme: WeightScheme, starts: list[int]) -> dict[str, Tensor]:
    """Quantize the rows between `starts` one after the other and lay the parts end to end."""
    ends = [*starts[1:], len(w_RC)]
    parts = [w_RC[start:end] for start, end in zip(starts, ends, strict=True)]
    found = None
    if needs_statistic(scheme):
        for part in parts:
            more = statistic(part, scheme)
            found = more if found is None else merge_statistic(found, more)
    made = [quantize(part, scheme, found) for part in parts]
    rows = {
        name: torch.cat([tensors[name].view(torch.uint8) for tensors in made]) for name in made[0]
    }
    typed = {name: tensor.view(made[0][name].dtype) for name, tensor in rows.items()}
    return {**typed, **constants(spec_of(w_RC), scheme, found)}


@pytest.mark.parametrize("scheme", SCHEMES, ids=case_name)
@given(cuts=st.sets(st.integers(1, ROWS - 1), max_size=6))
@small
def test_rows_in_parts_equal_the_whole(scheme: WeightScheme, cuts: set[int]) -> None:
    w_RC = awkward(torch.bfloat16, rows=ROWS)
    quantum = row_quantum(scheme)
    starts = sorted({cut // quantum * quantum for cut in {0, *cuts}})
    assert differences(convert_in_parts(w_RC, scheme, starts), convert(w_RC, scheme)) == []


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if row_quantum(s) > 1], ids=case_name)
def test_a_cut_inside_a_quantum_is_noticed(scheme: WeightScheme) -> None:
    w_RC = awkward(torch.bfloat16, rows=ROWS)
    parts = convert_in_parts(w_RC, scheme, [0, row_quantum(scheme) // 2])
    assert differences(parts, convert(w_RC, scheme)) != []


@pytest.mark.parametrize("scheme", SCHEMES, ids=case_name)
def test_blocks_for_the_cache_change_nothing(
    scheme: WeightScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    w_RC = awkward(torch.bfloat16, rows=ROWS)
    whole = convert(w_RC, scheme)
    monkeypatch.setattr(scratch, "BLOCK_ELEMENTS", 1000)
    assert len(scratch.blocks(w_RC)) == 100
    assert differences(convert(w_RC, scheme), whole) == []


@pytest.mark.parametrize("scheme", SCHEMES, ids=case_name)
def test_memory_that_is_used_again_changes_nothing(scheme: WeightScheme) -> None:
    """The same scratch memory for weights of other shapes, dtypes and schemes in between."""
    first, second = awkward(torch.bfloat16, rows=ROWS), awkward(torch.float32, columns=128)
    held = scratch.Scratch()
    for w_RC in (first, second, first):
        found = statistic(w_RC, scheme, held) if needs_statistic(scheme) else None
        tensors = {**quantize(w_RC, scheme, found, held), **constants(spec_of(w_RC), scheme, found)}
        assert differences(tensors, convert(w_RC, scheme)) == []
    code = quantize(first, scheme, statistic(first, scheme), held)[scheme.codes]
    again = quantize(-first, scheme, statistic(-first, scheme), held)[scheme.codes]
    assert code.data_ptr() == again.data_ptr()


@pytest.mark.parametrize("scheme", SCHEMES, ids=case_name)
def test_the_source_may_be_a_transposed_view_and_stays_as_it_was(scheme: WeightScheme) -> None:
    w_RC = awkward(torch.bfloat16)
    w_CR = w_RC.t().contiguous()
    before = w_CR.clone()
    assert differences(convert(w_CR.t(), scheme), convert(w_RC, scheme)) == []
    assert torch.equal(w_CR.view(torch.int16), before.view(torch.int16))
