"""The figures in README and docs, from the results files that they quote.

    python benchmarks/figures.py     # make figures: put the figures of benchmarks/results in

Four marks, as comments that a reader does not see:

    7.9x<!-- figure: calibration-llama-8b / ckptq / x oneshot -->    the number before it
    <!-- table: evaluate-real-schemes -->                            the table on the next line
    <!-- measured: kernels -->...<!-- end -->                        machine, date and commit
    <!-- commit: kernels -->...<!-- end -->                          the commit alone

A cell of a table, in a column that is aligned to the right, is the figure of the row that the first
cell names in `backticks` (or in plain words) and of the column's head. As many decimals are shown
as the text shows already. Whoever quotes a file says in the same section where it was measured;
that text is made here, and says so where the code has changed since. `Unfounded` names what no
results file holds.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from code_digest import REPOSITORY
from record import RESULTS, Result

NUMBER = r"(?P<number>\d[\d,]*(?:\.\d+)?)"
CELL = re.compile(rf"{NUMBER}(?P<unit>[^\d]{{0,4}})")
FIGURE = re.compile(rf"{NUMBER}(?P<unit>[^\d<>|]{{0,8}})<!-- figure: (?P<at>.+?) -->")
TABLE = re.compile(r"(?P<mark><!-- table: (?P<name>\S+) -->\n)(?P<rows>(?:\|.*\n)+)")
MEASURED = re.compile(r"<!-- (?P<how>measured|commit): (?P<name>\S+) -->.*?<!-- end -->", re.DOTALL)
MARK = re.compile(r"<!-- (?:figure|table|measured|commit): ")
HEADING = re.compile(r"^(?=#)", re.MULTILINE)

Results = Mapping[str, Result]


class Unfounded(Exception):
    """A figure that no results file holds, or that does not say where it was measured."""


def documents(root: Path = REPOSITORY) -> list[Path]:
    """README and docs."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def results(folder: Path = RESULTS) -> Results:
    """Name -> results file."""
    return {path.stem: Result.read(path) for path in sorted(folder.glob("*.json"))}


def rendered(text: str, held: Results, root: Path = REPOSITORY) -> str:
    """The document with the figures that are held; `Unfounded` if one is not, or has no note."""
    text = FIGURE.sub(lambda found: _figure(found, held), text)
    text = TABLE.sub(lambda found: found["mark"] + _table(found, held), text)
    text = MEASURED.sub(lambda found: _measured(found, held, root), text)
    _check_marks(text)
    for section in HEADING.split(text):
        if missing := quoted(section) - {found["name"] for found in MEASURED.finditer(section)}:
            raise Unfounded(f"no `measured` mark beside figures of {', '.join(sorted(missing))}")
    return text


def quoted(text: str) -> set[str]:
    """Names of the results files that figures and tables of the text are from."""
    inline = {_place(found["at"])[0] for found in FIGURE.finditer(text)}
    return inline | {found["name"] for found in TABLE.finditer(text)}


def _check_marks(text: str) -> None:
    patterns = (FIGURE, TABLE, MEASURED)
    known = [found.span() for pattern in patterns for found in pattern.finditer(text)]
    for mark in MARK.finditer(text):
        if not any(start <= mark.start() < end for start, end in known):
            line = text[mark.start() :].partition("\n")[0]
            raise Unfounded(f"no number before, no table below, or no end: {line}")


def _figure(found: re.Match[str], held: Results) -> str:
    shown = _shown(_value(held, *_place(found["at"])), found["number"])
    return f"{shown}{found['unit']}<!-- figure: {found['at']} -->"


def _place(at: str) -> list[str]:
    name, _, rest = at.partition(" / ")
    row, _, column = rest.rpartition(" / ")
    if not row:
        raise Unfounded(f"{at}: FILE / ROW / COLUMN is wanted")
    return [name, row, column]


def _value(held: Results, name: str, row: str, column: str) -> float:
    try:
        value = held[name].figures[row][column]
    except KeyError as error:
        raise Unfounded(f"{name} / {row} / {column}: no {error} in benchmarks/results") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unfounded(f"{name} / {row} / {column} is {value!r}, not a number")
    return value


def _shown(value: float, like: str) -> str:
    """With as many decimals as `like` has, and its commas."""
    decimals = len(like.partition(".")[2])
    return f"{value:,.{decimals}f}" if "," in like else f"{value:.{decimals}f}"


def _table(found: re.Match[str], held: Results) -> str:
    head, rule, *rows = found["rows"].splitlines()
    right = [aligned.strip().endswith("-:") for aligned in _split(rule)]
    named = zip(_split(head), right, strict=True)
    columns = [name.strip() if is_right else None for name, is_right in named]
    made = (_row(row, columns, found["name"], held) for row in rows)
    return "".join(f"{line}\n" for line in (head, rule, *made))


def _split(line: str) -> list[str]:
    return line.removeprefix("|").removesuffix("|").split("|")


def _row(line: str, columns: list[str | None], name: str, held: Results) -> str:
    first, *cells = _split(line)
    row = (re.findall("`(.+?)`", first) or [first.strip()])[0]
    for index, (column, cell) in enumerate(zip(columns[1:], cells, strict=True)):
        if column is None or not cell.strip() or FIGURE.search(cell):
            continue
        number = CELL.fullmatch(cell.strip())
        if number is None:
            raise Unfounded(f"{name} / {row} / {column}: {cell.strip()!r} is not one number")
        shown = _shown(_value(held, name, row, column), number["number"])
        cells[index] = cell.replace(number["number"], shown)
    return f"|{'|'.join([first, *cells])}|"


def _measured(found: re.Match[str], held: Results, root: Path) -> str:
    how, name = found["how"], found["name"]
    if name not in held:
        raise Unfounded(f"no benchmarks/results/{name}.json")
    result = held[name]
    said = f"commit {result.commit}"
    if how == "measured":
        said = f"{result.machine.split(',')[0]}, {result.date}, {said}"
    if result.is_old(root):
        said += ", code changed since"
    return f"<!-- {how}: {name} -->{said}<!-- end -->"


def _put_in() -> Iterator[Path]:
    """The documents that were not what the results files say."""
    held = results()
    for path in documents():
        text = path.read_text()
        try:
            made = rendered(text, held)
        except Unfounded as error:
            sys.exit(f"{path.relative_to(REPOSITORY)}: {error}")
        if made != text:
            path.write_text(made)
            yield path


if __name__ == "__main__":
    for changed in _put_in():
        print(f"{changed.relative_to(REPOSITORY)}: figures put in")
