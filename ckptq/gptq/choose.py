"""Ranges and codes of one Linear, chosen by llm-compressor's own functions.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptq.gptq.moments import Moments
from ckptq.quantize.formats import Grid, Ranges
from ckptq.recipes.args import Args
from ckptq.recipes.scheme import Gptq

if TYPE_CHECKING:
    from torch import Tensor


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

    Of scales below zero its Triton kernel would make the least positive number. Codes from -8 to 7
    in units of one are -7 to 8 in units of its opposite, as with a zero point of -1, and so they
    are given to it.
    """
    import torch
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    signed = any(bool((each.on.scale < 0).any()) for each in choices)
    global_scales = [each.on.global_scale for each in choices if each.on.global_scale is not None]
    with torch.no_grad():
        made: Any = quantize_weight(
            weights=torch.stack([each.w_RC.float() for each in choices]),
            hessians=torch.stack([each.hessian_CC for each in choices]),
            scale=torch.stack([each.on.scale.abs() for each in choices]),
            zero_point=torch.stack([_zero_point(each.on) for each in choices]),
            global_scale=torch.cat(global_scales) if global_scales else None,
            quant_args=_library_args(args, signed),
            blocksize=how.block_size,
            percdamp=how.dampening_frac,
        )
    weights, _, nearest = made
    return [
        Chosen(w_RC, not by_itself, each.on)
        for w_RC, by_itself, each in zip(weights, nearest.tolist(), choices, strict=True)
    ]


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
    return -(on.scale < 0).to(on.scale.dtype) if on.zero_point is None else on.zero_point


def _library_args(args: Args, signed: bool = False) -> Any:
    """compressed-tensors' own of what stands in the recipe; with zero points for `signed` scales."""
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(**args.to_dict() | ({"symmetric": False} if signed else {}))
