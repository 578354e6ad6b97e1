"""One cell of the matrix in the real vLLM: what it makes of a checkpoint, and what ckptq says."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ckptq.verify.engine.vllm import WORKER
from ckptq.verify.run import verify
from families.cells import Made, make

Outcome = Literal["loaded", "refused", "source", "told", "WRONG"]

HERE = Path(__file__).parent / "in_vllm"
NOBODY_READS = re.compile(r"\.(weight_shape|[qkv]_zero_point|prob_scale|w\d+_input_global_scale)$")
"""vLLM makes scales of static inputs for NVFP4 experts of weights alone too; the schemes of the
matrix have none."""

CACHE_SCALE = re.compile(r"\.[qkv]_scale$")


@dataclass(frozen=True, slots=True)
class Cell:
    """loaded: whole, and all agree. refused: before the work. source: vLLM does not load the
    source itself. told: the plan says that vLLM would not load it, and it does not. WRONG: else."""

    outcome: Outcome
    reason: str = ""


@contextlib.contextmanager
def warm(python: Path | str, folder: Path) -> Iterator[Path]:
    """A Python like this one that has imported vLLM already: `ckptq verify --vllm-python` takes it
    as it is."""
    address, imitation = folder / "socket", folder / "python"
    imitation.write_text(f'#!/bin/sh\nexec {python} -S -E {HERE / "client.py"} {address} "$@"\n')
    imitation.chmod(0o755)
    address.unlink(missing_ok=True)
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen([python, HERE / "server.py", address], stdout=log, stderr=log)
    try:
        _connect(address, server).close()
        yield imitation
    finally:
        server.terminate()
        server.wait()


def _connect(address: Path, server: subprocess.Popen[bytes]) -> socket.socket:
    while server.poll() is None:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(address))
            return connection
        except OSError:
            connection.close()
            time.sleep(0.1)
    raise RuntimeError(f"vLLM's Python ended with {server.returncode}; see {address.parent}")


def load(python: Path, checkpoint: Path) -> dict[str, Any]:
    """What vLLM's class makes of a checkpoint: see `in_vllm/load.py`."""
    done = subprocess.run(
        [python, HERE / "load.py", WORKER, checkpoint],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return {"error": f"crashed: {done.stderr[-300:]}", "unfilled": {}}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def judge(python: Path, source: Path, theirs: dict[str, Any], made: Made, scheme: str) -> Cell:
    """`theirs` is what vLLM makes of the source."""
    if made.out is None:
        when = "" if made.planned else "plan: "
        return Cell("refused", when + made.refusal)
    lacking = faults(load(python, made.out), theirs, cached=scheme.endswith("head"))
    report = verify(made.out, source, engine="vllm", vllm_python=python)
    said = [f for f in report.findings if f.code.startswith("engine-")]
    if lacking and not said:
        return Cell("WRONG", f"{lacking}; verify --vllm-python finds nothing")
    if not lacking and report.findings:
        return Cell("WRONG", f"loads whole, and verify says {report.findings[0]}")
    simulated = verify(made.out, source, engine="vllm").findings
    if not lacking and simulated:
        return Cell("WRONG", f"loads whole, and verify without vLLM says {simulated[0]}")
    if lacking and not made.vllm:
        return Cell("WRONG", f"untold: {lacking}")
    if made.vllm and not lacking:
        return Cell("WRONG", f"loads whole, and the plan says {made.vllm[0]}")
    return Cell("told", made.vllm[0]) if made.vllm else Cell("loaded")


def faults(ours: dict[str, Any], theirs: dict[str, Any], *, cached: bool) -> str:
    """What vLLM refuses, or leaves empty that it fills from the source; "" where all is well."""
    if ours["error"]:
        return f"vLLM: {ours['error']}"
    empty = [
        f"{name} ({count} of {size})"
        for name, (count, size) in ours["unfilled"].items()
        if name not in theirs["unfilled"]
        and not NOBODY_READS.search(name)
        and (cached or not CACHE_SCALE.search(name))
    ]
    return f"vLLM: {len(empty)} parameters not filled: {', '.join(empty[:3])}" if empty else ""


def cell(python: Path, source: Path, scheme: str, data: Path, out: Path, theirs: Any) -> Cell:
    """Make it and judge it. What ckptq raises that is none of its own errors is WRONG."""
    if theirs["error"]:
        return Cell("source", theirs["error"])
    try:
        made = make(source, scheme, out, data)
    except Exception as error:  # a traceback is what the cell is for
        return Cell("WRONG", f"quantize ends in {type(error).__name__}: {str(error)[:200]}")
    try:
        return judge(python, source, theirs, made, scheme)
    except Exception as error:
        return Cell("WRONG", f"verify ends in {type(error).__name__}: {str(error)[:200]}")
