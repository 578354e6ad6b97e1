"""What scales in the wrong row order cost a trained Llama-4, in vLLM and in transformers.

    python benchmarks/matrix/run_row_orders.py SOURCE WORK --vllm PYTHON [--stand-ins FILE]

SOURCE is an example checkpoint with its `task.jsonl` (`examples/make_checkpoint.py --family
llama4`). Each format is converted without attention, with attention as ckptq writes it, and with
attention and only the scales permuted to half-split, which is what an engine has in hand that
permutes q/k and forgets their scales, or permutes scales that somebody had permuted before.
Asymmetric INT4 is also forced onto q/k/v, and mended for vLLM. Exact match of greedy answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engines import Engines, Questions, exact_match

ATTENTION = "re:.*self_attn.*"
HEAD = ("checkpoint", "vLLM", "kernels", "transformers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One line of the table."""

    says: str
    recipe: str | None = None
    """None: the source."""
    ignore: tuple[str, ...] = ()
    as_written: bool = False
    permuted: str | None = None
    """The part of q/k that is put in half-split order alone: "scales", "zero-points"."""

    @property
    def folder(self) -> str:
        return self.says.replace(":", "").replace(",", "").replace("/", "").replace(" ", "-")


def variants() -> list[Variant]:
    """All lines, each next to what it is compared with."""
    found = [Variant(says="source")]
    for name, recipe in (("FP8", "fp8-dynamic"), ("INT8", "w8a8"), ("INT4", "w4a16-g32")):
        found += [
            Variant(says=f"{name}, attention left alone", recipe=recipe, ignore=(ATTENTION,)),
            Variant(says=f"{name}, scales of q/k in wrong order", recipe=recipe, permuted="scales"),
            Variant(says=f"{name}, as ckptq writes it", recipe=recipe),
        ]
    asymmetric = "w4a16-asym"
    return [
        *found,
        Variant(says="INT4 asym, attention left alone", recipe=asymmetric, ignore=(ATTENTION,)),
        Variant(says="INT4 asym, forced onto q/k/v", recipe=asymmetric, as_written=True),
        Variant(
            says="INT4 asym, forced, zero points permuted for vLLM",
            recipe=asymmetric,
            as_written=True,
            permuted="zero-points",
        ),
        Variant(says="INT4 asym, as ckptq writes it", recipe=asymmetric),
    ]


def make(variant: Variant, source: Path, work: Path) -> Path:
    """The checkpoint of a line, made if it is not there yet."""
    if variant.recipe is None:
        return source
    out = work / variant.folder
    if out.exists():
        return out
    if variant.permuted is None:
        return _quantize(variant, source, out)
    plain = work / f"{variant.folder}-before"
    if not plain.exists():
        _quantize(variant, source, plain)
    return _permute(plain, out, variant.permuted)


def _quantize(variant: Variant, source: Path, out: Path) -> Path:
    from ckptq.checkpoint.open import open_checkpoint
    from ckptq.convert.run import write_quantized
    from ckptq.plan.make import make_plan
    from ckptq.recipes.load import load_scheme

    ckpt = open_checkpoint(source)
    recipe = load_scheme(str(variant.recipe))
    plan = make_plan(ckpt, recipe, ignore=variant.ignore, permutable=not variant.as_written)
    write_quantized(ckpt, plan, out, arguments={})
    return out


def _permute(folder: Path, out: Path, part: str) -> Path:
    from ckptq.convert.permute import PermuteRequest, permute
    from ckptq.permute.effect import Part
    from ckptq.rope_order import RopeOrder

    only = [Part(part)]
    permute(PermuteRequest(model=folder, out=out, to=RopeOrder.HALF_SPLIT, only=only))
    return out


def read_task(source: Path, samples: int) -> tuple[Questions, list[list[int]]]:
    """Prompts and answers as token ids; an answer ends with the end-of-text token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    lines = (source / "task.jsonl").read_text().splitlines()[:samples]
    rows = [json.loads(line) for line in lines]
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    answers = [
        [*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for row in rows
    ]
    return Questions(prompts=prompts, max_tokens=len(answers[0]), top=1), answers


def row(
    variant: Variant, folder: Path, engines: Engines, answers: Sequence[list[int]]
) -> list[str]:
    vllm, kernels = engines.in_vllm(folder)
    figures = [exact_match(a, answers) for a in (vllm, engines.of("transformers", folder))]
    shown = ["" if figure is None else f"{figure:.1%}" for figure in figures]
    return [variant.says, shown[0], kernels, shown[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--vllm", metavar="PYTHON", help="left out: only transformers is asked")
    parser.add_argument("--stand-ins", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    chosen = parser.parse_args()
    source, work = chosen.source.resolve(), chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    questions, answers = read_task(source, chosen.samples)
    engines = Engines(work / "answers.jsonl", questions, chosen.vllm, chosen.stand_ins)
    folders = {variant: make(variant, source, work) for variant in variants()}
    # quantized experts have no kernel on a CPU, so that nothing is lost by not trying
    engines.ask_all(folders.values(), own_kernels=False)
    rows = (row(variant, folder, engines, answers) for variant, folder in folders.items())
    for line in (HEAD, ["---"] * len(HEAD), *rows):
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
