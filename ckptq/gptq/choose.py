"""Ranges and codes of one Linear, chosen by llm-compressor's own functions.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

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


def choose(w_RC: Tensor, hessian_CC: Tensor, on: Grid, args: Args, how: Gptq) -> Chosen:
    """The weights of a grid with which the Linear does to its inputs what it did before.

    The Hessian is used up.
    """
    import torch
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    with torch.no_grad():
        made: Any = quantize_weight(
            weights=w_RC.float()[None].clone(),
            hessians=hessian_CC[None],
            scale=on.scale[None],
            zero_point=_zero_point(on)[None],
            global_scale=on.global_scale,
            quant_args=_library_args(args),
            blocksize=how.block_size,
            percdamp=how.dampening_frac,
        )
    (weight_RC,), _, (nearest,) = made
    return Chosen(weight_RC, not bool(nearest))


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
