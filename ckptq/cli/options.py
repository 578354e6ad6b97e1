"""The options that commands share, each declared once."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from ckptq import __version__
from ckptq.errors import MachineError, UsageError
from ckptq.show import console

Word = TypeVar("Word", bound=str)


def _say_version(wanted: bool) -> None:
    if wanted:
        console.show_lines(f"ckptq {__version__}")
        raise typer.Exit


Model = Annotated[str, typer.Argument(help="Checkpoint folder, or a hub id.")]
Scheme = Annotated[
    str | None,
    typer.Option("--scheme", "-s", help="Built-in recipe or compressed-tensors preset."),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="Your own recipe (llm-compressor YAML).")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Default: MODEL-SCHEME in this folder.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", help="Linear to leave unquantized: name or re:PATTERN; repeatable."),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        help="Columns per scale in integer schemes with groups: 32, 64, 128, or -1 (whole row)."
    ),
]
Search = Annotated[
    bool,
    typer.Option(
        "--search", help="Search the range of each scale for the least error: slower, no data."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ShardSize = Annotated[str, typer.Option(help="Size of an output shard, e.g. 5GB, 500MB.")]
MaxRam = Annotated[str | None, typer.Option(help="Fail instead of using more memory than this.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Threads; default: one per core, at most 8.")
]
Data = Annotated[
    str | None,
    typer.Option(help="Calibration text: .txt, .jsonl, .parquet, or a `datasets` id."),
]
Text = Annotated[
    str | None,
    typer.Option("--data", help="Text to run: .txt, .jsonl, .parquet, or a `datasets` id."),
]
Samples = Annotated[int, typer.Option(min=1, help="Number of text samples.")]
SeqLen = Annotated[int, typer.Option(min=1, help="Maximum tokens per sample.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples per forward pass.")]
Seed = Annotated[int, typer.Option(help="Seed for choosing samples.")]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where weights are quantized and models run: cpu, cuda, cuda:1; default: GPU if any."
    ),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Discard the state of an interrupted run.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model code in the checkpoint.")
]
Version = Annotated[
    bool,
    typer.Option("--version", help="Print the version.", is_eager=True, callback=_say_version),
]


def one_of(option: str, given: str, choice: Sequence[Word]) -> Word:
    """The choice that was given; UsageError for anything else."""
    for word in choice:
        if word == given:
            return word
    raise UsageError(f"{option} {given!r}: expected {' or '.join(choice)}")


def words(given: Sequence[str] | None) -> list[str]:
    """Values given several times, with commas, or both; without duplicates."""
    found = (word.strip() for text in given or () for word in text.split(","))
    return list(dict.fromkeys(word for word in found if word))


def new_file(option: str, file: Path) -> None:
    """Check before the work that the file can be written later: UsageError for an impossible place,
    MachineError without permission."""
    if file.is_dir():
        raise UsageError(f"{option} {file}: is a folder; expected a file")
    if not file.parent.is_dir():
        raise UsageError(f"{option} {file}: there is no folder {file.parent}")
    if not os.access(file.parent, os.W_OK):
        raise MachineError(f"{option} {file}: no permission to write in {file.parent}")


def nbytes(text: str) -> int:
    """ "5GB" -> 5_000_000_000. Powers of ten, or of two with an i: 1GiB."""
    units = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    units |= {f"{p}B": n for p, n in list(units.items()) if p in "KMGT" and p}
    units |= {f"{p}IB": 2 ** (10 * (i + 1)) for i, p in enumerate("KMGT")}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in units or not float(match[1]):
        raise UsageError(f"{text!r} is not a size; write it like 5GB, 500MB or 1GiB")
    return int(float(match[1]) * units[match[2].upper()])
