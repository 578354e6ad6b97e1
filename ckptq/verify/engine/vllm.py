"""`--engine vllm --vllm-python PYTHON`: the real vLLM builds its class and loads by headers alone.

vLLM has its own environment: `vllm_worker.py` runs there as a script, JSON in and out.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from textwrap import shorten
from typing import Any

from ckptq.checkpoint.open import CONFIG, Checkpoint
from ckptq.engines.table import load_table
from ckptq.errors import MachineError, UsageError
from ckptq.printable import listed
from ckptq.recipes.declared import Declared, read_declared
from ckptq.spec import DTYPES, FLOATS
from ckptq.verify.kinds import finding
from ckptq.verify.report import Asked, EngineRun, Finding

WORKER = Path(__file__).with_name("vllm_worker.py")
ANSWER = {"version", "error", "at", "parameters", "kernels"}
"""Keys of what the worker prints."""
SECONDS = 1800
"""Tiny checkpoints take ten, mostly for imports; 140,000 tensors take a few minutes."""

CACHE_SCALE = re.compile(r"^(?P<module>.+?)(\.attn)?\.(?P<local>[qkv]_scale)$")
OPTIONAL = re.compile(r"\.(weight_shape|[qkv]_zero_point|prob_scale)$")
"""Parameters that vLLM creates but never reads."""
INPUT_SCALE = re.compile(r"\.(w\d+_)?input_(global_)?scale$")

PLAIN = frozenset(DTYPES[name][0] for name in FLOATS)
CODES = frozenset(DTYPES[name][0] for name in ("F8_E4M3", "F8_E5M2", "I8", "U8", "I32"))
LONGEST = 300


def ask_vllm(ckpt: Checkpoint, python: Path) -> Asked:
    """What vLLM in the environment of `python` loads, and what it leaves unfilled.

    Raises UsageError if that is not a Python with vLLM, MachineError if vLLM crashes or times out.
    """
    began = time.monotonic()
    told = _work(ckpt, python)
    parameters = told["parameters"]
    if told["error"] is not None:
        findings = [_refused(ckpt, told)]
    else:
        findings = list(_judge(ckpt, parameters))
    remarks = [] if told["kernels"] else ["CPU build: refusals of GPU kernels were not tested"]
    run = EngineRun(
        name="vllm",
        version=told["version"],
        real=True,
        places=len(parameters),
        seconds=time.monotonic() - began,
        remarks=tuple(remarks),
    )
    return Asked(run=run, findings=tuple(findings))


def _work(ckpt: Checkpoint, python: Path) -> dict[str, Any]:
    request = {"path": str(ckpt.path.resolve()), "tensors": _in_order(ckpt)}
    try:
        done = subprocess.run(
            [python, WORKER], input=json.dumps(request), capture_output=True, text=True,
            timeout=SECONDS, check=False,
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"--vllm-python {python}: cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise MachineError(f"{python}: vLLM took more than {SECONDS} s to load headers") from error
    if "No module named 'vllm'" in done.stderr and not done.stdout:
        raise UsageError(f"--vllm-python {python}: has no vLLM; pass the Python that has it")
    told = _answer(done.stdout)
    if told is None:
        raise _no_answer(python, done)
    return told


def _answer(text: str) -> dict[str, Any] | None:
    """The worker's answer; None for any other text."""
    try:
        told = json.loads(text)
    except json.JSONDecodeError:
        return None
    return told if isinstance(told, dict) and told.keys() >= ANSWER else None


def _no_answer(python: Path, done: subprocess.CompletedProcess[str]) -> Exception:
    """MachineError with vLLM's last output; UsageError without any: it is not a Python."""
    lines = [line for line in done.stderr.splitlines() if line.strip()][-3:]
    if lines:
        said = " / ".join(lines)[-600:]
        return MachineError(f"{python}: vLLM ended with exit code {done.returncode}: {said}")
    printed = f"printed {shorten(done.stdout, 80)!r}" if done.stdout.strip() else "printed nothing"
    return UsageError(
        f"--vllm-python {python}: {printed} and ended with exit code {done.returncode}; "
        f"expected the answer of {WORKER.name} from a Python with vLLM"
    )


def _in_order(ckpt: Checkpoint) -> list[list[Any]]:
    """File by file, and by name within one, as vLLM's loader and safetensors go."""
    tensors = sorted(ckpt.tensors.items(), key=lambda pair: (_natural(pair[1].file.name), pair[0]))
    return [[name, DTYPES[t.spec.dtype][0], list(t.spec.shape)] for name, t in tensors]


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _refused(ckpt: Checkpoint, told: Mapping[str, Any]) -> Finding:
    at = told["at"]
    file = ckpt.tensors[at].file if at in ckpt.tensors else CONFIG
    found = f"vllm: {shorten(told['error'], LONGEST, placeholder=' ...')}"
    return finding("engine-refuses", at, file=file, found=found, wanted="a checkpoint it loads")


def _judge(ckpt: Checkpoint, parameters: list[dict[str, Any]]) -> Iterator[Finding]:
    declared = read_declared(ckpt, lambda *_: None)
    engine = load_table().architecture(ckpt.config.get("architectures") or ())
    empty: dict[str, list[str]] = defaultdict(list)
    for one in parameters:
        name, size = one["name"], prod(one["shape"])
        scale = CACHE_SCALE.match(name)
        if not _is_read(name, declared) or (engine and engine.leaves_empty(name)):
            continue
        if scale and one["filled"] < size:
            where, used = f"{scale['module']}.{scale['local']}", "vllm: missing: 1.0 is used"
            yield finding("engine-default", where, found=used, wanted="the stored scale")
        elif one["filled"] == 0 and size:
            module, _, local = name.rpartition(".")
            empty[module].append(local)
        elif one["filled"] < size:
            yield _partly(one, size)
        if _cast(one):
            found = f"vllm: {', '.join(one['sources'])} on disk"
            yield finding("engine-shape", name, found=found, wanted=one["dtype"])
    for module, locals_ in empty.items():
        found = f"vllm: no tensor for {listed(locals_)}"
        yield finding("engine-unfilled", module, found=found, wanted="a tensor for every parameter")


def _is_read(parameter: str, declared: Declared) -> bool:
    """Whether anything reads it under this scheme: vLLM creates static input scales for NVFP4
    experts even in weight-only schemes."""
    if CACHE_SCALE.match(parameter):
        return declared.kv_cache_scheme is not None
    if INPUT_SCALE.search(parameter):
        return any(group.inputs is not None for group in declared.groups)
    return not OPTIONAL.search(parameter)


def _partly(one: Mapping[str, Any], size: int) -> Finding:
    """A merged parameter that lacks a part, or experts."""
    rows = one["rows"]
    bare = f"; nothing in {listed(rows)} of {one['shape'][0]}" if rows else ""
    found = f"vllm: {one['filled']:,} of {size:,} elements{bare}"
    wanted = "a tensor for every part"
    return finding("engine-partly-filled", one["name"], found=found, wanted=wanted)


def _cast(one: Mapping[str, Any]) -> bool:
    """Whether codes were silently copied into floats, or floats into codes."""
    sources, place = set(one["sources"]), one["dtype"]
    return bool((sources & PLAIN and place in CODES) or (sources & CODES and place in PLAIN))
