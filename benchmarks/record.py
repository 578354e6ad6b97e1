"""Results files, benchmarks/results/NAME.json: what was measured, and the digest of its code.

A benchmark prints one table per subject with `publish`, which writes the file too where it is
asked to. The first column names the rows. README and docs quote the figures by file, row and
column (benchmarks/figures.py), and say so where the code has changed since.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

from code_digest import REPOSITORY, digest

RESULTS = REPOSITORY / "benchmarks" / "results"

THEN = " && "
"""Between commands that measured rows of one table."""

Value = float | int | str | bool | None
Row = Mapping[str, Value]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One table of figures, and everything that they belong to."""

    what: str
    command: str
    machine: str
    date: str
    commit: str
    code: list[str]
    """Modules and folders of ckptq that were measured: a change there, or in what they import from
    their room, makes the figures old."""
    digest: str
    figures: dict[str, dict[str, Value]]
    """Row -> column -> figure, in the unit of the column."""

    @classmethod
    def read(cls, path: Path) -> Result:
        """TypeError where fields are missing or unknown."""
        return cls(**json.loads(path.read_text()))

    def is_old(self, root: Path = REPOSITORY) -> bool:
        """Whether the code is not what was measured; code that is gone is not."""
        try:
            return digest(self.code, root) != self.digest
        except FileNotFoundError:
            return True

    def added_to(self, old: Result) -> Result:
        """With the rows of an earlier run of the same code on the same machine, if it is one."""
        if (old.what, old.machine, old.digest) != (self.what, self.machine, self.digest):
            return self
        commands = dict.fromkeys([*old.command.split(THEN), *self.command.split(THEN)])
        figures = {**old.figures, **self.figures}
        return replace(self, command=THEN.join(commands), figures=figures)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def add_option(parser: argparse.ArgumentParser) -> None:
    """`--record FOLDER`, for `publish`."""
    parser.add_argument(
        "--record", type=Path, metavar="FOLDER", help="write FOLDER/NAME.json; benchmarks/results"
    )


def publish(
    name: str,
    what: str,
    rows: Sequence[Row],
    *,
    code: Sequence[str],
    machine: str,
    folder: Path | None,
    add: bool = False,
) -> None:
    """Print the table; write it to FOLDER/NAME.json where a folder is given.

    `add` keeps the rows that the file holds of the same code and machine: of a long table that is
    measured bit by bit.
    """
    print(f"\n{what} ({machine})\n\n{table(rows)}", flush=True)
    if folder is None:
        return
    path = folder / f"{name}.json"
    made = Result(
        what=what,
        command=command(),
        machine=machine,
        date=str(date.today()),
        commit=commit(),
        code=list(code),
        digest=digest(code),
        figures=dict(map(_named, rows)),
    )
    (made.added_to(Result.read(path)) if add and path.exists() else made).write(path)


def extremes(rows: Sequence[Row], columns: Sequence[str], of: str = "") -> Iterator[Row]:
    """Two rows more, "least" and "most" (of `of`): what docs say of all rows together."""
    key = next(iter(rows[0]))
    for name, choose in (("least", min), ("most", max)):
        found: dict[str, Value] = {key: f"{of}, {name}" if of else name}
        for column in columns:
            found[column] = choose(row[column] for row in rows if row.get(column) is not None)
        yield found


def _named(row: Row) -> tuple[str, dict[str, Value]]:
    (_, name), *figures = row.items()
    return str(name), {column: _rounded(value) for column, value in figures if value is not None}


def _rounded(value: Value) -> Value:
    """To six digits: more is noise."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def command() -> str:
    """How this program was called, without `--record` and folders of this machine."""
    script, *words = sys.argv
    path = Path(script).resolve()
    kept = [path.relative_to(REPOSITORY).as_posix() if path.is_relative_to(REPOSITORY) else "-c"]
    for before, word in zip(["", *words], words, strict=False):
        if "--record" not in (before, word):
            kept.append(Path(word).name if word.startswith("/") else word)
    return shlex.join(["python", *kept])


def commit() -> str:
    """The commit that is checked out, "+" behind it if files differ; CKPTQ_COMMIT without git."""
    if named := os.environ.get("CKPTQ_COMMIT"):
        return named
    git = ["git", "-C", str(REPOSITORY)]
    asked = [*git, "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def gpu() -> str:
    """What a result of a kernel belongs to: the device, or that there was none."""
    import torch
    import triton

    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "a CPU, interpreted"
    return f"{device}, torch {torch.__version__}, triton {triton.__version__}"


def table(rows: Sequence[Row]) -> str:
    """Markdown; a column for each key that any row has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += ["| " + " | ".join(_cells(row, columns)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: Row, columns: Sequence[str]) -> Iterator[str]:
    for column in columns:
        value = row.get(column)
        if isinstance(value, float):
            yield f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
        else:
            yield "" if value is None else str(value)
