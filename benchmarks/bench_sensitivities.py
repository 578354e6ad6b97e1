"""How fast `ckptq search` gets through a source without text.

    python benchmarks/make_synthetic.py big --shapes llama-405b --layers 63 --sparse
    OMP_NUM_THREADS=1 python benchmarks/bench_sensitivities.py big --fill
    python benchmarks/giants.py giant --model deepseek-v3
    OMP_NUM_THREADS=1 python benchmarks/bench_sensitivities.py giant --fill --name search-giant
    python benchmarks/uneven.py uneven [--experts]
    OMP_NUM_THREADS=1 python benchmarks/bench_sensitivities.py uneven --whole

`--fill` first writes numbers into those rows of a source of holes that search reads, and lets the
machine forget them. `--whole` then reads every row of every expert, and says how far off a sample
is: its losses, and the loss of what is chosen by it.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Iterator
from statistics import mean

from giants import pools
from measure import machine
from record import Row, add_option, publish

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.open import open_checkpoint
from ckptq.checkpoint.view import View
from ckptq.models.weight import Weight
from ckptq.search import weight_errors
from ckptq.search.candidates import PLAIN, Candidates, find_candidates
from ckptq.search.choice import Choices
from ckptq.search.request import SCHEMES
from ckptq.search.sensitivities import Losses
from ckptq.search.weight_errors import WeightErrors

CODE = ("ckptq/search", "ckptq/quantize")
EVERY = 1 << 60
BITS = (4.6, 5, 6, 8)


def losses(candidates: Candidates) -> Losses:
    errors = WeightErrors(candidates, "cpu")
    return {e.name: {**errors.measure(e, candidates.plans), PLAIN: 0} for e in candidates.sets}


def fill(candidates: Candidates) -> None:
    """Random numbers into the rows that are read, and the scales of FP8: of one seed, each from
    another place on."""
    made, errors, at = pools(0), WeightErrors(candidates, "cpu"), 0
    for each in candidates.sets:
        for weight, start, stop in errors.places(each):
            for tensor, first, last in stored_rows(weight, start, stop):
                row, numbers = tensor.nbytes // tensor.spec.shape[0], made[tensor.spec.dtype]
                nbytes = (last - first) * row
                at = (at + 7_340_032) % (len(numbers) - nbytes)
                with tensor.file.open("r+b", buffering=0) as opened:
                    os.pwrite(
                        opened.fileno(), numbers[at : at + nbytes], tensor.offset + first * row
                    )
    for file in {t.file for t in candidates.ckpt.tensors.values()}:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def stored_rows(weight: Weight, start: int, stop: int) -> Iterator[tuple[StoredTensor, int, int]]:
    """Rows of the tensors that hold these rows of a weight."""
    if isinstance(weight, View):
        yield weight.stored, start, stop
        return
    for local, tensor in weight.tensors.items():
        yield tensor, *weight.span(local, start, stop)


def rows(model: str, whole: bool, filled: bool) -> Iterator[Row]:
    """CPU time beside the clock: others may use the machine too."""
    candidates = find_candidates(open_checkpoint(model), SCHEMES)
    if filled:
        fill(candidates)
        candidates = find_candidates(open_checkpoint(model), SCHEMES)
    began, cpu, before = time.monotonic(), time.process_time(), resource.getrusage(0).ru_inblock
    found = losses(candidates)
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    nbytes = sum(each.plain_bytes for each in candidates.sets)
    row: Row = {
        "how": "search",
        "GB": nbytes / 1e9,
        "seconds": seconds,
        "CPU seconds": cpu,
        "GB/s": nbytes / 1e9 / cpu,
        "GB from disk": (resource.getrusage(0).ru_inblock - before) * 512 / 1e9,
        "peak GB": resource.getrusage(0).ru_maxrss / 1e6,
    }
    yield row
    if whole:
        cpu = time.process_time()
        weight_errors.ENOUGH, weight_errors.EXPERTS = EVERY, EVERY
        every = losses(candidates)
        cpu = time.process_time() - cpu
        off = [abs(found[n][s] / every[n][s] - 1) for n in every for s in candidates.plans]
        chosen, best = Choices(candidates, found), Choices(candidates, every)
        worse = [
            best.point("", a).loss / best.point("", b).loss - 1
            for limit in (bits * candidates.weights / 8 for bits in BITS)
            if (a := chosen.within_bytes(limit)) and (b := best.within_bytes(limit))
        ]
        yield {
            "how": "every row",
            "GB": nbytes / 1e9,
            "CPU seconds": cpu,
            "losses apart %": 100 * mean(off),
            "most apart %": 100 * max(off),
            "choice worse by %": 100 * max(worse),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--fill", action="store_true")
    parser.add_argument("--name", default="search-weights", help="of the record")
    add_option(parser)
    asked = parser.parse_args()
    publish(
        asked.name,
        "`ckptq search` without text",
        list(rows(asked.model, asked.whole, asked.fill)),
        code=CODE,
        machine=machine(),
        folder=asked.record,
    )


if __name__ == "__main__":
    main()
