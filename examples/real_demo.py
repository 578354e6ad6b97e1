"""Five schemes on the real model, each quantized, verified, measured and loaded, in one table.

    python examples/real_demo.py FOLDER

FOLDER is what examples/real_model.py has written. Every scheme goes through `ckptq quantize`,
`ckptq verify` and `ckptq evaluate`; then transformers loads the checkpoint (examples/kl.py) and,
where VLLM_PYTHON names a Python that has vLLM, vLLM does (examples/vllm_perplexity.py). Exit code 1
where a checkpoint is not right, or transformers' KL is more than 5 % from what `evaluate` says.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Of every command that is run here. Threads that spin while they wait make it all several times
# slower where other work shares the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

EXAMPLES = Path(__file__).parent
SCHEMES = ("fp8-per-head", "fp8-dynamic", "w8a8", "w4a16-g32", "nvfp4a16")
CALIBRATED = ("fp8-per-head",)
MAX_DIFFERENCE = 0.05
"""Between the KL that `evaluate` says and transformers': they round activations in other dtypes."""
MAX_VLLM = 0.02
"""Between perplexities: on a CPU vLLM has one cache scale for all heads and cuts k and v."""


@dataclass(frozen=True)
class Files:
    """Where everything lies."""

    folder: Path

    @property
    def source(self) -> Path:
        return self.folder / "smollm2"

    @property
    def calibration(self) -> Path:
        return self.folder / "calibration.jsonl"

    @property
    def held_out(self) -> Path:
        return self.folder / "held-out.jsonl"

    def checkpoint(self, scheme: str) -> Path:
        return self.folder / scheme


@dataclass(frozen=True)
class Measured:
    """One checkpoint; the source's row has no KL."""

    name: str
    nbytes: int
    perplexity: float
    perplexity_transformers: float
    kl: float = 0.0
    kl_transformers: float = 0.0
    perplexity_vllm: float | None = None
    stand_in: str | None = None

    @property
    def difference(self) -> float:
        """Of transformers' KL, as a share of what `evaluate` says."""
        return self.kl_transformers / self.kl - 1 if self.kl else 0.0

    @property
    def difference_vllm(self) -> float:
        """Of vLLM's perplexity from transformers'."""
        found = self.perplexity_vllm
        return 0.0 if found is None else found / self.perplexity_transformers - 1


def run(*command: str | Path) -> None:
    """Show a command and run it. SystemExit where it fails."""
    if code := subprocess.run(_shown(command), check=False).returncode:
        raise SystemExit(f"exit code {code}")


def ask(*command: str | Path) -> dict[str, Any]:
    """The JSON in which a command's output ends; all that it says where it fails."""
    made = subprocess.run(_shown(command), capture_output=True, text=True, check=False)
    if made.returncode:
        raise SystemExit(f"{made.stdout}{made.stderr}\nexit code {made.returncode}")
    start = f"\n{made.stdout}".rindex("\n{")  # what is nested is indented
    return json.loads(made.stdout[start:])


def _shown(command: Sequence[str | Path]) -> list[str]:
    words = [str(word) for word in command]
    print(f"\n$ {' '.join(words)}", flush=True)
    return [sys.executable, "-m", *words] if words[0] == "ckptq" else words


def quantize_and_verify(files: Files, scheme: str) -> None:
    out = files.checkpoint(scheme)
    shutil.rmtree(out, ignore_errors=True)
    text = ("--data", files.calibration, "--samples", "32", "--seq-len", "512")
    options = text if scheme in CALIBRATED else ()
    run("ckptq", "quantize", files.source, "--scheme", scheme, "-o", out, *options)
    run("ckptq", "verify", out, "--source", files.source)


def evaluate(files: Files, scheme: str) -> dict[str, Any]:
    """What `ckptq evaluate` says on the held-out text."""
    compared = (files.checkpoint(scheme), "--source", files.source, "--data", files.held_out)
    return ask("ckptq", "evaluate", *compared, "--batch-size", "4", "--json")


def in_transformers(files: Files) -> dict[str, Any]:
    """KL and perplexity by checkpoint, the source's among them."""
    every = [files.source, *map(files.checkpoint, SCHEMES)]
    script = (sys.executable, EXAMPLES / "kl.py")
    return ask(*script, files.source, *every, "--data", files.held_out, "--json")


def in_vllm(python: str, files: Files, checkpoint: Path) -> dict[str, Any]:
    """Perplexity, and what stood in for a kernel that vLLM lacks here."""
    return ask(python, EXAMPLES / "vllm_perplexity.py", checkpoint, files.held_out)


def measure(files: Files, vllm_python: str | None) -> list[Measured]:
    """The source, then every scheme."""
    said = {scheme: evaluate(files, scheme) for scheme in SCHEMES}
    loaded = in_transformers(files)
    rows = {files.source: said[SCHEMES[0]]["source"]}
    rows |= {files.checkpoint(scheme): found["rows"][0] for scheme, found in said.items()}
    found = []
    for checkpoint, row in rows.items():
        engine = in_vllm(vllm_python, files, checkpoint) if vllm_python else {}
        found.append(
            Measured(
                name=checkpoint.name,
                nbytes=row["bytes"],
                perplexity=row["perplexity"],
                perplexity_transformers=loaded[str(checkpoint)]["perplexity"],
                kl=row["kl"],
                kl_transformers=loaded[str(checkpoint)]["kl"],
                perplexity_vllm=engine.get("perplexity"),
                stand_in=engine.get("stand_in"),
            )
        )
    return found


def table(found: Sequence[Measured]) -> Iterable[str]:
    """One line a checkpoint, and what the columns say."""
    with_vllm = found[0].perplexity_vllm is not None
    yield "                    MB   KL(source‖row), nats per token     perplexity"
    yield "                         evaluate  transformers  apart    evaluate  transformers" + (
        "   vLLM" * with_vllm
    )
    for row in found:
        kl = f"{row.kl:8.4f}  {row.kl_transformers:12.4f} {row.difference:+6.1%}"
        line = f"{row.name:16} {row.nbytes / 1e6:5.0f}   {kl if row.kl else ' ' * 29}"
        line += f"  {row.perplexity:10.2f}  {row.perplexity_transformers:12.2f}"
        line += f"  {row.perplexity_vllm:5.2f}" if row.perplexity_vllm is not None else ""
        yield line + (f"  ({row.stand_in}: not vLLM's)" if row.stand_in else "")


def faults(found: Sequence[Measured]) -> Iterable[str]:
    """What does not agree."""
    for row in found:
        if not abs(row.difference) <= MAX_DIFFERENCE:
            yield f"{row.name}: transformers' KL is {row.difference:+.1%} from evaluate's"
        if not abs(row.difference_vllm) <= MAX_VLLM:
            yield f"{row.name}: vLLM's perplexity is {row.difference_vllm:+.1%} from transformers'"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    files = Files(parser.parse_args().folder)
    for scheme in SCHEMES:
        quantize_and_verify(files, scheme)
    found = measure(files, os.environ.get("VLLM_PYTHON"))
    print("\n" + "\n".join(table(found)))
    if wrong := list(faults(found)):
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
