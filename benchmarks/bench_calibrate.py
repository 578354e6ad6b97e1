"""Calibration on a GPU: ckptq against llm-compressor's `oneshot` and a plain transformers forward.

    python benchmarks/bench_calibrate.py [--shape llama-8b|llama4] [--samples 64] [--work DIR]

A random model of the real shape is written to disk first. Each contender runs in a process of its
own on the same random tokens: the plain forward and oneshot with the model resident, ckptq
streaming the weights from disk layer by layer (that reading is in its time; the files are in the
page cache). The plain forward and ckptq have run two samples before, which imports and compiles.
Needs a CUDA device, llmcompressor and datasets.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import Row, add_option, gpu, publish

CODE = ("ckptq/calibrate", "ckptq/forward", "ckptq/kernels/attention")

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "llama4": {
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 4,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32768,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "max_position_embeddings": 8192,
    },
}

VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "vision_output_dim": 64,
    "image_size": 28,
    "patch_size": 14,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "pixel_shuffle_ratio": 0.5,
}

KV = {"num_bits": 8, "type": "float", "strategy": "attn_head", "symmetric": True, "dynamic": False}


def model_class(shape: str) -> tuple[Any, Any]:
    import transformers

    if shape == "llama4":
        config = transformers.Llama4Config(text_config=SHAPES[shape], vision_config=VISION)
        return transformers.Llama4ForConditionalGeneration, config
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(**SHAPES[shape])


def make(shape: str, work: Path) -> None:
    import torch

    torch.manual_seed(0)
    kind, config = model_class(shape)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = kind(config)
    model.save_pretrained(work / "model")


def tokens(shape: str, samples: int, seq_len: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    vocabulary = SHAPES[shape]["vocab_size"]
    return torch.randint(1, vocabulary, (samples, seq_len), generator=generator).tolist()


def resident(shape: str, work: Path) -> Any:
    import torch

    kind, _ = model_class(shape)
    return kind.from_pretrained(
        work / "model", dtype=torch.bfloat16, attn_implementation="sdpa", device_map="cuda"
    ).eval()


def plain(shape: str, work: Path, ids: list[list[int]]) -> float:
    """Seconds of a forward pass over all samples, one at a time, the model resident."""
    import torch

    model = resident(shape, work)
    batches = [torch.tensor([row], device="cuda") for row in ids]
    with torch.no_grad():
        for batch in batches[:2]:
            model(input_ids=batch, use_cache=False)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for batch in batches:
            model(input_ids=batch, use_cache=False, logits_to_keep=1)
        torch.cuda.synchronize()
    return time.perf_counter() - began


def oneshot(shape: str, work: Path, ids: list[list[int]]) -> float:
    """Seconds of llm-compressor's calibration with the same recipe, loading not counted.

    Not its default, which sends each token through all experts and takes several times as long:
    the plain forward and ckptq route them.
    """
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot as run
    from llmcompressor.modifiers.quantization import QuantizationModifier

    if shape == "llama4":
        count_nothing_as_cached()
    model = resident(shape, work)
    name = "Llama4TextAttention" if shape == "llama4" else "LlamaAttention"
    args = QuantizationArgs(**KV, observer="static_minmax")
    scheme = QuantizationScheme(targets=[name], input_activations=args)
    rows = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    began = time.perf_counter()
    run(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=QuantizationModifier(config_groups={"attention": scheme}),
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
        moe_calibrate_all_experts=False,
        processor=tokenizer(),
    )
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    found = {n: p for n, p in model.named_parameters() if n.endswith((".k_scale", ".v_scale"))}
    torch.save({n: p.detach().float().cpu().flatten() for n, p in found.items()}, work / "theirs")
    return seconds


def count_nothing_as_cached() -> None:
    """Let oneshot 0.14.0.1 run Llama-4, which asks for the length of a cache that there is not.

    compressed-tensors 0.19 puts a QuantizedKVCache in its place, which lacks the method; the whole
    text is one forward pass, so the answer is 0.
    """
    from compressed_tensors.modeling.kvcache import QuantizedKVCache

    if not hasattr(QuantizedKVCache, "get_seq_length"):
        QuantizedKVCache.get_seq_length = lambda *_: 0


def tokenizer() -> Any:
    """oneshot wants one, also for token ids; it pads with it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


def ckptq(shape: str, work: Path, ids: list[list[int]]) -> float:
    """Seconds of `calibrate`, from opening the checkpoint to the scales."""
    import torch

    from ckptq.calibrate.run import calibrate
    from ckptq.checkpoint.open import open_checkpoint
    from ckptq.text.samples import Samples

    warm_up = Samples(tuple(map(tuple, ids[:2])), "random tokens", len(ids[0]), 1)
    calibrate(open_checkpoint(work / "model"), warm_up, batch_size=1, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    samples = Samples(tuple(map(tuple, ids)), "random tokens", len(ids[0]), 1)
    began = time.perf_counter()
    scales = calibrate(open_checkpoint(work / "model"), samples, batch_size=1, device="cuda")
    seconds = time.perf_counter() - began
    ours = {n: t.float().cpu().flatten() for n, t in scales.tensors.items()}
    torch.save(ours, work / "ours")
    return seconds


def difference(work: Path) -> dict[str, float]:
    """Largest relative difference of k and v scales between ckptq and oneshot."""
    import torch

    ours, theirs = torch.load(work / "ours"), torch.load(work / "theirs")
    short = {".".join(n.split(".")[-4:]): t for n, t in theirs.items()}
    pairs = [(t, short[".".join(n.split(".")[-4:])]) for n, t in ours.items() if ".q_" not in n]
    gaps = torch.cat([(a - b).abs() / b for a, b in pairs])
    return {"largest gap": float(gaps.max()), "median gap": float(gaps.median())}


STEPS = {"plain": plain, "oneshot": oneshot, "ckptq": ckptq}


def step(name: str, shape: str, work: Path, samples: int, seq_len: int) -> None:
    """One contender in this process; prints its figures as JSON on the last line."""
    import torch

    seconds = STEPS[name](shape, work, tokens(shape, samples, seq_len))
    figures = {
        "tokens/s": samples * seq_len / seconds,
        "seconds": seconds,
        "device GiB": torch.cuda.max_memory_allocated() / 2**30,
        "RSS GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "machine": gpu(),
    }
    print(json.dumps(figures))


def child(*arguments: object) -> str:
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--without-oneshot", action="store_true")
    add_option(parser)
    parser.add_argument("--step", choices=["make", *STEPS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "make":
        make(options.shape, options.work)
        return
    if options.step:
        step(options.step, options.shape, options.work, options.samples, options.seq_len)
        return
    work = options.work or Path(tempfile.mkdtemp())
    common = ["--shape", options.shape, "--work", work, "--samples", options.samples]
    common += ["--seq-len", options.seq_len]
    if not (work / "model").exists():
        child("--step", "make", *common)
    steps = [name for name in STEPS if name != "oneshot" or not options.without_oneshot]
    found = {n: json.loads(child("--step", n, *common).splitlines()[-1]) for n in steps}
    machine = found["ckptq"]["machine"]
    gaps = difference(work) if "oneshot" in found else {}
    what = f"Calibration per head, {options.shape} shape, {options.samples} x {options.seq_len}"
    publish(
        f"calibration-{options.shape}",
        what,
        list(rows(found, gaps)),
        code=CODE,
        machine=machine,
        folder=options.record,
    )
    if not options.work:
        shutil.rmtree(work)


def rows(found: dict[str, dict[str, Any]], gaps: dict[str, float]) -> Iterator[Row]:
    """A row for each contender; with oneshot, how far ckptq's k and v scales are from its."""
    for name, figures in found.items():
        speed = figures["tokens/s"]
        against = {f"x {n}": speed / f["tokens/s"] for n, f in found.items() if n != "ckptq"}
        kept = {key: value for key, value in figures.items() if key != "machine"}
        yield {"forward": name, **kept, **against, **(gaps if name == "ckptq" else {})}


if __name__ == "__main__":
    main()
