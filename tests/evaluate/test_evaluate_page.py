import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from test_evaluate_scores import evaluation, logits, row

from ckptq.errors import MachineError, UsageError
from ckptq.show.evaluate_page import (
    check_report,
    frontier,
    html,
    layer_chart,
    names_of,
    quality_chart,
    write_report,
)
from ckptq.show.evaluation import evaluation_tables

SVG = "{http://www.w3.org/2000/svg}"


def test_the_page_has_every_number_of_the_table_and_why_the_answer_is_no():
    found = evaluation(row(logits(1), logits(2)), max_kl=0.001)
    found = replace(found, text="<script>alert(1)</script>")
    page = html(found, evaluation_tables(found))
    assert found.failures[0] in page
    assert f"{found.rows[0].measures.kl:.5f}" in page
    assert page.count("<svg") == 2
    assert "<script" not in page
    assert "within all thresholds" not in page
    good = evaluation(row(logits(1), logits(1)), max_kl=0.001)
    assert "within all thresholds" in html(good, evaluation_tables(good))


def test_reports_are_written_by_their_ending(tmp_path):
    found = evaluation(row(logits(1), logits(2)))
    write_report(tmp_path / "a.svg", found, [])
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag == f"{SVG}svg"
    write_report(tmp_path / "a.png", found, [])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    write_report(tmp_path / "a.html", found, evaluation_tables(found))
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")


def test_a_report_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    check_report(tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "b.html").mkdir()
    proc = Path("/proc/a.html")  # a folder in which not even root makes files
    for wrong in (tmp_path / "a.pdf", tmp_path / "no" / "a.html", tmp_path / "b.html"):
        with pytest.raises(UsageError, match=re.escape(str(wrong))):
            check_report(wrong)
    with pytest.raises(MachineError, match=re.escape(str(proc))):
        check_report(proc)


def rows(points, *, cache_bits=None):
    """Rows of these (megabytes, KL)."""
    base = row(logits(1), logits(2))
    return tuple(
        replace(
            base,
            weights=f"scheme <{i}>",
            kv_cache=f"cache {i}",
            nbytes=int(size * 1e6),
            cache_bits=cache_bits[i] if cache_bits else 16.0,
            outcome=replace(
                base.outcome, measures=replace(base.outcome.measures, kl=kl), layers=(kl, 2 * kl)
            ),
        )
        for i, (size, kl) in enumerate(points)
    )


def compared(found_rows, **limits):
    return replace(evaluation(row(logits(1), logits(2)), **limits), rows=found_rows)


def test_a_line_joins_those_that_none_beats_in_both():
    points = [(1.0, 5.0), (2.0, 1.0), (2.0, 3.0), (3.0, 1.0), (4.0, 0.5), (9.0, math.nan)]
    assert list(frontier(points)) == [0, 1, 4]
    *each, line = quality_chart(compared(rows(points))).series
    assert line.points == [points[0], points[1], points[4]]
    assert [one.points[0] for one in each[:5]] == points[:5]
    assert [one.name for one in each] == [
        *(f"scheme <{i}>" for i in range(5)), "scheme <5> (not finite)",
    ]  # fmt: skip


def test_limit_and_control_are_lines_across_at_their_height():
    found = compared(rows([(1, 0.01), (2, 0.1)]), max_kl=0.01)
    assert dict(quality_chart(found).limits) == {
        "control: a layer spoiled": found.control.measures.kl, "--max-kl 0.01": 0.01,
    }  # fmt: skip
    assert "--max-kl 0.01" not in dict(quality_chart(compared(rows([(1, 0.01)]))).limits)


def test_caches_of_one_model_are_told_apart_by_their_bits():
    caches = tuple(
        replace(each, weights="model") for each in rows([(1, 0.01), (1, 0.1)], cache_bits=(8, 2))
    )
    made = quality_chart(compared(caches))
    assert made.x_label == "cache, bits per value"
    assert [(one.name, one.points[0][0]) for one in made.series[:2]] == [
        ("cache 0", 8), ("cache 1", 2),
    ]  # fmt: skip
    assert names_of(caches[:1]) == ["model, cache 0 cache"]


def test_every_row_has_a_line_over_the_layers():
    made = layer_chart(compared(rows([(1, 0.01), (2, 0.0), (3, math.nan)])))
    assert made.by_layer
    assert [(one.name, one.dashed) for one in made.series] == [
        ("scheme <0>", False), ("scheme <1>", False), ("scheme <2> (not finite)", False),
        ("control: a layer spoiled", True),
    ]  # fmt: skip
    assert made.series[0].points == [(1.0, 0.01), (2.0, 0.02)]


def test_columns_without_a_number_are_left_out():
    plain = evaluation(row(logits(1), logits(2)))
    found = replace(plain, source=plain.rows[0], zero=plain.rows[0], control=plain.rows[0])
    (_, columns, cells), *_ = evaluation_tables(found)
    assert not {"dB", "bits", "exact"} & set(columns)
    assert {len(each) for each in cells} == {len(columns)}
    one = replace(found.rows[0], kv_cache="int4-per-token-head", cache_bits=4.625, snr_db=20.0)
    (_, columns, cells), *_ = evaluation_tables(replace(found, rows=(one,)))
    assert [cells[2][columns.index(name)] for name in ("bits", "dB")] == ["4.62", "20.0"]
