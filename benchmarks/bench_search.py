"""What `--search` gains and costs, beside llm-compressor's model_free_ptq with the same observer.

    python benchmarks/bench_search.py MODEL [--data TEXT] [--schemes A,B] [--peers A,B]

For each scheme, plain and searched: seconds, CPU seconds and peak RSS of a whole `ckptq quantize`,
and with a text its KL and perplexity (`ckptq evaluate --device`). Searched schemes of `--peers`
also go through model_free_ptq, on a CPU like ckptq's, with the recipe that ckptq writes into its
output: same observer, same groups; "x seconds" and "x CPU" are its time over ckptq's. Restrict the
cores with `taskset`. On a machine that others use, CPU seconds say more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import Took, machine, run, warm
from record import Row, add_option, publish

CODE = ("ckptq/quantize", "ckptq/recipes")
SCHEMES = "fp8-dynamic,w8a8,w4a16,w4a16-g32,mxfp4a16,nvfp4a16"
SEARCHED = "-search"

PEER = """
import sys
from compressed_tensors.quantization import QuantizationScheme
from llmcompressor import model_free_ptq
from loguru import logger
from ckptq.recipes.load import load_scheme
# It estimates its memory with meta tensors first, on which no MSE observer can ask whether an error
# improved; it logs that error ("Tensor.item() cannot be called on meta tensors") and goes on.
logger.remove()
source, out, scheme, workers = sys.argv[1:]
(group,) = load_scheme(scheme).groups
given = {k: v for k, v in group.to_dict().items() if v is not None}
model_free_ptq(source, out, scheme=QuantizationScheme.model_validate(given),
               ignore=["re:.*embed_tokens$", "lm_head"], max_workers=int(workers), device="cpu")
"""


def evaluated(model: Path, schemes: list[str], given: argparse.Namespace) -> dict[str, Any]:
    """Scheme -> its row of `ckptq evaluate`."""
    command = [sys.executable, "-m", "ckptq", "evaluate", str(model), "--data", str(given.data)]
    command += ["--schemes", ",".join(schemes), "--json", "--device", given.device]
    command += ["--samples", given.samples, "--seq-len", "512"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return {row["weights"]: row for row in json.loads(done.stdout)["rows"]}


def converted(command: list[str | Path], out: Path) -> Took:
    """Run a conversion whole, with its source in the page cache."""
    took = run([sys.executable, *command], sync=out.parent)
    shutil.rmtree(out)
    return took


def figures(model: Path, scheme: str, work: Path, given: argparse.Namespace) -> Row:
    """Seconds and memory of the scheme, and of the peer where it is asked for."""
    warm(model)
    out = work / "out"
    ours = ["-m", "ckptq", "quantize", model, "-o", out, "-s", scheme, "--device", "cpu"]
    took = converted(ours, out)
    row = {"seconds": took.seconds, "CPU": took.cpu_seconds, "peak MB": took.peak_bytes / 1e6}
    if not scheme.endswith(SEARCHED) or scheme not in peers(given):
        return row
    theirs = converted(["-c", PEER, model, out, scheme, given.workers], out)
    return row | {
        "peer seconds": theirs.seconds,
        "peer CPU": theirs.cpu_seconds,
        "peer peak MB": theirs.peak_bytes / 1e6,
        "x seconds": theirs.seconds / took.seconds,
        "x CPU": theirs.cpu_seconds / took.cpu_seconds,
    }


def peers(given: argparse.Namespace) -> list[str]:
    return [f"{name}{SEARCHED}" for name in given.peers.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, help="a text, for KL and perplexity")
    parser.add_argument("--samples", default="128", help="of the text")
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--peers", default="fp8-dynamic,w8a8,w4a16-g32,nvfp4a16")
    parser.add_argument("--workers", default="2", help="of model_free_ptq")
    parser.add_argument("--device", default="cpu", help="of evaluate")
    parser.add_argument("--work", type=Path, help="where outputs are written, and deleted")
    add_option(parser)
    given = parser.parse_args()
    schemes = [s for name in given.schemes.split(",") for s in (name, f"{name}{SEARCHED}")]
    scores = evaluated(given.model, schemes, given) if given.data else {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        for scheme in schemes:
            row: dict[str, Any] = {"scheme": scheme}
            if scheme in scores:
                row["KL"] = scores[scheme]["kl"]
                row["perplexity"] = scores[scheme]["perplexity"]
                row["dB"] = scores[scheme]["snr_db"]
            rows.append(row | figures(given.model, scheme, Path(work), given))
            print(rows[-1], file=sys.stderr, flush=True)
    what = f"Search of scales, {given.model.name}"
    publish("search", what, rows, code=CODE, machine=machine(), folder=given.record)


if __name__ == "__main__":
    main()
