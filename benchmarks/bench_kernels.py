"""Quantize, pack and dequantize kernels: GB/s against a device copy, torch eager, others' code.

    python benchmarks/bench_kernels.py [--record benchmarks/results]

Every kernel's result is first compared with eager torch's at the very shape that is timed, to the
bit, and a difference ends the run. Bytes count every input and output once, whatever a kernel
really moves. compressed-tensors is timed where it is installed: extrema, its qparams, its
quantization and packing, and whether its codes are ours. Linear products are compared with
dequantize-then-multiply in fp32 and timed beside torch's bf16 product.

`--shrink 32` divides the shapes; with TRITON_INTERPRET=1 that tries the script without a GPU.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import kernel_baselines as base
import torch
from kernel_timing import copy_gbs, measure, nbytes_of
from record import add_option, extremes, gpu, publish
from torch import Tensor

from ckptq.kernels.int4.quantize_int4 import dequantize_int4, quantize_int4
from ckptq.kernels.linear.library import linear_fp8_block, linear_w4a16
from ckptq.kernels.linear.linear_w8a8 import linear_w8a8
from ckptq.kernels.quantize.quantize_rows import quantize_blocks, quantize_rows
from ckptq.kernels.quantize.quantize_static import dequantize, quantize_static

CODE = ("ckptq/kernels/quantize", "ckptq/kernels/int4")
PRODUCTS = ("ckptq/kernels/linear",)
FP8, INT8 = torch.float8_e4m3fn, torch.int8
LLAMA_70B = [(8192, 8192), (28672, 8192), (8192, 28672)]
"""q_proj and o_proj, gate_proj and up_proj, down_proj of Llama-3.1-70B."""
LINEAR = [(16, 28672, 8192), (4096, 28672, 8192)]
"""Tokens, output channels, input features: gate_proj of Llama-3.1-70B, decoding and a prompt."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one kind of shape. `prepare` makes its inputs from random weights."""

    name: str
    shapes: list[tuple[int, ...]]
    kernel: Callable[..., Any]
    eager: Callable[..., Any]
    theirs: Callable[..., Any] | None = None
    prepare: Callable[[Tensor], tuple] = lambda x: (x,)


def static_inputs(x: Tensor) -> tuple:
    return x, torch.full((1, 1), 0.01, dtype=x.dtype, device=x.device)


def cases() -> list[Case]:
    theirs = base.compressed_tensors
    return [
        Case(
            name="fp8 channel",
            shapes=LLAMA_70B,
            kernel=quantize_rows,
            eager=base.rows,
            theirs=theirs("channel"),
        ),
        Case(
            name="int8 channel",
            shapes=LLAMA_70B,
            kernel=partial(quantize_rows, dtype=INT8),
            eager=partial(base.rows, dtype=INT8),
            theirs=theirs("int_channel"),
        ),
        Case(
            name="fp8 tensor, static",
            shapes=LLAMA_70B,
            kernel=lambda x, s: quantize_static(x, s, tuple(x.shape)),
            eager=lambda x, s: base.codes(x, s, FP8),
            prepare=static_inputs,
        ),
        Case(
            name="fp8 block 128",
            shapes=LLAMA_70B,
            kernel=quantize_blocks,
            eager=base.blocks,
            theirs=theirs("block"),
        ),
        Case(
            name="int4 g128 + pack",
            shapes=LLAMA_70B,
            kernel=lambda x: quantize_int4(x)[:2],
            eager=base.int4,
            theirs=theirs("group", bits=4),
        ),
        Case(
            name="int4 g128 asym + pack",
            shapes=LLAMA_70B,
            kernel=partial(quantize_int4, symmetric=False),
            eager=partial(base.int4, symmetric=False),
            theirs=theirs("group", bits=4, symmetric=False),
        ),
        Case(
            name="fp8 dequantize",
            shapes=LLAMA_70B,
            kernel=lambda c, s: dequantize(c, s, (1, c.shape[1])),
            eager=base.dequantized,
            prepare=quantize_rows,
        ),
        Case(
            name="int4 unpack + dequantize",
            shapes=LLAMA_70B,
            kernel=lambda p, s: dequantize_int4(p, s, p.shape[1] * 8),
            eager=lambda p, s: base.dequantized_int4(p, s, p.shape[1] * 8),
            prepare=lambda x: quantize_int4(x)[:2],
        ),
    ]


def weights(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Normal bf16 weights with rows of different sizes, new for every case."""
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    return x.mul_(torch.rand(shape[:-1], device=device, dtype=torch.bfloat16)[..., None] * 0.05)


def equal(got: Any, want: Any) -> bool:
    """The same tensors to the bit, as both sides store them."""
    if isinstance(got, Tensor):
        got, want = (got,), (want,)
    pairs = [(g, w) for g, w in zip(got, want, strict=True) if g is not None]
    return all(torch.equal(_bits(g), _bits(w)) for g, w in pairs)


def _bits(x: Tensor) -> Tensor:
    plain = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.contiguous().view(plain)


def shrunk(side: int, by: int) -> int:
    """A side divided, in whole blocks of 128; a small one stays."""
    return side if by == 1 or side <= 128 else -(-side // by // 128) * 128


def bench(case: Case, shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """One row of the table; ends the run where kernel and eager differ."""
    inputs = case.prepare(weights(shape, device))
    got = case.kernel(*inputs)
    if not equal(got, case.eager(*inputs)):
        sys.exit(f"{case.name} {shape}: kernel and eager torch differ; nothing is reported")
    moved = nbytes_of(got) + nbytes_of(inputs)
    ms, copy = measure(lambda: case.kernel(*inputs)), copy_gbs(moved // 2, device)
    eager_ms = measure(lambda: case.eager(*inputs), 5)
    row = {
        "operation": f"{case.name}, {'x'.join(map(str, inputs[0].shape))}",
        "ms": ms,
        "GB/s": moved / ms / 1e6,
        "copy GB/s": copy,
        "% of copy": 100 * moved / ms / 1e6 / copy,
        "eager ms": eager_ms,
        "x eager": eager_ms / ms,
    }
    if case.theirs is not None:
        # its scales have shapes of its own; the codes are what may differ
        row["same codes as CT"] = str(equal(case.theirs(*inputs)[0], got[0]))
        row["CT ms"] = measure(lambda: case.theirs(*inputs), 5)
        row["x CT"] = row["CT ms"] / ms
    return row


def bench_linear(shape: tuple[int, int, int], device: torch.device) -> list[dict[str, Any]]:
    """A row for every kind of product; ends the run where one is off by more than 1 %."""
    M, N, K = shape
    a, w = weights((M, K), device), weights((N, K), device)
    bf16_ms = measure(lambda: a @ w.t())
    groups = quantize_rows(a.view(-1, 128))
    group_args = groups[0].view(M, K), groups[1].view(M, -1)
    products: dict[str, tuple[Callable[..., Tensor], tuple]] = {
        "fp8": (linear_w8a8, (*quantize_rows(a), *quantize_rows(w))),
        "fp8 block": (linear_fp8_block, (*group_args, *quantize_blocks(w))),
        "int8": (linear_w8a8, (*quantize_rows(a, INT8), *quantize_rows(w, INT8))),
        "w4a16": (linear_w4a16, (a, *quantize_int4(w)[:2])),
    }
    rows = []
    for name, (product, args) in products.items():
        off = relative_error(product(*args), *dequantized_pair(name, args, a, w))
        if not off < 0.01:
            sys.exit(f"{name} {shape}: off by {off:.2%} of dequantize-then-multiply")
        ms = measure(lambda run=product, args=args: run(*args))
        row = {"operation": f"{name}, {M} tokens", "ms": ms}
        row |= {"TFLOP/s": 2 * M * N * K / ms / 1e9, "bf16 ms": bf16_ms, "x bf16": bf16_ms / ms}
        rows.append(row | {"relative error": off})
    return rows


def dequantized_pair(name: str, args: tuple, a: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and weights as the product sees them, at most 4096 output channels of them."""
    if name == "w4a16":
        return a, dequantize_int4(args[1], args[2], a.shape[1])[:4096]
    tiles = ((1, 128), (128, 128)) if "block" in name else ((1, a.shape[1]), (1, w.shape[1]))
    return (
        dequantize(args[0], args[1].float(), tiles[0]),
        dequantize(args[2], args[3].float(), tiles[1])[:4096],
    )


def relative_error(got_MN: Tensor, a_MK: Tensor, w_LK: Tensor) -> float:
    want_ML = a_MK.float() @ w_LK.float().t()
    return ((got_MN[:, : len(w_LK)] - want_ML).norm() / want_ML.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_option(parser)
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--shrink", type=int, default=1, help="divide sides over 128")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for case in cases():
        for full in case.shapes if args.only in case.name else []:
            shape = tuple(shrunk(side, args.shrink) for side in full)
            rows.append(bench(case, shape, device))
            print(rows[-1], flush=True)
    where = {"machine": gpu(), "folder": args.record}
    if rows:
        total = extremes(rows, ["% of copy", "x eager", *(["x CT"] if "x CT" in rows[0] else [])])
        what = "Kernels that quantize, pack and dequantize"
        publish("kernels", what, [*rows, *total], code=CODE, **where)
    products = []
    for sides in LINEAR if args.only in "linear" else []:
        M, N, K = (shrunk(side, args.shrink) for side in sides)
        products += bench_linear((M, N, K), device)
    if products:
        sides = "x".join(map(str, LINEAR[0][1:]))
        what = f"Products with quantized weights, tokens x {sides}"
        publish("products", what, products, code=PRODUCTS, **where)


if __name__ == "__main__":
    main()
