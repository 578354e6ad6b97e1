"""What `--search` gains and costs, beside llm-compressor's model_free_ptq with the same observer.

    python benchmarks/bench_search.py MODEL --data TEXT [--schemes A,B] [--peers A,B]

For each scheme, plain and searched: KL and perplexity of the text (`ckptq evaluate --device`), and
seconds and peak RSS of a whole `ckptq quantize`. Schemes of `--peers` also go through
model_free_ptq, on a CPU like ckptq's, with the recipe that ckptq writes into its output: same
observer, same groups. Restrict the cores with `taskset`. The table goes to stdout and, with
`--report`, to a file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from measure import Took, machine, run, warm

SCHEMES = "fp8-dynamic,w8a8,w4a16,w4a16-g32,w4a16-asym,mxfp4a16,nvfp4a16"

PEER = """
import sys
from compressed_tensors.quantization import QuantizationScheme
from llmcompressor import model_free_ptq
from ckptq.recipes.load import load_scheme
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
    command += ["--samples", "128", "--seq-len", "512", "--batch-size", "4"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return {row["weights"]: row for row in json.loads(done.stdout)["rows"]}


def converted(model: Path, scheme: str, work: Path, peer: str | None = None) -> Took:
    out = work / "out"
    ours = ["-m", "ckptq", "quantize", model, "-o", out, "-s", scheme, "--device", "cpu"]
    theirs = ["-c", PEER, model, out, scheme, peer or ""]
    warm(model)
    took = run([sys.executable, *(theirs if peer else ours)], sync=work)
    shutil.rmtree(out)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--peers", default="w4a16-g32")
    parser.add_argument("--workers", default="2", help="of model_free_ptq")
    parser.add_argument("--device", default="cpu", help="of evaluate")
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    schemes = [s for name in given.schemes.split(",") for s in (name, f"{name}-search")]
    rows = evaluated(given.model, schemes, given)
    for name, row in rows.items():
        print(name, row["kl"], row["perplexity"], file=sys.stderr, flush=True)
    lines = [
        "| scheme | KL | perplexity | dB | seconds | peak RSS | model_free_ptq |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    with tempfile.TemporaryDirectory() as work:
        for scheme in schemes:
            took = converted(given.model, scheme, Path(work))
            peer = "-"
            if scheme.removesuffix("-search") in given.peers.split(","):
                theirs = converted(given.model, scheme, Path(work), given.workers)
                peer = f"{theirs.seconds:.1f} s, {theirs.peak_bytes / 1e6:.0f} MB"
                peer += f": {theirs.seconds / took.seconds:.1f}x ckptq's"
            row = rows[scheme]
            lines.append(
                f"| {scheme} | {row['kl']:.4f} | {row['perplexity']:.2f} | {row['snr_db']:.2f} "
                f"| {took.seconds:.1f} | {took.peak_bytes / 1e6:.0f} MB | {peer} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    title = f"# Search of scales, {given.model.name} on {machine()}, {date.today()}"
    command = f"`python benchmarks/bench_search.py {' '.join(sys.argv[1:])}`"
    text = "\n".join([title, "", command, "", *lines, ""])
    print(text)
    if given.report is not None:
        given.report.write_text(text)


if __name__ == "__main__":
    main()
