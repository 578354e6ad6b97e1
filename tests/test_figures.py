"""Figures in README and docs are those of benchmarks/results, and say so where they are old."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from code_digest import digest, modules, normalized  # noqa: E402
from figures import Unfounded, documents, quoted, rendered, results  # noqa: E402
from record import Result, extremes, publish  # noqa: E402

HELD = results()
SPEED_OR_MEMORY = re.compile(
    r"\d ?(?:tokens/s|TFLOP/s|GB/s|GiB of|% of a copy)|\d(?:x| times) (?:as fast|`oneshot`|a plain)"
)
"""What only a measurement can say. Words of the same line carry the mark."""
SCORES = re.compile(r"^\|.*\b(?:KL|perplexity)\b.*\|\n\|[-:| ]+\|$", re.MULTILINE)
"""The head of a table with scores."""


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_document_says_what_the_results_say(path: Path) -> None:
    text = path.read_text()
    assert rendered(text, HELD) == text, "run `make figures`"


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_what_was_measured_carries_a_mark(path: Path) -> None:
    assert list(unmarked(path.read_text())) == []


def unmarked(text: str) -> Iterator[str]:
    """Lines of prose and heads of tables that say a measured figure and not whence."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from (
        line
        for line in prose.splitlines()
        if "<!-- figure" not in line and SPEED_OR_MEMORY.search(line)
    )
    for head in SCORES.finditer(prose):
        before = prose[: head.start()].rstrip("\n").rpartition("\n")[2]
        if not before.startswith("<!-- table: "):
            yield head[0]


def test_unmarked_figures_are_noticed() -> None:
    assert list(unmarked("It runs at 26,992 tokens/s.\n")) == ["It runs at 26,992 tokens/s."]
    assert list(unmarked("| scheme | KL |\n|---|---:|\n| a | 1 |\n")) == [
        "| scheme | KL |\n|---|---:|"
    ]
    assert not list(unmarked("```\n30 tokens/s\n```\n"))


@pytest.mark.parametrize("name", HELD)
def test_results_are_quoted_and_whole(name: str) -> None:
    """A file that no document quotes goes; each figure belongs to a row of the one table."""
    assert any(name in quoted(path.read_text()) for path in documents()), "no document quotes it"
    result = HELD[name]
    assert result.command
    assert result.machine
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result.date)
    assert re.fullmatch(r"[0-9a-f]{7,}\+?", result.commit)
    assert re.fullmatch(r"[0-9a-f]{64}", result.digest)


# ---- what the tests above are worth: each change to a copy is noticed


RESULT = Result(
    what="a kernel",
    command="python benchmarks/bench.py",
    machine="A GPU, torch 2",
    date="2026-11-27",
    commit="1234567",
    code=["ckptq/kernel.py"],
    digest="",
    figures={"fast": {"GB/s": 4012.3, "KL": 0.02525, "code": "fp8"}, "slow": {"GB/s": 7.96}},
)
TEXT = """# A

4,012 GB/s<!-- figure: kernel / fast / GB/s -->, KL 0.025<!-- figure: kernel / fast / KL -->
(<!-- measured: kernel -->A GPU, 2026-11-27, commit 1234567<!-- end -->).

<!-- table: kernel -->
| how | what | GB/s |
|---|---|---:|
| `fast` | FP8 | 4012 |
| slow | FP8 | 8.0 |
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository of one module."""
    module = tmp_path / "ckptq" / "kernel.py"
    module.parent.mkdir()
    module.write_text('def f(x):\n    """Doubles x."""\n    return 2 * x  # twice\n')
    return tmp_path


@pytest.fixture
def result(copy: Path) -> Result:
    return replace(RESULT, digest=digest(RESULT.code, copy))


def test_figures_stay_as_they_were_measured(copy: Path, result: Result) -> None:
    assert rendered(TEXT, {"kernel": result}, copy) == TEXT


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("4,012", "4,013"),
        ("0.025<", "0.026<"),
        ("| 8.0 |", "| 8.1 |"),
        ("2026-11-27", "2026-11-28"),
        ("1234567<", "1234567, code changed since<"),
    ],
)
def test_a_changed_document_is_noticed(copy: Path, result: Result, was: str, becomes: str) -> None:
    edited = TEXT.replace(was, becomes)
    assert edited != TEXT
    assert rendered(edited, {"kernel": result}, copy) == TEXT


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        ("kernel / fast / GB/s", "other / fast / GB/s", "other"),
        ("kernel / fast / KL", "kernel / quick / KL", "quick"),
        ("kernel / fast / KL", "kernel / fast / code", "not a number"),
        ("kernel / fast / KL", "kernel", "FILE / ROW / COLUMN"),
        ("| 8.0 |", "| 8.0, 9.0 |", "not one number"),
        ("| slow |", "| slower |", "slower"),
        ("4,012 GB/s<", "many<", "no number before"),
        ("<!-- end -->", "", "no end"),
        ("(<!-- measured", "# B\n\n(<!-- measured", "no `measured` mark"),
        ("<!-- table: kernel -->\n", "<!-- table: kernel -->\n\n", "no table below"),
    ],
)
def test_an_unfounded_figure_is_refused(
    copy: Path, result: Result, was: str, becomes: str, message: str
) -> None:
    assert was in TEXT
    with pytest.raises(Unfounded, match=message):
        rendered(TEXT.replace(was, becomes, 1), {"kernel": result}, copy)


def test_changed_code_is_noticed_and_said(copy: Path, result: Result) -> None:
    module = copy / "ckptq" / "kernel.py"
    module.write_text(module.read_text().replace("2 *", "3 *"))
    said = rendered(TEXT, {"kernel": result}, copy)
    assert said == TEXT.replace("1234567<", "1234567, code changed since<")
    module.unlink()
    assert rendered(TEXT, {"kernel": result}, copy) == said


def test_a_short_note_says_the_commit_alone(copy: Path, result: Result) -> None:
    short = TEXT.replace("measured: kernel -->A GPU, 2026-11-27, ", "commit: kernel -->")
    assert rendered(short, {"kernel": result}, copy) == short
    assert "<!-- commit: kernel -->commit 1234567<!-- end -->" in short


def test_a_module_more_is_noticed(copy: Path) -> None:
    before = digest(["ckptq"], copy)
    (copy / "ckptq" / "more.py").write_text("")
    assert digest(["ckptq"], copy) != before


def test_a_helper_that_is_imported_counts(copy: Path) -> None:
    kernels, other = copy / "ckptq" / "kernels", copy / "ckptq" / "errors.py"
    (kernels / "linear").mkdir(parents=True)
    (kernels / "linear" / "linear.py").write_text(
        "from ckptq.errors import E\nfrom ckptq.kernels import rows\n"
    )
    (kernels / "rows.py").write_text("from ckptq.kernels.rounding import narrow\n")
    (kernels / "rounding.py").write_text("def narrow(x): return x\n")
    other.write_text("class E(Exception): pass\n")
    before = digest(["ckptq/kernels/linear"], copy)
    other.write_text("class E(ValueError): pass\n")
    assert digest(["ckptq/kernels/linear"], copy) == before
    (kernels / "rounding.py").write_text("def narrow(x): return -x\n")
    assert digest(["ckptq/kernels/linear"], copy) != before


def test_prose_and_format_are_not_code(copy: Path, result: Result) -> None:
    module = copy / "ckptq" / "kernel.py"
    module.write_text("# new\ndef f(\n    x,\n):\n    'Twice x.'\n    return (2 * x)\n")
    assert not result.is_old(copy)
    module.write_text("def f(x):\n    print('Twice x.')\n    return 2 * x\n")
    assert result.is_old(copy)


def test_docstrings_of_fields_are_prose() -> None:
    assert normalized("class A:\n    x: int\n    '''Why.'''\n") == normalized(
        "class A:\n    x: int"
    )
    assert normalized("x = 'a'") != normalized("x = 'b'")


def test_a_changed_module_of_ckptq_is_noticed(tmp_path: Path) -> None:
    """Of every results file that is up to date: its first module, changed in a copy."""
    fresh = [held for held in HELD.values() if not held.is_old()]
    for held in fresh:
        shutil.rmtree(tmp_path / "ckptq", ignore_errors=True)
        shutil.copytree(ROOT / "ckptq", tmp_path / "ckptq", ignore=shutil.ignore_patterns("*.json"))
        assert not held.is_old(tmp_path)
        module = modules(tmp_path / held.code[0])[-1]
        module.write_text(f"{module.read_text()}\nCHANGED = 1\n")
        assert held.is_old(tmp_path)


def test_a_benchmark_prints_its_table_and_writes_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks/bench.py"), "--record", "here", "-x"])
    monkeypatch.setenv("CKPTQ_COMMIT", "1234567")
    rows = [{"how": "a", "GB/s": 1 / 3, "x CT": None}, {"how": "b", "GB/s": 12345.678, "x CT": 2}]
    rows += extremes(rows, ["GB/s", "x CT"])
    code = ["ckptq/quantize"]
    publish("kernel", "A kernel", rows, code=code, machine="A GPU", folder=tmp_path)
    assert "| a | 0.3333 |  |\n| b | 12,346 | 2 |\n" in capsys.readouterr().out
    written = Result.read(tmp_path / "kernel.json")
    assert written.command == "python benchmarks/bench.py -x"
    assert written.figures["a"] == {"GB/s": 0.333333}
    assert written.figures["most"] == {"GB/s": 12345.7, "x CT": 2}
    assert not written.is_old()
    more = {"code": code, "folder": tmp_path, "add": True}
    publish("kernel", "A kernel", [{"how": "c", "GB/s": 3}], machine="A GPU", **more)
    added = Result.read(tmp_path / "kernel.json")
    assert added.figures == {**written.figures, "c": {"GB/s": 3}}
    assert added.command == written.command
    publish("kernel", "A kernel", [{"how": "d", "GB/s": 4}], machine="Another", **more)
    assert Result.read(tmp_path / "kernel.json").figures == {"d": {"GB/s": 4}}
