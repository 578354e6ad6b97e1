"""Codes of one Linear, chosen by llm-compressor's GPTQ on the grid that rounding would use.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckptq.quantize.formats import Grid
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


def _zero_point(on: Grid) -> Tensor:
    import torch

    return torch.zeros_like(on.scale) if on.zero_point is None else on.zero_point


def _library_args(args: Args) -> Any:
    """compressed-tensors' own of what stands in the recipe."""
    from compressed_tensors.quantization import QuantizationArgs

    fields = {k: v for k, v in args.to_dict().items() if not k.startswith("observer")}
    return QuantizationArgs(**fields)
