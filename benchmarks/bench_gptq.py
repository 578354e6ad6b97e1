"""What GPTQ and iMatrix gain and cost.

    python benchmarks/bench_gptq.py quality MODEL --data TEXT --held-out TEXT [--schemes A,B]
    python benchmarks/bench_gptq.py layer dense|experts [--device cuda] [--samples N]

`quality`: each scheme is written by `ckptq quantize` and measured by `ckptq evaluate` on held-out
text: KL, perplexity, dB, size, seconds and peak RSS. `layer`: one layer of Llama 3.1 8B's shapes,
or one with 128 experts of Qwen3-30B-A3B's, quantized by ckptq and by llm-compressor's oneshot from
the same tokens: seconds, peak memory, and the share of codes that are equal.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from measure import machine, run, warm

SCHEMES = (
    *("w4a16-g32", "w4a16-g32-search", "w4a16-g32-gptq", "w4a16-g32-imatrix-gptq"),
    *("nvfp4a16", "nvfp4a16-search", "nvfp4a16-gptq", "nvfp4a16-imatrix-gptq"),
    *("w8a8", "w8a8-imatrix-gptq"),
)

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": (
        "Llama",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
         "num_key_value_heads": 8, "num_hidden_layers": 1, "vocab_size": 1024},
    ),
    "experts": (
        "Qwen3Moe",
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32,
         "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
         "num_hidden_layers": 1, "vocab_size": 1024},
    ),
}  # fmt: skip

MAKE = """
import json, sys, torch, transformers
family, sizes, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
model_class = getattr(transformers, f"{family}ForCausalLM")
model_class(model_class.config_class(**sizes)).save_pretrained(out)
"""

PEER = """
import json, sys, torch, transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from tokenizers import Tokenizer, models
from ckptq.recipes.load import load_scheme
source, out, scheme, rows = sys.argv[1:]
ids = [json.loads(line)["input_ids"] for line in open(rows)]
config = json.load(open(source + "/config.json"))
model = getattr(transformers, config["architectures"][0]).from_pretrained(source, dtype="auto")
linearize_moe(model)
core = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
text = load_scheme(scheme).text.replace("- lm_head", "- lm_head\\n      - re:.*mlp.gate$")
oneshot(
    model=model, recipe=text, moe_calibrate_all_experts=False, max_seq_length=len(ids[0]),
    dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids]}),
    processor=transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>"),
    num_calibration_samples=len(ids), shuffle_calibration_samples=False,
)
if torch.cuda.is_available():
    print(f"oneshot: peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of GPU memory",
          file=sys.stderr)
model.save_pretrained(out)
"""

OURS = """
import sys, torch
from ckptq.__main__ import main
try:
    main()
finally:
    if torch.cuda.is_available():
        print(f"ckptq: peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of GPU memory",
              file=sys.stderr)
"""

EQUAL = """
import sys
from pathlib import Path
from safetensors.torch import load_file
ours, theirs = (
    {k: v for f in Path(p).glob("*.safetensors") for k, v in load_file(f).items()}
    for p in sys.argv[1:]
)
names = [n for n in ours if n.endswith(("weight_packed", "weight_scale")) and n in theirs]
for kind in ("weight_scale", "weight_packed"):
    of = [n for n in names if n.endswith(kind)]
    same = sum((ours[n] == theirs[n]).sum().item() for n in of)
    print(f"{kind}: {same / sum(ours[n].numel() for n in of):.4%} of {len(of)} tensors equal")
"""


def quality(given: argparse.Namespace, work: Path) -> Iterator[str]:
    yield "| scheme | KL | perplexity | dB | size | seconds | peak RSS |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for scheme in given.schemes.split(","):
        out = work / scheme
        command = ["-m", "ckptq", "quantize", given.model, "-o", out, "-s", scheme]
        command += ["--data", given.data, "--samples", given.samples, "--seq-len", given.seq_len]
        warm(given.model)
        took = run([sys.executable, *map(str, command), "--device", given.device])
        row = evaluated(out, given)
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        yield (
            f"| `{scheme}` | {row['kl']:.4f} | {row['perplexity']:.2f} | {row['snr_db']:.1f} "
            f"| {size / 1e6:.0f} MB | {took.seconds:.0f} | {took.peak_bytes / 1e9:.1f} GB |"
        )


def evaluated(out: Path, given: argparse.Namespace) -> dict[str, Any]:
    command = ["-m", "ckptq", "evaluate", out, "--source", given.model, "--data", given.held_out]
    command += ["--samples", "128", "--seq-len", "512", "--device", given.device, "--json"]
    done = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.PIPE, check=True)
    row: dict[str, Any] = json.loads(done.stdout)["rows"][0]
    return row


def layer(given: argparse.Namespace, work: Path) -> Iterator[str]:
    family, sizes = LAYERS[given.kind]
    source, rows, scheme = work / "source", work / "rows.jsonl", given.scheme
    subprocess.run([sys.executable, "-c", MAKE, family, json.dumps(sizes), source], check=True)
    S = int(given.seq_len)
    ids = ([(7 * i * j + i) % 1000 + 1 for j in range(S)] for i in range(1, int(given.samples) + 1))
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    warm(source)
    ours = ["quantize", source, "-o", work / "ours", "-s", scheme, "--data", rows]
    ours += ["--samples", given.samples, "--seq-len", S, "--device", given.device]
    mine = run([sys.executable, "-c", OURS, *map(str, ours)])
    yield f"ckptq: {mine.seconds:.1f} s, peak RSS {mine.peak_bytes / 1e9:.1f} GB"
    theirs = run([sys.executable, "-c", PEER, source, work / "theirs", scheme, rows])
    yield f"oneshot: {theirs.seconds:.1f} s, peak RSS {theirs.peak_bytes / 1e9:.1f} GB"
    yield f"{theirs.seconds / mine.seconds:.2f} times as fast as oneshot, imports included"
    folders = [work / "ours", work / "theirs"]
    done = subprocess.run([sys.executable, "-c", EQUAL, *folders], stdout=subprocess.PIPE)
    yield done.stdout.decode().strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    one = modes.add_parser("quality")
    one.add_argument("model", type=Path)
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--held-out", type=Path, required=True)
    one.add_argument("--schemes", default=",".join(SCHEMES))
    other = modes.add_parser("layer")
    other.add_argument("kind", choices=LAYERS)
    other.add_argument("--scheme", default="w4a16-gptq")
    for each in (one, other):
        each.add_argument("--device", default="cpu")
        each.add_argument("--samples", default="64")
        each.add_argument("--seq-len", default="512")
    given = parser.parse_args()
    print(f"# GPTQ on {machine()}, {date.today()}\n", flush=True)
    print(f"`python benchmarks/bench_gptq.py {' '.join(sys.argv[1:])}`\n", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for line in (quality if given.mode == "quality" else layer)(given, Path(work)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
