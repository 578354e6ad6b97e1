"""What AutoRound made of a Linear as the tensors that are stored: the same weights, to the bit.

Shape letters: R rows, C columns, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ckptq.autoround.block import Target, Tuned
from ckptq.autoround.integers import INTEGERS
from ckptq.errors import PlanError
from ckptq.plan.unit import Part
from ckptq.quantize.formats import codes_on, constants, dequantize
from ckptq.quantize.regrid import grid_of
from ckptq.spec import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

DATA_TYPES = {"nvfp4-pack-quantized": "nv_fp", "mxfp4-pack-quantized": "mx_fp"}
"""Format -> AutoRound's name of its element type; all others are integers."""


def target_of(part: Part, global_scale: Tensor | None) -> Target:
    """What AutoRound is told of a Linear: inputs stay as they are while it is tuned."""
    scheme = part.scheme
    said: dict[str, Any] = {
        "bits": scheme.num_bits,
        "sym": scheme.symmetric,
        "group_size": scheme.group_size or -1,
        "data_type": DATA_TYPES.get(scheme.format, INTEGERS),
        "act_bits": 16,
    }
    return Target(said, torch_dtype(part.weight.spec.dtype), global_scale)


def stored_tensors(part: Part, tuned: Tuned, statistic: Tensor | None) -> dict[str, Tensor]:
    """The Linear's tensors by their names in the output, on the CPU.

    PlanError where codes and scales do not stand for the weight that was tuned.
    """
    scheme, spec = part.scheme, part.weight.spec
    fixed = constants(spec, scheme, statistic)
    scale_RG, zero_RG = _numbers(part, tuned)
    on = grid_of(scale_RG, zero_RG, fixed.get("weight_global_scale"), scheme)
    q_RC = tuned.weight_RC
    made = {scheme.codes: codes_on(q_RC, on, scheme).clone(), **on.stored, **fixed}
    _check(part, made, q_RC)
    return {f"{part.linear.name}.{local}": tensor.cpu() for local, tensor in made.items()}


def _numbers(part: Part, tuned: Tuned) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points in the dtypes that they are stored in."""
    scheme, device = part.scheme, tuned.weight_RC.device
    scale_RG = tuned.scale.to(device)
    if scheme.scale_dtype == "uint8":
        return (scale_RG.float() + 127).to(torch.uint8), None
    dtype = torch_dtype(part.writes["weight_scale"].dtype)
    if scheme.strategy == "tensor_group":  # 0 where all weights of a group became 0
        scale_RG = torch.where(scale_RG == 0, 1, scale_RG)
    if tuned.zero_point is None or scheme.symmetric:
        return scale_RG.to(dtype), None
    zero_RG = tuned.zero_point.to(device) - (1 << scheme.num_bits - 1)
    return scale_RG.to(dtype), zero_RG.to(torch.int8)


def _check(part: Part, made: Mapping[str, Tensor], q_RC: Tensor) -> None:
    """PlanError where what is stored is not what was tuned, in the coarser of both dtypes."""
    own = torch_dtype(part.weight.spec.dtype)
    dtype = min(own, q_RC.dtype, key=lambda each: each.itemsize)
    found_RC = dequantize(made, part.scheme, part.weight.spec.shape, own).to(dtype)
    wrong = found_RC != q_RC.to(dtype)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise PlanError(
            f"{part.linear.name}: {int(wrong.sum())} of {wrong.numel()} weights that AutoRound "
            f"tuned are not what {part.scheme} stores of them: at row {row}, column {column} it "
            f"is {found_RC[row, column].item():g}, tuned was {q_RC[row, column].item():g}"
        )
