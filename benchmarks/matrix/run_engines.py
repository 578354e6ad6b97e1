"""Load every cell of the matrix in vLLM and in transformers, and compare what they answer.

    python benchmarks/matrix/run_engines.py WORK --vllm PYTHON [--stand-ins FILE] [--cells A:B,...]

WORK keeps checkpoints and `answers.jsonl`; a second run asks only what is not answered yet. PYTHON
is the interpreter of an environment with vLLM's CPU build; this one has ckptq and transformers.
`--stand-ins` is tried where vLLM has no kernel for this machine (see `vllm_worker.py`). The table
goes to stdout: mean |delta log probability| over the 20 likeliest first tokens of three prompts,
of ckptq's checkpoint and, where there is one, of llm-compressor's own ("by oneshot").
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from engines import HERE, Engines, Questions, distance, said

sys.path[:0] = [str(HERE.parents[1] / "tests"), str(HERE.parents[1] / "tests" / "matrix")]

QUESTIONS = Questions(
    prompts=[
        [(7 * i + 3) % 500 for i in range(24)],
        [(13 * i * i + 5 * i + 1) % 500 for i in range(31)],
        [11, 400, 27, 5, 99, 123, 77, 250],
    ],
    max_tokens=4,
    top=512,
)
AS_WRITTEN = "as written"
THEIRS = "by oneshot"
BOTH = (
    ("llama", "qwen3-moe", "mixtral", "llama4 moe"),
    ("fp8-dynamic", "fp8-block", "w8a8", "w4a16", "w4a16-g32", "w4a16-asym"),
)
"""Families and formats that llm-compressor converts too: its checkpoint stands beside ours."""
SOURCE = "source"
HEAD = (
    "family", "format", "vLLM", "transformers", "vLLM to transformers", "the same, by oneshot",
    "vLLM to its source", "transformers to its source",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    family: str
    format: str
    """A built-in recipe; "source"; with " as written" for Llama-4's q/k/v in it all the same; with
    " by oneshot" as llm-compressor makes it on a CPU."""

    @property
    def folder(self) -> str:
        return f"{self.family} {self.format}".replace(" ", "-")


def all_cells() -> list[Cell]:
    from matrix_cells import FORMATS
    from matrix_models import FAMILIES

    cells = [Cell(family, format) for family in FAMILIES for format in (SOURCE, *FORMATS)]
    llama4 = [family for family in FAMILIES if family.startswith("llama4")]
    forced = [Cell(family, f"w4a16-asym {AS_WRITTEN}") for family in llama4]
    families, formats = BOTH
    theirs = [Cell(family, f"{format} {THEIRS}") for family in families for format in formats]
    return [*cells, *forced, *theirs]


def make(cell: Cell, work: Path) -> Path:
    """The cell's checkpoint, made if it is not there yet."""
    from matrix_cells import convert
    from matrix_models import save_source

    out = work / cell.folder
    if out.exists():
        return out
    if cell.format == SOURCE:
        return save_source(cell.family, out)
    source = make(Cell(cell.family, SOURCE), work)
    format, _, manner = cell.format.partition(" ")
    if manner == THEIRS:
        from matrix_oneshot import oneshot_folder

        return oneshot_folder(source, format, out)
    return convert(source, out, format, permutable=manner != AS_WRITTEN)


def row(cell: Cell, work: Path, engines: Engines) -> list[str]:
    folder, source = work / cell.folder, work / Cell(cell.family, SOURCE).folder
    vllm, kernels = engines.in_vllm(folder)
    reference = engines.of("transformers", folder)
    return [
        *(cell.family, cell.format, kernels, said(reference)),
        shown(distance(vllm, reference)),
        theirs(cell, work, engines),
        shown(distance(vllm, engines.in_vllm(source)[0])),
        shown(distance(reference, engines.of("transformers", source))),
    ]


def theirs(cell: Cell, work: Path, engines: Engines) -> str:
    """How far the engines are apart on what llm-compressor makes of the cell, or which fails."""
    folder = work / Cell(cell.family, f"{cell.format} {THEIRS}").folder
    vllm, kernels = engines.in_vllm(folder)
    reference = engines.of("transformers", folder)
    if vllm is None and reference is None:
        return ""
    failed = [f"vLLM {kernels}"] if vllm is None else []
    failed += [f"transformers {said(reference)}"] if said(reference) != "yes" else []
    return "; ".join(failed) or shown(distance(vllm, reference))


def shown(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--vllm", metavar="PYTHON", help="left out: only transformers is asked")
    parser.add_argument("--stand-ins", type=Path)
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="N vLLMs share a GPU")
    parser.add_argument("--cells", help="FAMILY:FORMAT,...; default: all")
    chosen = parser.parse_args()
    cells = all_cells()
    if chosen.cells:
        cells = [Cell(*name.split(":")) for name in chosen.cells.split(",")]
    work = chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    answers = work / "answers.jsonl"
    engines = Engines(answers, QUESTIONS, chosen.vllm, chosen.stand_ins, chosen.gpu)
    engines.ask_all([make(cell, work) for cell in cells])
    ours = [cell for cell in cells if not cell.format.endswith(THEIRS)]
    for line in (HEAD, ["---"] * len(HEAD), *(row(cell, work, engines) for cell in ours)):
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
