"""AutoRound's integers with scales in the dtype that they are stored in, BF16 as a rule.

Its own have scales in FP16, so that a BF16 weight is divided in float32. By a BF16 scale it would
be divided in BF16, where quotients from 64 up are half a step apart; here it is in float32. Nor are
scales 1e-5 at least, as suits FP16: heads whose weights are smaller than that would become zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

INTEGERS = "int_stored"
"""AutoRound's name of them."""

LEAST = 1e-8
"""Scale, but for FP16: what AutoRound takes for float32."""


def register_integers() -> None:
    """Let AutoRound know them, with and without zero points."""
    from auto_round.data_type.int import quant_tensor_asym, quant_tensor_sym
    from auto_round.data_type.register import register_dtype

    register_dtype(f"{INTEGERS}_sym")(_divided_wide(quant_tensor_sym))
    register_dtype(f"{INTEGERS}_asym")(_divided_wide(quant_tensor_asym))


def _divided_wide(quantize: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def wide(tensor: Tensor, **given: Any) -> Any:
        if given["scale_dtype"] != torch.float16:
            given["q_scale_thresh"] = LEAST
        return quantize(tensor.float(), **given)

    return wide
