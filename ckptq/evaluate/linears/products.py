"""Change the inputs of matrix products with certain weights, or compute these otherwise.

This happens where the model multiplies, however that is written, and not where a module is called:
fused experts are not modules, but each multiplies with a part of one tensor.

Shape letters: B batch or experts, T tokens, C input features, N output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Change = Callable[["Tensor"], "Tensor"]
"""An input -> what is multiplied in its place."""

Multiply = Callable[["Tensor", "Tensor"], "Tensor | None"]
"""(input [..., C], the matrix of the weight that is multiplied [N, C]) -> [..., N]; None where it
does not know that matrix."""


@dataclass(frozen=True, slots=True)
class Treatment:
    """What happens at products with one weight: they are computed by `multiply`, or else of
    changed inputs."""

    change: Change | None = None
    multiply: Multiply | None = None

    def product(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """`func`, a product of args[0] and args[1], as this weight wants it."""
        if self.multiply is not None:
            made = _multiplied(self.multiply, func, args[0], args[1])
            if made is not None:
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                return made if bias is None else made + bias
        if self.change is not None:
            args = (self.change(args[0]), *args[1:])
        return func(*args, **kwargs)


def _multiplied(
    multiply: Multiply, func: Callable[..., Any], x: Tensor, weight: Tensor
) -> Tensor | None:
    """By `multiply`, matrix by matrix: linear takes [N, C], other products [C, N]."""
    if func is torch.nn.functional.linear:
        return multiply(x, weight)
    if weight.ndim == 2:
        return multiply(x, weight.t())
    if weight.ndim != 3 or x.ndim != 3:
        return None
    made_BTN = []
    for x_TC, w_CN in zip(x, weight, strict=True):
        made_TN = multiply(x_TC, w_CN.t())
        if made_TN is None:
            return None
        made_BTN.append(made_TN)
    return torch.stack(made_BTN)


@contextmanager
def products_treated(treatments: Mapping[Tensor, Treatment]) -> Iterator[None]:
    """In the block, treat products with these weights, or parts of them.

    Parts are recognized by their storage: `gate_up_proj[3]` is a window on `gate_up_proj`.
    """
    if not treatments:
        yield
        return
    from torch.overrides import TorchFunctionMode

    by_storage = {_place(weight): treatment for weight, treatment in treatments.items()}
    products = {torch.nn.functional.linear, torch.bmm, torch.matmul, torch.Tensor.matmul}
    products |= {torch.Tensor.__matmul__, torch.Tensor.bmm}

    class Treating(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Collection[type],
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            if func in products and len(args) > 1:
                treatment = by_storage.get(_place(args[1]))
                if treatment is not None:
                    return treatment.product(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))

    with Treating():
        yield


def experts_one_by_one(model: Any) -> None:
    """Make fused experts multiply one by one; other ways sort all tokens into one product."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
