"""Attention and KV-cache kernels: speed against torch and a device copy, error of each KV format.

    python benchmarks/bench_attention.py [--record benchmarks/results]

Each result is checked first, attention against float64, bytes and maxima for equality, and a
difference ends the run. Attention is causal, 32 query and 8 key/value heads of 128 (Llama-3.1-8B),
16384 tokens a batch; TFLOP/s count half the score matrix. KV kernels write 65536 tokens of 8 heads
of 128 (Llama-3.1-70B and Llama-4) and count every byte read or written once; static scales are in
bf16, as checkpoints hold them.

`--shrink 64` divides tokens; with TRITON_INTERPRET=1 that tries the script without a GPU. `--tune`
times other tiles of the attention kernel.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from kernel_timing import copy_gbs, measure
from record import add_option, extremes, gpu, publish
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ckptq.kernels.attention.dense_attention import Tile, attention
from ckptq.kernels.attention.maxima import Maxima
from ckptq.kernels.cache.paged_attention import paged_attention
from ckptq.kernels.cache.paging import Sequences
from ckptq.kernels.cache.write_cache import write_cache
from ckptq.kernels.token_head import reference as kv
from ckptq.kernels.token_head.kv_format import FORMATS, INT2, INT4, Rotation
from ckptq.kernels.token_head.token_head_attention import token_head_attention
from ckptq.kernels.token_head.token_head_cache import TokenHeadCache
from ckptq.kernels.token_head.write_token_head import write_token_head

FP8 = torch.float8_e4m3fn
H, K, D, BLOCK = 32, 8, 128, 16
SCALING = D**-0.5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Row = dict[str, Any]
ATTENTION = ("ckptq/kernels/attention",)
CACHE = ("ckptq/kernels/cache",)
TOKEN_HEAD = ("ckptq/kernels/token_head",)
TILES = [
    *(Tile(128, 64, 8, stages) for stages in (2, 3, 4)),
    *(Tile(128, 128, 8, stages) for stages in (2, 3)),
    *(Tile(64, columns, 4, 3) for columns in (64, 128)),
    Tile(128, 32, 8, 4),
]


def heads(batch: int, tokens: int, count: int, seed: int, dtype: torch.dtype) -> Tensor:
    """[batch, count, tokens, D], laid out as projections leave it, heads of different sizes."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x_BSHD = torch.randn(batch, tokens, count, D, generator=generator, device=DEVICE)
    x_BSHD *= torch.linspace(0.5, 1.5, count, device=DEVICE)[:, None]
    return x_BSHD.to(dtype).transpose(1, 2)


def require(ok: bool, what: str) -> None:
    if not ok:
        sys.exit(f"wrong: {what}")


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def check_attention(q: Tensor, k: Tensor, v: Tensor, out_BSHD: Tensor, limit: float) -> float:
    """Relative error of the last sequence's first group of heads against float64."""
    q, k, v = q[-1:, : H // K], k[-1:, :1], v[-1:, :1]
    want = exact(q, k, v, SCALING)
    error = relative(out_BSHD[-1:, :, : H // K], want)
    require(error < limit, f"attention is off by {error}")
    return error


def flash(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=SCALING, enable_gqa=True
            )

    return run


def in_turns(variants: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Milliseconds, measured in rounds over all variants: a GPU slows by a tenth as it warms."""
    rounds = [{name: measure(run, runs) for name, run in variants.items()} for _ in range(5)]
    return {name: statistics.median(found[name] for found in rounds) for name in variants}


def attention_rows(length: int, tokens: int, runs: int) -> list[Row]:
    batch = max(1, tokens // length)
    q, k, v = (heads(batch, length, n, i, torch.bfloat16) for i, n in enumerate((H, K, K)))
    maxima = Maxima.zeros(H, K, DEVICE)
    out = attention(q, k, v, scaling=SCALING, maxima=maxima)
    error = check_attention(q, k, v, out, 5e-3)
    for x, amax in ((q, maxima.q_H), (k, maxima.k_K), (v, maxima.v_K)):
        require(torch.equal(amax, x.abs().amax((0, 2, 3)).float()), "maxima")

    def plain() -> Tensor:
        return attention(q, k, v, scaling=SCALING)

    def recorded() -> Tensor:
        return attention(q, k, v, scaling=SCALING, maxima=maxima)

    def separately() -> list[Tensor]:
        plain()
        return [x.abs().amax((0, 2, 3)) for x in (q, k, v)]

    variants: dict[str, tuple[Callable[[], Any], float | None]] = {
        "ckptq": (plain, error),
        "ckptq with maxima": (recorded, error),
        "ckptq, then torch's amax": (separately, None),
    }
    if DEVICE.type == "cuda":
        variants["SDPA flash"] = (flash(q, k, v, SDPBackend.FLASH_ATTENTION), None)
        variants["SDPA cuDNN"] = (flash(q, k, v, SDPBackend.CUDNN_ATTENTION), None)
    flops = 2 * batch * H * length * length * D
    ms = in_turns({name: run for name, (run, _) in variants.items()}, runs)
    base = ms.get("SDPA flash", ms["ckptq"])
    return [
        {
            "attention": f"{name}, {length} tokens",
            "ms": ms[name],
            "TFLOP/s": flops / ms[name] / 1e9,
            "of SDPA flash's time": ms[name] / base,
            "of the time without maxima": ms[name] / ms["ckptq"],
            "relative error": variants[name][1],
        }
        for name in variants
    ]


def tile_rows(length: int, tokens: int, runs: int) -> list[Row]:
    """Milliseconds of every tile that fits."""
    from triton.runtime.errors import OutOfResources

    batch = max(1, tokens // length)
    q, k, v = (heads(batch, length, n, i, torch.bfloat16) for i, n in enumerate((H, K, K)))
    rows = []
    for tile in TILES:
        row: Row = {"tile": f"{length} tokens, {tile}", "ms": None}
        with suppress(OutOfResources):
            row["ms"] = measure(lambda t=tile: attention(q, k, v, scaling=SCALING, tile=t), runs)
        rows.append(row)
    return rows


def scattered(tokens: int) -> Tensor:
    """Slots of tokens in blocks that lie in no order, as a server's are."""
    blocks = torch.randperm(tokens // BLOCK, generator=torch.Generator().manual_seed(0))
    slot = blocks[:, None] * BLOCK + torch.arange(BLOCK)
    return slot.flatten().to(DEVICE)


def kv_row(
    name: str, run: Callable[[], Any], eager: Callable[[], Any], moved: int, runs: int
) -> Row:
    ms, copy = measure(run, runs), copy_gbs(moved // 2, DEVICE)
    gbs = moved / ms / 1e6
    return {
        "kernel": name,
        "ms": ms,
        "GB/s": gbs,
        "% of copy": 100 * gbs / copy,
        "copy GB/s": copy,
        "torch eager ms": measure(eager, 5),
    }


def write_rows(tokens: int, runs: int) -> list[Row]:
    k, v = (heads(1, tokens, K, i, torch.bfloat16)[0].transpose(0, 1) for i in range(2))
    slot_T, rows = scattered(tokens), []
    for held in ("bf16", "fp8 per tensor", "fp8 per head"):
        dtype = torch.bfloat16 if held == "bf16" else FP8
        shape = (tokens // BLOCK, BLOCK, K, D)
        caches = [torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in "kv"]
        scale = None
        if dtype == FP8:
            scale = torch.full((K if "head" in held else 1,), 0.01, device=DEVICE).bfloat16()

        def run(caches=caches, scale=scale) -> None:
            write_cache(k, v, *caches, slot_T, k_scale=scale, v_scale=scale)

        def encoded(x: Tensor, scale: Tensor | None = scale) -> Tensor:
            if scale is None:
                return x
            return (x.float() / scale.float()[:, None]).clamp(-448, 448).to(FP8)

        run()
        for x, cache in ((k, caches[0]), (v, caches[1])):
            got = cache.flatten(0, 1)[slot_T].view(torch.uint8)
            require(torch.equal(got, encoded(x).view(torch.uint8)), held)

        def eager(caches=caches, encoded=encoded) -> None:
            for x, cache in ((k, caches[0]), (v, caches[1])):
                cache[slot_T // BLOCK, slot_T % BLOCK] = encoded(x)

        moved = 2 * k.numel() * (2 + dtype.itemsize) + 8 * tokens
        rows.append(kv_row(held, run, eager, moved, runs))
    return rows


def token_head_rows(tokens: int, runs: int) -> list[Row]:
    x = heads(1, tokens, K, 0, torch.bfloat16)[0].transpose(0, 1)
    slot_T, rows = scattered(tokens), []
    for fmt in FORMATS.values():
        for rotation in dict.fromkeys((fmt.rotation, Rotation.NONE)):
            where = {"device": DEVICE, "rotation": rotation}
            cache = TokenHeadCache.empty(fmt, tokens // BLOCK, BLOCK, K, D, **where)

            def run(cache=cache) -> None:
                write_token_head(x, cache, slot_T)

            def eager(fmt=fmt, rotation=rotation) -> kv.Packed:
                return kv.quantize(x, fmt, rotation)

            run()
            few = slice(0, min(tokens, 4096))
            want = kv.quantize(x[few].cpu(), fmt, rotation)  # on the CPU
            for held, packed in (
                (cache.code, want.code),
                (cache.scale, want.scale),
                (cache.zero, want.zero),
            ):
                if held is not None:
                    got = held.flatten(0, 1)[slot_T[few]].cpu()
                    require(torch.equal(got, packed), f"{fmt.name} {rotation}")
            per_head = 2 * D + fmt.width(D) + 4 + int(fmt.asymmetric)
            name = f"{fmt.name}, rotation {rotation}"
            rows.append(kv_row(name, run, eager, tokens * K * per_head + 8 * tokens, runs))
    return rows


def paged_rows(length: int, batch: int, queries: int, runs: int) -> list[Row]:
    """The last queries of each sequence over its whole cache: GB/s of the bytes that it holds."""
    tokens = length * batch
    slot_T = scattered(tokens)
    k, v = (heads(1, tokens, K, i, torch.bfloat16)[0].transpose(0, 1) for i in range(2))
    q = heads(1, batch * queries, H, 2, torch.bfloat16)[0].transpose(0, 1).contiguous()
    ints = {"dtype": torch.int32, "device": DEVICE}
    sequences = Sequences(
        query_starts=torch.arange(batch + 1, **ints) * queries,
        lengths=torch.full((batch,), length, **ints),
        block_table=(slot_T[::BLOCK] // BLOCK).int().view(batch, -1),
        longest=queries,
    )
    held = torch.zeros(tokens // BLOCK, BLOCK, K, D, dtype=k.dtype, device=DEVICE)
    caches = [held, held.clone()]
    write_cache(k, v, *caches, slot_T)
    want = paged_attention(q, *caches, sequences, scaling=SCALING)
    found = {"bf16": (lambda: paged_attention(q, *caches, sequences, scaling=SCALING), 4 * D)}
    for fmt in FORMATS.values():
        packed = [
            TokenHeadCache.empty(fmt, tokens // BLOCK, BLOCK, K, D, device=DEVICE) for _ in "kv"
        ]
        for x, cache in zip((k, v), packed, strict=True):
            write_token_head(x, cache, slot_T)

        def run(packed=packed) -> Tensor:
            return token_head_attention(q, *packed, sequences, scaling=SCALING)

        require(relative(run(), want) < {8: 0.1, 4: 0.3, 2: 1.5}[fmt.bits], fmt.name)
        found[fmt.name] = (run, 2 * (fmt.width(D) + 4 + int(fmt.asymmetric)))
    rows = []
    for name, (run, per_head) in found.items():
        ms = measure(run, runs)
        gbs = tokens * K * per_head / ms / 1e6
        rows.append({"cache": name, "ms": ms, "GB/s": gbs, "off from bf16": relative(run(), want)})
    return rows


def exact(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Causal attention [B, S, H, D] in float64."""
    wide = (x.double() for x in (q, k, v))
    return scaled_dot_product_attention(
        *wide, is_causal=True, scale=scaling, enable_gqa=True
    ).transpose(1, 2)


def error_rows(tokens: int) -> list[Row]:
    """Relative error of keys, and of attention with keys and values quantized, in percent."""
    rows = []
    for outliers in (0, 2):
        q, k, v = (
            heads(1, tokens, n, 7 + i, torch.float32)[:, : (4, 1, 1)[i]]
            for i, n in enumerate((H, K, K))
        )
        k = k.clone()
        k[..., 5 : 5 + outliers] *= 20
        k[..., 5 : 5 + outliers] += 30 * (outliers > 0)  # as keys of Llama and Qwen have them
        scaling = SCALING / (4 if outliers else 1)
        want = exact(q, k, v, scaling)
        for fmt in (INT4, INT2):
            for rotation in Rotation:
                fakes = [kv.there_and_back(x, fmt, rotation) for x in (k, v)]
                k_only = exact(q, fakes[0], v, scaling)
                both = exact(q, *fakes, scaling)
                small = [i for i in range(D) if not 5 <= i < 5 + outliers]
                rows.append(
                    {
                        "format": f"{fmt.name}, rotation {rotation}, {outliers} outliers",
                        "k error %": 100 * relative(fakes[0], k),
                        "other channels of k %": 100
                        * relative(fakes[0][..., small], k[..., small]),
                        "v error %": 100 * relative(fakes[1], v),
                        "attention, k only %": 100 * relative(k_only, want),
                        "attention, k and v %": 100 * relative(both, want),
                    }
                )
    return rows


def whole(rows: list[Row]) -> list[Row]:
    """All rows, and the extremes of each variant over the lengths."""
    columns = ["TFLOP/s", "of SDPA flash's time", "of the time without maxima"]
    found = list(rows)
    for name in dict.fromkeys(row["attention"].rpartition(",")[0] for row in rows):
        same = [row for row in rows if row["attention"].rpartition(",")[0] == name]
        found += extremes(same, columns, name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_option(parser)
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    small, runs = args.shrink, args.runs
    where = {"machine": gpu(), "folder": args.record}
    rows: list[Row] = []
    for length in (2048, 4096, 8192):
        rows += attention_rows(length // small, 16384 // small, runs)
    publish("attention", "Causal attention, heads of 128", whole(rows), code=ATTENTION, **where)
    if args.tune:
        rows = tile_rows(2048 // small, 16384 // small, 10)
        rows += tile_rows(8192 // small, 16384 // small, 10)
        publish("attention-tiles", "Tiles of the attention kernel", rows, code=ATTENTION, **where)
    rows = write_rows(65536 // small, runs)
    rows += extremes(rows, ["% of copy"])
    publish("cache-writes", "Writes into a paged cache", rows, code=CACHE, **where)
    rows = token_head_rows(65536 // small, runs)
    publish("token-head-writes", "Writes by token and head", rows, code=TOKEN_HEAD, **where)
    length, code = 4096 // small, (*CACHE, *TOKEN_HEAD)
    rows = paged_rows(length, 64 // min(small, 16), 1, runs)
    publish("cache-decode", "Decoding from a paged cache", rows, code=code, **where)
    rows = paged_rows(length, 1, length, runs)
    publish("cache-prefill", "A prompt over a paged cache", rows, code=code, **where)
    rows = error_rows(2048 // min(small, 16))
    publish("kv-error", "Error of KV formats", rows, code=TOKEN_HEAD, **where)


if __name__ == "__main__":
    main()
