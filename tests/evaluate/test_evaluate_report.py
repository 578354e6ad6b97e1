import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from test_evaluate_scores import evaluation, logits, row

from ckptq.errors import MachineError, UsageError
from ckptq.evaluate.report import check_report, html, write_report
from ckptq.show_evaluation import evaluation_tables

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


def test_png_needs_matplotlib(tmp_path):
    file = tmp_path / "a.png"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match=re.escape("ckptq[plot]")):
            check_report(file)
        return
    check_report(file)
    write_report(file, evaluation(row(logits(1), logits(2))), [])
    assert file.read_bytes().startswith(b"\x89PNG")


def test_columns_without_a_number_are_left_out():
    plain = evaluation(row(logits(1), logits(2)))
    found = replace(plain, source=plain.rows[0], zero=plain.rows[0], control=plain.rows[0])
    (_, columns, cells), *_ = evaluation_tables(found)
    assert not {"dB", "bits", "exact"} & set(columns)
    assert {len(each) for each in cells} == {len(columns)}
    one = replace(found.rows[0], kv_cache="int4-per-token-head", cache_bits=4.625, snr_db=20.0)
    (_, columns, cells), *_ = evaluation_tables(replace(found, rows=(one,)))
    assert [cells[2][columns.index(name)] for name in ("bits", "dB")] == ["4.62", "20.0"]
