"""`ckptq evaluate` on a GPU beside a plain transformers forward, in the shape of a real model.

    python benchmarks/bench_evaluate_gpu.py [--shape llama-70b] [--layers 4] [--samples 32]
        [--work DIR] [--record DIR]

A random checkpoint is written first and read once, so that it lies in the page cache. Then, each in
a process of its own and on the same random tokens: the plain forward with the model resident (in
the same batches, without the output head, after a pass that warms up), and `evaluate` with two
schemes and three caches, twice: the first compiles kernels. A row's seconds are those in which the
device ran its batches through the layers, rounding included, the first layer counted as the mean of
the others: there a process loads its kernels, which the plain forward has done before. Reading,
quantizing and the output head are in the whole. With fewer `--layers` than the shape has the whole
says nothing of the full model, but memory does, as one layer is there at a time: the table names
them. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from make_synthetic import SHAPES, make
from measure import warm
from record import Row, add_option, gpu, publish

CODE = ("ckptq/evaluate", "ckptq/forward", "ckptq/quantize", "ckptq/kernels")
SCHEMES = ("fp8-dynamic", "w4a16")
CACHES = ("fp8-per-head", "int8-per-token-head", "int4-per-token-head")
TITLES = {"llama-8b": "Llama-8B", "llama-70b": "Llama-70B"}
VOCABULARY = 128256
LINE = 511


def lines(samples: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCABULARY, (samples, LINE), generator=generator).tolist()


def plain(model: Path, samples: int) -> dict[str, Any]:
    """Seconds of the layers, the model resident."""
    import torch
    import transformers

    from ckptq.evaluate.text import TOKENS_AT_ONCE

    loaded = transformers.LlamaForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, attn_implementation="sdpa", device_map="cuda"
    ).eval()
    batches = torch.tensor(lines(samples), device="cuda").split(TOKENS_AT_ONCE // LINE)
    with torch.no_grad():
        for batch in batches:
            loaded.model(input_ids=batch, use_cache=False)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for batch in batches:
            loaded.model(input_ids=batch, use_cache=False)
        torch.cuda.synchronize()
    return {
        "seconds": time.perf_counter() - began,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "machine": f"{gpu()}, transformers {transformers.__version__}",
    }


def evaluated(model: Path, samples: int) -> dict[str, Any]:
    """Seconds of `evaluate`, of every row, and of loading."""
    import torch
    import transformers

    from ckptq.checkpoint.open import open_checkpoint
    from ckptq.evaluate.run import evaluate
    from ckptq.evaluate.text import Line, Text
    from ckptq.forward.loader import Loader
    from ckptq.recipes.load import load_scheme

    transformers.LlamaForCausalLM  # noqa: B018, imports it: start-up has a column of its own
    text = Text(tuple(Line(tuple(ids)) for ids in lines(samples)), "random tokens")
    loading: list[float] = []
    Loader.load = _timed(Loader.load, loading)  # type: ignore[method-assign]
    with rows_timed() as events:
        found = evaluate(
            open_checkpoint(model),
            text,
            caches=CACHES,
            schemes=[load_scheme(name) for name in SCHEMES],
            device="cuda",
        )
    torch.cuda.synchronize()
    rows = {name: _seconds(layers) for name, layers in events.items()}
    return {
        "seconds": found.seconds,
        "loading": sum(loading),
        "rows": rows,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "kl": {f"{row.weights} / {row.kv_cache}": row.measures.kl for row in found.rows},
        "zero": found.zero.measures.kl,
    }


def _seconds(layers: dict[int, list[tuple[Any, Any]]]) -> float:
    """Of all layers, from all but the first."""
    later = [pair for index, pairs in layers.items() if index for pair in pairs]
    took = sum(start.elapsed_time(end) for start, end in later) / 1000
    return took * len(layers) / (len(layers) - 1)


@contextmanager
def rows_timed() -> Iterator[dict[str, dict[int, list[tuple[Any, Any]]]]]:
    """CUDA events around every batch of every row in every layer, by row and layer."""
    import torch

    from ckptq.evaluate.watching import Watching

    events: dict[str, dict[int, list[tuple[Any, Any]]]] = defaultdict(lambda: defaultdict(list))
    watch_of = Watching.layer

    def timed(self: Any, track: Any, index: int) -> Any:
        watch = watch_of(self, track, index)

        @contextmanager
        def both(layer: Any, run: Any) -> Iterator[None]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            around = watch(layer, run)
            assert around is not None, run.variant.name
            with around:
                yield
            end.record()
            events[run.variant.name][index].append((start, end))

        return both

    Watching.layer = timed  # type: ignore[method-assign]
    try:
        yield events
    finally:
        Watching.layer = watch_of  # type: ignore[method-assign]


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - began)
        return result

    return timed


def in_a_process(what: str, model: Path, samples: int) -> dict[str, Any]:
    """What a child measured, and the seconds of its whole process."""
    began = time.perf_counter()
    command = [sys.executable, __file__, "--child", what, "--work", str(model)]
    done = subprocess.run(
        [*command, "--samples", str(samples)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1]) | {"process": time.perf_counter() - began}


def rows(samples: int, found: dict[str, dict[str, Any]]) -> Iterator[Row]:
    """The plain forward, both runs whole, and each row of the second beside the plain forward."""
    tokens, base = samples * LINE, found["plain"]["seconds"]
    yield {"what": "plain", "seconds": base, "tokens/s": tokens / base, **_memory(found["plain"])}
    for name in ("first", "second"):
        run = found[name]
        yield {
            "what": f"{name} run",
            "seconds": run["seconds"],
            "with start-up": run["process"],
            "loading": run["loading"],
            "all rows": sum(run["rows"].values()),
            **_memory(run),
        }
    ours = found["second"]["rows"]
    for row, seconds in {**ours, "slowest row": max(ours.values())}.items():
        speed = {"seconds": seconds, "tokens/s": tokens / seconds, "x plain": base / seconds}
        yield {"what": row, **speed}


def _memory(run: dict[str, Any]) -> dict[str, float]:
    return {"device GiB": run["peak_bytes"] / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=TITLES, default="llama-8b")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--samples", type=int, default=32, help=f"lines of {LINE} tokens")
    parser.add_argument("--work", type=Path, help="where the checkpoint is written, and stays")
    add_option(parser)
    parser.add_argument("--child", choices=("plain", "evaluate"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        run = {"plain": plain, "evaluate": evaluated}[given.child]
        print(json.dumps(run(given.work, given.samples)))
        return
    with tempfile.TemporaryDirectory() as folder:
        shape = replace(SHAPES[given.shape], vocab=VOCABULARY)
        shape = replace(shape, layers=given.layers or shape.layers)
        model = (given.work or Path(folder)) / f"{given.shape}-{shape.layers}"
        if not model.exists():
            make(model, shape)
        warm(model)
        runs = {"plain": "plain", "first": "evaluate", "second": "evaluate"}
        found = {name: in_a_process(what, model, given.samples) for name, what in runs.items()}
    publish(
        "evaluate-gpu" if given.shape == "llama-8b" else f"evaluate-gpu-{given.shape}",
        f"`ckptq evaluate`, {TITLES[given.shape]} shape, {shape.layers} layers, "
        f"{given.samples * LINE} tokens",
        list(rows(given.samples, found)),
        code=CODE,
        machine=found["plain"]["machine"],
        folder=given.record,
    )


if __name__ == "__main__":
    main()
