"""What `ckptq search` finds for a size, beside one scheme for all and the usual rule of thumb.

    python benchmarks/bench_bits.py MODEL --data TEXT --held-out TEXT [--bits 4.5,5,6]
        [--plan "auto-round=plan.json"] [--kv-bits 6,8,10]
    python benchmarks/bench_bits.py MODEL --data TEXT --task QUESTIONS

For every budget: the choice by KL on the text, of sets or of whole layers, the choice by the
weights alone, and "ends": FP8 in as many of the first and last layers as fit, NVFP4 in the others.
Beside them every scheme by itself, and plans of other tools (peer_plans.py). All are measured by
`ckptq evaluate` on held-out text, or on the answers of a task. `--kv-bits` compares caches instead,
with weights as they are. Sensitivities are kept in `--kept`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measure import machine
from record import Row, add_option, gpu, publish

from ckptq.checkpoint.open import Checkpoint, open_checkpoint
from ckptq.evaluate.result import Evaluation
from ckptq.evaluate.run import evaluate
from ckptq.evaluate.scores import Measures
from ckptq.evaluate.text import read_questions, text_of
from ckptq.models.family import LAYER
from ckptq.recipes.load import load_recipe, load_scheme
from ckptq.recipes.scheme import Recipe
from ckptq.search.candidates import PLAIN, LinearSet, find_candidates
from ckptq.search.choice import Budget, Choices
from ckptq.search.mixed import mixed_recipe
from ckptq.search.request import SearchRequest, search
from ckptq.search.result import Found
from ckptq.show.console import note, progress
from ckptq.text.samples import read_samples

CODE = ("ckptq/search", "ckptq/forward", "ckptq/quantize")
WAYS = ("by KL", "by KL of layers", "by weights")
LOW, HIGH = "nvfp4a16", "fp8-dynamic"


def recipes(asked: argparse.Namespace, ckpt: Checkpoint) -> Iterator[tuple[Recipe, float]]:
    """Each with the bits per weight of its Linears."""
    candidates = find_candidates(ckpt, asked.schemes)
    choices = Choices(candidates, {e.name: dict.fromkeys(e.nbytes, 0.0) for e in candidates.sets})
    for point in choices.uniform():
        yield load_scheme(point.name), point.bits
    for bits in asked.bits:
        for how in asked.ways:
            yield searched(asked, bits, how)
        chosen = ends(candidates.sets, choices, bits)
        name = f"{bits:g} bits, ends"
        yield mixed_recipe(name, candidates, chosen, ()), choices.point(name, chosen).bits
    for given in asked.plan:
        name, _, file = given.partition("=")
        chosen = planned(candidates.sets, json.loads(Path(file).read_text()))
        yield mixed_recipe(name, candidates, chosen, ()), choices.point(name, chosen).bits


def planned(sets: tuple[LinearSet, ...], plan: Mapping[str, str]) -> dict[str, str]:
    """Set -> scheme, of Linear -> scheme; where a set's differ, the one of most bits."""
    return {
        each.name: max((plan.get(n, PLAIN) for n in each.linears), key=each.nbytes.__getitem__)
        for each in sets
    }


def searched(asked: argparse.Namespace, bits: float, how: str) -> tuple[Recipe, float]:
    with TemporaryDirectory() as folder:
        found = found_in(asked, Path(folder), bits, how)
        return replace(load_recipe(found.recipe), name=f"{bits:g} bits, {how}"), found.total.bits


def found_in(asked: argparse.Namespace, folder: Path, bits: float, how: str, **more: Any) -> Found:
    with progress() as begin:
        request = SearchRequest(
            model=asked.model,
            budget=Budget(bits=bits),
            output=folder / "recipe.yaml",
            sensitivities=asked.kept / f"{how.replace(' ', '-')}.json",
            schemes=asked.schemes,
            data=None if how == WAYS[-1] else asked.data,
            per="layer" if how == WAYS[1] else "set",
            samples=asked.samples,
            seq_len=asked.seq_len,
            device=asked.device,
            **more,
        )
        return search(request, begin, note)


def ends(sets: tuple[LinearSet, ...], choices: Choices, bits: float) -> dict[str, str]:
    """HIGH in the first, the last, the second, ... layer, as long as it fits; LOW elsewhere."""
    layers = {each.name: int(match["index"]) for each in sets if (match := LAYER.match(each.name))}
    last = max(layers.values())
    order = [at for pair in zip(range(last + 1), range(last, -1, -1), strict=True) for at in pair]
    low = LOW if LOW in choices.candidates.schemes else choices.candidates.schemes[0]
    found = dict.fromkeys(layers, low)
    for layer in order[: last + 1]:
        more = found | {name: HIGH for name, at in layers.items() if at == layer}
        if choices.point("", more).bits > bits:
            break
        found = more
    return found


def rows(asked: argparse.Namespace) -> Iterator[Row]:
    ckpt = open_checkpoint(asked.model)
    made = list(recipes(asked, ckpt))
    found = measured(asked, ckpt, schemes=[recipe for recipe, _ in made])
    for (recipe, bits), row in zip(made, found.rows, strict=True):
        yield {
            "scheme": recipe.name,
            "bits": bits,
            "MB": row.nbytes / 1e6,
            **quality(row.measures),
        }
    yield {
        "scheme": "the source",
        "bits": 16,
        "MB": ckpt.nbytes / 1e6,
        **quality(replace(found.source.measures, kl=found.zero.measures.kl)),
    }


def cache_rows(asked: argparse.Namespace) -> Iterator[Row]:
    """Every cache by itself, and what is chosen for each budget."""
    ckpt, bits = open_checkpoint(asked.model), {}
    with TemporaryDirectory() as folder:
        for budget in asked.kv_bits:
            found = found_in(asked, Path(folder), asked.bits[0], asked.ways[0], kv_bits=budget)
            assert found.kv_cache is not None
            for point in (*found.kv_cache.uniform, found.kv_cache.point):
                bits[point.name] = point.bits
    evaluation = measured(asked, ckpt, caches=list(bits))
    for row in evaluation.rows:
        yield {
            "cache": row.kv_cache,
            "bits": bits[row.kv_cache],
            **quality(row.measures),
        }


def quality(found: Measures) -> Row:
    known = {"KL": found.kl, "perplexity": found.perplexity}
    return known if found.accuracy is None else {**known, "accuracy %": 100 * found.accuracy}


def measured(asked: argparse.Namespace, ckpt: Checkpoint, **what: Any) -> Evaluation:
    held_out, questions = None, []
    if asked.held_out is not None:
        held_out = read_samples(asked.held_out, ckpt.path, samples=asked.texts, seq_len=512)
    if asked.task is not None:
        questions = read_questions(asked.task, ckpt.path)
    text = text_of(held_out, questions, str(asked.task))
    with progress() as begin:
        return evaluate(ckpt, text, device=asked.device, begin=begin, **what)


def numbers(given: str) -> list[float]:
    return [float(each) for each in given.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="the text that sensitivities are taken of")
    parser.add_argument("--held-out", help="the text that results are measured on")
    parser.add_argument("--task", type=Path, help="questions, as `evaluate` takes them")
    parser.add_argument("--bits", type=numbers, default=[4.5, 5, 6])
    parser.add_argument("--kv-bits", type=numbers, default=[])
    parser.add_argument("--plan", action="append", default=[], help="NAME=FILE.json")
    parser.add_argument(
        "--ways", type=lambda names: names.split(","), default=WAYS, help=", ".join(WAYS)
    )
    parser.add_argument("--name", default=None, help="of the record")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--schemes",
        type=lambda names: names.split(","),
        default=["w4a16-channel", LOW, HIGH, PLAIN],
    )
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--kept", type=Path, default=Path("sensitivities"), help="a folder")
    add_option(parser)
    asked = parser.parse_args()
    asked.kept.mkdir(exist_ok=True)
    publish(
        asked.name or ("search-kv-bits" if asked.kv_bits else "search-bits"),
        "`ckptq search`: KL on held-out text",
        list(cache_rows(asked) if asked.kv_bits else rows(asked)),
        code=CODE,
        machine=gpu() if asked.device.startswith("cuda") else machine(),
        folder=asked.record,
    )


if __name__ == "__main__":
    main()
