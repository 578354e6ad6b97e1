"""The report as text and as data."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from ckptq.errors import UsageError
from ckptq.show.verification import SHOWN, show_report
from ckptq.verify import report as reports
from ckptq.verify.run import verify

DOCUMENT = Path(__file__).parents[2] / "docs" / "verify.md"
NESTED = {
    "findings": reports.Finding, "tensors": reports.TensorResult, "scales": reports.ScaleRow,
    "arrivals": reports.Arrival, "heads": reports.HeadResult, "layers": reports.LayerResult,
}  # fmt: skip


def documented():
    """First column of the table of fields -> the names in the second."""
    section = DOCUMENT.read_text().partition("## `--json`")[2].partition("\n## ")[0]
    rows = [row.split("|")[1:3] for row in section.splitlines() if row.startswith("| `")]
    return {
        name: set(re.findall("`([a-z_]+)`", text))
        for names, text in rows
        for name in re.findall("`([a-z_]+)`", names)
    }


def test_every_field_is_documented(good):
    told = documented()
    assert told.keys() == verify(good("llama", "int8")[0]).to_dict().keys()
    for name, kind in NESTED.items():
        assert {field.name for field in fields(kind)} <= told[name], name


def test_alike_faults_are_told_together(broken, capsys):
    editor, source = broken("llama", "fp8-channel")
    for name in editor.tensors:
        if name.endswith("weight_scale"):
            editor.tensors[name] = editor.tensors[name] * 2
    show_report(verify(editor.save(), source), json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAULT scale-wrong:")
    assert lines[0].endswith("(14 times)")
    assert sum("weight_scale: found" in line for line in lines) == SHOWN
    assert f"and {14 - SHOWN} more" in lines[SHOWN + 1]
    assert lines[SHOWN + 2].strip() == "repair: divide the scales by 2"
    assert "14 faults" in lines[-1]


def test_the_verdict_is_last_and_says_what_was_not_looked_at(good, capsys):
    folder, source = good("llama", "fp8-channel")
    said = {}
    for name, options in {
        "whole": {"source": source}, "fast": {"source": source, "fast": True},
        "alone": {}, "headers": {"headers_only": True},
    }.items():  # fmt: skip
        show_report(verify(folder, **options), json=False)
        said[name] = capsys.readouterr().out
        assert ": right; 35 tensors" in said[name].splitlines()[-1]
    assert "samples" in said["fast"]
    assert "samples" not in said["whole"]
    assert "give --source" in said["alone"]
    assert "headers only" in said["headers"]


def test_headers_alone_read_no_tensor(broken):
    """What only data shows is not found; what headers show is."""
    editor, source = broken("llama", "fp8-channel")
    name = editor.named("q_proj.weight_scale")
    editor.tensors[name][0] = float("nan")
    assert not verify(editor.save(), source).ok
    assert verify(editor.folder, source, headers_only=True).ok
    del editor.tensors[name]
    found = verify(editor.save(), source, headers_only=True)
    assert found.counts == {"scale-missing": 1}
    with pytest.raises(UsageError, match="headers"):
        verify(editor.folder, source, headers_only=True, attention=True)


def test_headers_alone_need_no_torch(good):
    """Importing it takes longer than reading the headers of 100 GB."""
    code = (
        "import sys; from ckptq.verify.run import verify; "
        "assert verify(sys.argv[1], headers_only=True).ok; assert 'torch' not in sys.modules"
    )
    folder, _ = good("llama4", "fp8-channel", True)
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
