"""Every family under every scheme, loaded in the real vLLM: what loads, what is refused or told.

    python benchmarks/bench_families.py WORK --vllm PYTHON [--families A,B] [--schemes A,B] > TABLE

PYTHON is that of an environment with vLLM, whose CPU build is enough; this one has ckptq and
transformers. WORK keeps the sources and `cells.jsonl`: a second run asks only what is not answered
yet, but for cells that are WRONG. A cell takes five to ten seconds on one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from measure import machine
from record import Row, add_option, publish

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from families.cells import NOISE, quiet, write_token_ids  # noqa: E402
from families.hub import FP8_BLOCK  # noqa: E402
from families.sources import FAMILIES, save  # noqa: E402
from families.vllm_cells import Cell, cell, load, warm  # noqa: E402

CODE = ("ckptq/plan", "ckptq/models", "ckptq/engines", "ckptq/convert")
OUTCOMES = ("loaded", "refused", "told", "source", "WRONG")
Answers = dict[tuple[str, str], Cell]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--vllm", required=True)
    parser.add_argument("--families", default=",".join((*FAMILIES, *FP8_BLOCK)))
    parser.add_argument("--schemes", default=",".join(NOISE))
    add_option(parser)
    chosen = parser.parse_args()
    families, schemes = chosen.families.split(","), chosen.schemes.split(",")
    chosen.work.mkdir(parents=True, exist_ok=True)
    kept = chosen.work / "cells.jsonl"
    answers = read(kept)
    wanted = [
        (family, scheme)
        for family in families
        for scheme in schemes
        if answers.get((family, scheme), Cell("WRONG")).outcome == "WRONG"
    ]
    with quiet(), warm(chosen.vllm, chosen.work) as python, kept.open("a") as file:
        for key, found in ask(python, wanted, chosen.work):
            answers[key] = found
            print(json.dumps([*key, found.outcome, found.reason]), file=file, flush=True)
            print(*key, found.outcome, found.reason[:300], file=sys.stderr, flush=True)
    print(table(answers, families, schemes))
    where = {"machine": machine(), "folder": chosen.record}
    rows = list(counts(answers, families, schemes))
    publish("families-vllm-0.32", "Families in the real vLLM", rows, code=CODE, **where)


def read(kept: Path) -> Answers:
    """The last answer for each cell."""
    lines = kept.read_text().splitlines() if kept.exists() else []
    return {(f, s): Cell(outcome, reason) for f, s, outcome, reason in map(json.loads, lines)}


def ask(python: Path, wanted: list[tuple[str, str]], work: Path):
    data = write_token_ids(work / "ids.jsonl")
    theirs: dict[str, dict] = {}
    for family, scheme in wanted:
        source = save(family, work / "sources")
        if family not in theirs:
            theirs[family] = load(python, source)
        out = work / "out"
        yield (family, scheme), cell(python, source, scheme, data, out, theirs[family])
        shutil.rmtree(out, ignore_errors=True)


def counts(answers: Answers, families: list[str], schemes: list[str]) -> Iterator[Row]:
    """How many cells of each scheme, and of all, end how."""
    for name, some in (*((scheme, [scheme]) for scheme in schemes), ("all", schemes)):
        found = Counter(answers[family, scheme].outcome for family in families for scheme in some)
        outcomes = {outcome: found[outcome] for outcome in OUTCOMES}
        yield {"scheme": name, **outcomes, "families": len(families), "cells": found.total()}


def table(answers: Answers, families: list[str], schemes: list[str]) -> str:
    """Family x scheme, and the reasons below."""
    lines = [
        "| family | " + " | ".join(schemes) + " |",
        "|---|" + "---|" * len(schemes),
    ]
    reasons: dict[str, list[str]] = {}
    for family in families:
        row = [answers[family, scheme] for scheme in schemes]
        if row[0].outcome == "source":
            reasons.setdefault(f"source: {one_line(row[0].reason)}", []).append(family)
        for scheme, found in zip(schemes, row, strict=True):
            if found.outcome not in ("loaded", "source"):
                key = f"{found.outcome}: {one_line(found.reason)}"
                reasons.setdefault(key, []).append(f"{family} {scheme}")
        lines.append(f"| {family} | " + " | ".join(one.outcome for one in row) + " |")
    lines += ["", *(f"- {', '.join(cells)}: {reason}" for reason, cells in reasons.items())]
    return "\n".join(lines)


def one_line(reason: str) -> str:
    return " ".join(reason.split())[:260]


if __name__ == "__main__":
    main()
