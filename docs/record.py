"""Record a real session for the README: run commands in a terminal, draw what they print as an SVG.

    python docs/record.py MODEL docs/session.svg

MODEL is the example Llama (`examples/make_checkpoint.py`); `ckptq` has to be in PATH. Commands run
one after the other in a scratch folder, in a terminal of their own. All that they print is kept but
the progress; the script fails where one ends with another exit code than it should.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 152
FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
"""What an SVG of rich's would load from elsewhere; the reader's own monospace does."""
COMMANDS = (
    ("ckptq quantize llama --scheme fp8-per-head -o per-head --data llama/calibration.txt", 0),
    ("ckptq verify per-head --source llama", 0),
    (
        "ckptq evaluate per-head --source llama --task llama/task.jsonl --max-kl 0.05"
        " --kv-cache fp8-per-tensor,fp8-scale-1",
        1,
    ),
)
"""With the exit codes that they have to end with."""


def in_terminal(command: str, folder: Path, wanted: int) -> str:
    """What a command writes to a terminal, colors included."""
    leader, follower = pty.openpty()
    environment = os.environ | {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    with subprocess.Popen(
        shlex.split(command),
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=follower,
        stderr=subprocess.PIPE,  # progress
    ) as process:
        os.close(follower)
        written = bytearray()
        while chunk := _read(leader):
            written += chunk
        said = process.stderr.read().decode() if process.stderr else ""
    os.close(leader)
    if process.returncode != wanted:
        raise SystemExit(f"{command}: ended with {process.returncode}, not {wanted}\n{said}")
    return written.decode().replace("\r\n", "\n").rstrip("\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the last writer has closed it
        return b""


def main() -> None:
    model, out = map(Path, sys.argv[1:])
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "llama").symlink_to(model.resolve())
        for command, code in COMMANDS:
            text = in_terminal(command, folder, code)
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            console.print(Text.from_ansi(text))
            console.print(Text(f"exit code {code}\n", style="dim"))
    drawn = console.export_svg(title="ckptq", unique_id="ckptq")
    out.write_text(FONTS.sub("", drawn))
    print(out)


if __name__ == "__main__":
    main()
