"""Run in each of several processes: commands of ckptq, one after the other.

FOLDER/commands.json holds their words; FOLDER/NUMBER-RANK.json gets what came of each.
"""

import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryFile

from ckptq.__main__ import main


def perform(folder: Path, environment: dict[str, str]) -> None:
    os.environ |= environment
    rank = os.environ["RANK"]
    for number, words in enumerate(json.loads((folder / "commands.json").read_text())):
        (folder / f"{number}-{rank}.json").write_text(json.dumps(_run(words)))


def _run(words: list[str]) -> dict[str, object]:
    sys.argv = ["ckptq", *words]
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code
        for file in (out, err):
            file.seek(0)
        return {"code": code, "stdout": out.read(), "stderr": err.read()}
