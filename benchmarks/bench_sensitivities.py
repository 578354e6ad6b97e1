"""How fast `ckptq search` gets through a source without text.

    python benchmarks/make_synthetic.py big --shapes llama-8b --layers 2
    OMP_NUM_THREADS=1 python benchmarks/bench_sensitivities.py big

Beside it, reading the same files. The source is in memory where it was just read or written.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator

from measure import machine
from record import Row, add_option, publish

from ckptq.checkpoint.open import open_checkpoint
from ckptq.search.candidates import find_candidates
from ckptq.search.request import SCHEMES
from ckptq.search.weight_errors import WeightErrors

CODE = ("ckptq/search", "ckptq/quantize")
CHUNK = 1 << 24


def rows(model: str) -> Iterator[Row]:
    """GB a second of the Linears' own bytes, by CPU time: others may use the machine too."""
    candidates = find_candidates(open_checkpoint(model), SCHEMES)
    errors = WeightErrors(candidates, "cpu")
    began = time.process_time()
    for each in candidates.sets:
        errors.measure(each, candidates.plans)
    seconds = time.process_time() - began
    nbytes = sum(each.plain_bytes for each in candidates.sets)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    yield {"how": "search", "GB/s": nbytes / 1e9 / seconds, "peak GB": peak, "GB": nbytes / 1e9}
    began, files = time.process_time(), {t.file for t in candidates.ckpt.tensors.values()}
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.read(CHUNK):
                pass
    seconds, nbytes = time.process_time() - began, sum(file.stat().st_size for file in files)
    yield {"how": "read", "GB/s": nbytes / 1e9 / seconds, "GB": nbytes / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    add_option(parser)
    asked = parser.parse_args()
    publish(
        "search-weights",
        "`ckptq search` without text, by CPU time",
        list(rows(asked.model)),
        code=CODE,
        machine=machine(),
        folder=asked.record,
    )


if __name__ == "__main__":
    main()
