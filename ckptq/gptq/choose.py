"""Ranges and codes of one Linear, chosen by llm-compressor's own functions.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptq.gptq.moments import Moments
from ckptq.quantize.formats import Grid, Ranges
from ckptq.recipes.args import Args
from ckptq.recipes.scheme import Gptq

if TYPE_CHECKING:
    from torch import Tensor


KERNEL_SWITCH = "LLMCOMPRESSOR_DISABLE_GPTQ_TRITON"


@dataclass(frozen=True)
class Chosen:
    """What GPTQ made of a weight."""

    weight_RC: Tensor
    """On the grid, in float32."""
    solved: bool
    """False where the Hessian could not be inverted: then every weight is rounded by itself."""
    on: Grid
    """The grid."""


@dataclass(frozen=True)
class Choice:
    """What GPTQ has to choose by."""

    w_RC: Tensor
    hessian_CC: Tensor
    on: Grid


def choose(choices: Sequence[Choice], args: Args, how: Gptq) -> list[Chosen]:
    """The weights of a grid with which each Linear does to its inputs what it did before.

    All have the same shape. On a CPU one at a time gives llm-compressor's bits.
    """
    import torch
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    signed = any(bool((each.on.scale < 0).any()) for each in choices)
    global_scales = [each.on.global_scale for each in choices if each.on.global_scale is not None]
    with torch.no_grad(), _without_kernel(signed):
        made: Any = quantize_weight(
            weights=torch.stack([each.w_RC.float() for each in choices]),
            hessians=torch.stack([each.hessian_CC for each in choices]),
            scale=torch.stack([each.on.scale for each in choices]),
            zero_point=torch.stack([_zero_point(each.on) for each in choices]),
            global_scale=torch.cat(global_scales) if global_scales else None,
            quant_args=_library_args(args),
            blocksize=how.block_size,
            percdamp=how.dampening_frac,
        )
    weights, _, nearest = made
    return [
        Chosen(w_RC, not by_itself, each.on)
        for w_RC, by_itself, each in zip(weights, nearest.tolist(), choices, strict=True)
    ]


@contextmanager
def _without_kernel(signed: bool) -> Iterator[None]:
    """Where scales are `signed`, turn off llm-compressor's Triton kernel: it takes those below zero
    for the least positive number (0.14: `_gptq_block_update_kernel`). Its torch code does not."""
    if not signed:
        yield
        return
    before = os.environ.get(KERNEL_SWITCH)
    os.environ[KERNEL_SWITCH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[KERNEL_SWITCH]
        else:
            os.environ[KERNEL_SWITCH] = before


def weighed_ranges(w_RC: Tensor, moments: Moments, args: Args) -> Ranges:
    """What the codes of each tile have to reach, by the observer that the recipe names: with the
    least error where a column counts as much as its inputs are large."""
    import torch
    from llmcompressor.observers import Observer

    observer: Any = Observer.load_from_registry(
        str(args.observer), base_name="weight", args=_library_args(args)
    )
    observer._imatrix_sum = moments.squares_F
    observer._imatrix_count = torch.tensor(moments.tokens, device=w_RC.device)
    with torch.no_grad():
        observer(w_RC)
    return observer.min_vals.clamp(max=0), observer.max_vals.clamp(min=0)


def _zero_point(on: Grid) -> Tensor:
    import torch

    return torch.zeros_like(on.scale) if on.zero_point is None else on.zero_point


def _library_args(args: Args) -> Any:
    """compressed-tensors' own of what stands in the recipe."""
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(**args.to_dict())
