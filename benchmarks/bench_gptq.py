"""What GPTQ and iMatrix gain and cost.

    python benchmarks/bench_gptq.py quality MODEL --data TEXT --held-out TEXT [--schemes A,B]
    python benchmarks/bench_gptq.py quality MODEL --data TEXT --task QUESTIONS [--schemes A,B]
    python benchmarks/bench_gptq.py layer dense|experts [--device cuda] [--samples N,N]

`quality`: each scheme is written by `ckptq quantize`, or by llm-compressor's oneshot from the same
tokens ("oneshot:w4a16-gptq"), or by AutoRound in 4 bits with groups of 32 and so many steps a layer
("auto-round:200"; of the others "w4a16-tuned:50"), and measured by `ckptq evaluate` on held-out
text, or on the answers of a task: KL, perplexity, dB, size, seconds and peak RSS. A run that is
stopped has recorded what it finished. `layer`: one layer of Llama 3.1 8B's shapes, or one with 128
experts of Qwen3-30B-A3B's, quantized by ckptq and by llm-compressor's oneshot from the same tokens:
seconds and peak memory of the whole process, the slope between two numbers of tokens, and what is
lost.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import machine, run, warm
from record import Row, add_option, gpu, publish

from ckptq.recipes.load import load_scheme

ONESHOT = "oneshot:"
AUTO_ROUND = "auto-round:"
SCHEMES = (
    *("w4a16-g32", "w4a16-g32-search", "w4a16-g32-refined"),
    *("oneshot:w4a16-g32-gptq", "oneshot:w4a16-g32-imatrix-gptq"),
    *("nvfp4a16", "nvfp4a16-search", "nvfp4a16-search-refined", "nvfp4a16-refined"),
    *("oneshot:nvfp4a16-gptq", "oneshot:nvfp4a16-imatrix-gptq"),
    *("w4a16-channel", "w4a16-channel-search", "w4a16-channel-refined"),
    "oneshot:w4a16-channel-imatrix-gptq",
    *("fp8-dynamic", "fp8-dynamic-search", "fp8-dynamic-refined", "oneshot:fp8-dynamic-gptq"),
    *("w8a8", "w8a8-search", "w8a8-refined", "oneshot:w8a8-gptq"),
    *("mxfp4a16", "mxfp4a16-search"),
    *("auto-round:0", "auto-round:200", "w4a16-g32-tuned"),
)
BY_TEXT = ("-gptq", "-imatrix", "-refined", "-tuned")

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

TOKENS = """
import json, sys
from pathlib import Path
from ckptq.text.samples import read_samples
model, data, count, length, out = sys.argv[1:]
rows = read_samples(data, Path(model), samples=int(count), seq_len=int(length), seed=0).token_ids
with open(out, "w") as file:
    for row in rows:
        print(json.dumps({"input_ids": list(row)}), file=file)
"""

PEER = """
import json, pathlib, sys, torch, transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from tokenizers import Tokenizer, models
from ckptq.recipes.load import load_recipe
source, out, recipe, rows = sys.argv[1:]
ids = [json.loads(line)["input_ids"] for line in open(rows)]
config = json.load(open(source + "/config.json"))
model = getattr(transformers, config["architectures"][0]).from_pretrained(source, dtype="auto")
linearize_moe(model)
core = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
gate = "- lm_head\\n      - re:.*mlp.gate$"
text = load_recipe(pathlib.Path(recipe)).text.replace("- lm_head", gate)
oneshot(
    model=model, recipe=text, moe_calibrate_all_experts=False, max_seq_length=max(map(len, ids)),
    dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids]}),
    processor=transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>"),
    num_calibration_samples=len(ids), shuffle_calibration_samples=False,
)
if torch.cuda.is_available():
    print(f"oneshot: peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of GPU memory",
          file=sys.stderr)
model.save_pretrained(out)
"""

ROUND = """
import json, shutil, sys, torch, transformers
from pathlib import Path
from auto_round import AutoRound
source, out, steps, rows, device = sys.argv[1:]
ids = [torch.tensor(json.loads(line)["input_ids"]) for line in open(rows)]
samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
rounder = AutoRound(
    model, transformers.AutoTokenizer.from_pretrained(source), bits=4, group_size=32, sym=True,
    iters=int(steps), dataset=torch.utils.data.DataLoader(samples, batch_size=1),
    nsamples=len(ids), seqlen=max(map(len, ids)), device_map=device, enable_torch_compile=False,
)
rounder.quantize_and_save(out + "-folder", format="llm_compressor")
(written,) = Path(out + "-folder").rglob("config.json")
shutil.move(written.parent, out)
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

CODE = ["ckptq/gptq", "ckptq/autoround", "ckptq/forward", "ckptq/calibrate", "ckptq/quantize"]


def quality(given: argparse.Namespace, work: Path) -> Iterator[Row]:
    tokens = work / "rows.jsonl"
    read = [given.model, given.data, given.samples, given.seq_len, tokens]
    subprocess.run([sys.executable, "-c", TOKENS, *read], check=True)
    on = ["--task", given.task] if given.task else ["--data", given.held_out, *_of(given.texts)]
    for scheme in given.schemes.split(","):
        out = work / scheme
        warm(given.model)
        took = run([sys.executable, *map(str, _command(scheme, given, tokens, out))])
        (row,) = scores(given.model, [out], on, given.device)
        yield {
            "scheme": scheme,
            "KL": row["kl"],
            "perplexity": row["perplexity"],
            "exact match %": row["accuracy"] and 100 * row["accuracy"],
            "dB": row["snr_db"],
            "MB": sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6,
            "seconds": took.seconds,
            "CPU": took.cpu_seconds,
            "peak MB": took.peak_bytes / 1e6,
        }
        shutil.rmtree(out)


def _command(scheme: str, given: argparse.Namespace, tokens: Path, out: Path) -> list[Any]:
    if scheme.startswith(ONESHOT):
        recipe = _recipe(scheme.removeprefix(ONESHOT), tokens.parent)
        return ["-c", PEER, given.model, out, recipe, tokens]
    if scheme.startswith(AUTO_ROUND):
        steps = scheme.removeprefix(AUTO_ROUND)
        return ["-c", ROUND, given.model, out, steps, tokens, given.device]
    recipe = _recipe(scheme, tokens.parent)
    command = ["-m", "ckptq", "quantize", given.model, "-o", out, "--recipe", recipe]
    command += ["--device", given.device]
    by_text = any(way in scheme for way in BY_TEXT)
    return [*command, *(["--data", given.data, *_tokens(given)] if by_text else [])]


def _recipe(scheme: str, folder: Path) -> Path:
    """What a scheme says, in a file; a number behind it is AutoRound's steps a layer."""
    name, _, steps = scheme.partition(":")
    text, file = load_scheme(name).text, folder / f"{name}.yaml"
    file.write_text(text.replace("iters: 200", f"iters: {steps}") if steps else text)
    return file


def _tokens(given: argparse.Namespace) -> list[str]:
    return ["--samples", given.samples, "--seq-len", given.seq_len]


def _of(texts: str) -> list[str]:
    return ["--samples", texts, "--seq-len", "512"]


def scores(source: Path, outs: list[Path], on: list[Any], device: str) -> list[dict[str, Any]]:
    """A row of `ckptq evaluate` for each output, on what these options name."""
    rows: list[dict[str, Any]] = []
    for out in outs:
        command = ["-m", "ckptq", "evaluate", out, "--source", source, "--json"]
        command += [*on, "--device", device]
        words = [sys.executable, *map(str, command)]
        done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
        rows += json.loads(done.stdout)["rows"]
    return rows


def layer(given: argparse.Namespace, work: Path) -> Iterator[Row]:
    family, sizes = LAYERS[given.kind]
    source = work / "source"
    subprocess.run([sys.executable, "-c", MAKE, family, json.dumps(sizes), source], check=True)
    few, many = (_quantized(given, source, count) for count in given.samples.split(","))
    more = many["tokens"] - few["tokens"]
    for name in ("ckptq", "oneshot"):
        (first, row), (second, _) = few[name], many[name]
        yield {
            "tool": name,
            "seconds": first.seconds,
            f"seconds of {many['tokens']:,} tokens": second.seconds,
            "seconds per 100,000 tokens": (second.seconds - first.seconds) / more * 1e5,
            "peak MB": second.peak_bytes / 1e6,
            "dB": row["snr_db"],
            "KL": row["kl"],
        }


def _quantized(given: argparse.Namespace, source: Path, count: str) -> dict[str, Any]:
    """By both tools, from as many samples: what it took, and the row of `ckptq evaluate`."""
    text, S = source.parent / "rows.jsonl", int(given.seq_len)
    ids = ([(7 * i * j + i) % 1000 + 1 for j in range(S)] for i in range(1, int(count) + 1))
    text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    warm(source)
    outs = [source.parent / "ours", source.parent / "theirs"]
    ours = ["quantize", source, "-o", outs[0], "-s", given.scheme, "--data", text]
    ours += ["--samples", count, "--seq-len", given.seq_len, "--device", given.device]
    took = [
        run([sys.executable, "-c", OURS, *map(str, ours)]),
        run(
            [sys.executable, "-c", PEER, source, outs[1], _recipe(given.scheme, text.parent), text]
        ),
    ]
    rows = scores(source, outs, ["--data", text, *_of("16")], given.device)
    for out in outs:
        shutil.rmtree(out)
    found = dict(zip(("ckptq", "oneshot"), zip(took, rows, strict=True), strict=True))
    return {"tokens": int(count) * S, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    one = modes.add_parser("quality")
    one.add_argument("model", type=Path)
    one.add_argument("--data", type=Path, required=True)
    measured = one.add_mutually_exclusive_group(required=True)
    measured.add_argument("--held-out", type=Path)
    measured.add_argument("--task", type=Path, help="questions with answers, instead of a text")
    one.add_argument("--texts", default="128", help="of the held-out ones")
    one.add_argument("--schemes", default=",".join(SCHEMES))
    one.add_argument("--name", default="gptq-quality", help="of the results file")
    other = modes.add_parser("layer")
    other.add_argument("kind", choices=LAYERS)
    other.add_argument("--scheme", default="w4a16-gptq")
    one.add_argument("--samples", default="32")
    other.add_argument("--samples", default="128,512", help="two numbers, for the slope")
    for each in (one, other):
        each.add_argument("--device", default="cpu")
        each.add_argument("--seq-len", default="512")
        add_option(each)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if given.mode == "quality":
            name, what = given.name, f"Better bytes, {given.model.name}"
            rows = quality(given, Path(work))
        else:
            name, what = f"gptq-layer-{given.kind}", f"One layer, {given.kind}, {given.scheme}"
            rows = layer(given, Path(work))
        done: list[Row] = []
        for row in rows:
            done.append(row)
            where = gpu() if given.device.startswith("cuda") else machine()
            publish(name, what, done, code=CODE, machine=where, folder=given.record, add=True)


if __name__ == "__main__":
    main()
