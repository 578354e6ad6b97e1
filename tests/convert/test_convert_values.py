"""The streamed result against whole tensors: every format, every layout, however rows are cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from convert_cases import FORMATS, LAYOUTS, convert, expected, recipe_of, save, scheme_of
from tiny.tensors import differences, tensors_in

from ckptq.convert import blocks, slabs


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So small that every weight is cut into several runs, blocks and bands."""
    monkeypatch.setattr(blocks, "RUN_ELEMENTS", 1 << 13)
    monkeypatch.setattr(blocks, "CALL_ELEMENTS", 1 << 11)
    monkeypatch.setattr(slabs, "BAND_BYTES", 1 << 12)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_one_by_one_are_what_whole_tensors_give(tmp_path, layout, format):
    torch.manual_seed(0)
    made = LAYOUTS[layout]()
    source = save(tmp_path / "source", made)
    result = convert(source, tmp_path / "out", recipe_of(format), workers=3)
    wanted = expected(made, scheme_of(format), left=lambda name: False)
    assert differences(tensors_in(tmp_path / "out"), wanted) == []
    assert result.linears == len(made.linears)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_left_alone_goes_over_bit_for_bit(tmp_path, layout):
    torch.manual_seed(1)
    made = LAYOUTS[layout]()
    source = save(tmp_path / "source", made)
    ignore = (r"re:.*layers\.0\.self_attn.*", r"re:.*experts\.1\..*", r"re:.*layers\.1\.mlp\.g.*")
    ignore = (*ignore, r"re:.*layers\.1\.mlp\.up.*")
    # a recipe's list is for many models: what matches nothing there is no mistake
    convert(source, tmp_path / "out", replace(recipe_of("fp8 channel"), ignore=ignore))
    got = tensors_in(tmp_path / "out")
    left = {n for n in made.linears if f"{n}.weight_scale" not in got}
    assert 0 < len(left) < len(made.linears)
    wanted = expected(made, scheme_of("fp8 channel"), left=left.__contains__)
    assert differences(got, wanted) == []


def test_one_wrong_row_would_be_noticed(tmp_path):
    """The comparison above can fail: one bit of one row of the source, in the last block."""
    torch.manual_seed(0)
    made = LAYOUTS["llama4"]()
    source = save(tmp_path / "source", made)
    convert(source, tmp_path / "out", recipe_of("int4 group"))
    name = "model.layers.1.feed_forward.experts.down_proj"
    made.tensors[name][-1, -1, -1] *= 3
    wanted = expected(made, scheme_of("int4 group"), left=lambda name: False)
    found = differences(tensors_in(tmp_path / "out"), wanted)
    assert [n.rpartition(".")[0] for n in found][:1] == [
        "model.layers.1.feed_forward.experts.3.down_proj"
    ]


@pytest.mark.parametrize("format", ["fp8 channel", "int4 group asym", "fp8 block", "nvfp4"])
def test_threads_rooms_and_pieces_change_no_byte(tmp_path, monkeypatch, format):
    torch.manual_seed(0)
    source = save(tmp_path / "source", LAYOUTS["llama4"]())
    convert(source, tmp_path / "one", recipe_of(format), workers=1)
    monkeypatch.setattr(blocks, "RUN_ELEMENTS", 1 << 11)
    monkeypatch.setattr(blocks, "CALL_ELEMENTS", 300)
    convert(source, tmp_path / "other", recipe_of(format), workers=7)
    one, other = (
        {p.name: p.read_bytes() for p in sorted((tmp_path / n).iterdir())} for n in ("one", "other")
    )
    assert one == other
    assert len(one) > 6


def test_float32_and_float16_sources(tmp_path):
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16):
        made = LAYOUTS["llama"]()
        for name, tensor in made.tensors.items():
            made.tensors[name] = tensor.to(dtype)
        source = save(tmp_path / f"{dtype}", made)
        convert(source, tmp_path / f"{dtype}-out", recipe_of("int8 channel"))
        wanted = expected(made, scheme_of("int8 channel"), left=lambda name: False)
        assert differences(tensors_in(tmp_path / f"{dtype}-out"), wanted) == []
