"""Observe and change the inputs of matrix products with certain weights.

This happens where the model multiplies, however that is written, and not where a module is called:
fused experts are not modules, but each multiplies with a part of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Change = Callable[["Tensor"], "Tensor"]


@contextmanager
def inputs_changed(changes: Mapping[Tensor, Change]) -> Iterator[None]:
    """In the block, change the inputs of products with these weights, or parts of them.

    Parts are recognized by their storage: `gate_up_proj[3]` is a window on `gate_up_proj`.
    """
    if not changes:
        yield
        return
    import torch
    from torch.overrides import TorchFunctionMode

    by_storage = {_place(weight): change for weight, change in changes.items()}
    products = {torch.nn.functional.linear, torch.bmm, torch.matmul, torch.Tensor.matmul}
    products |= {torch.Tensor.__matmul__, torch.Tensor.bmm}

    class Changing(TorchFunctionMode):
        def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Collection[type],
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            if func in products and len(args) > 1:
                change = by_storage.get(_place(args[1]))
                if change is not None:
                    args = (change(args[0]), *args[1:])
            return func(*args, **(kwargs or {}))

    with Changing():
        yield


def experts_one_by_one(model: Any) -> None:
    """Make fused experts multiply one by one; other ways sort all tokens into one product."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
