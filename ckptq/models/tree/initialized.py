"""What a transformers model needs to be initialized, as it is before weights are loaded into it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from ckptq.numbered import starred

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def wants_weights(model: PreTrainedModel) -> frozenset[str]:
    """Linears, numbers as `*`, whose weights are asked for by their parents or, of all alike, by
    their own initialization (RWKV).

    Tried on the model itself: its Linears lose their weights, all else is initialized.
    """
    from torch import nn

    linears = {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    held = {linear: linear._parameters.pop("weight") for linear in linears}
    found = set()
    for module in _one_of_each_class(model):
        while (wanted := _wanted_linear(model, module)) is not None:
            alike = (
                [m for m in linears if type(m) is type(wanted)] if wanted is module else [wanted]
            )
            for linear in alike:
                found.add(starred(linears[linear]))
                linear._parameters["weight"] = held[linear]
    return frozenset(found)


def asked_in_vain(model: PreTrainedModel) -> Iterator[str]:
    """A Linear, numbers as `*`, for each class whose initialization asks for a weight that is not
    there, as packed ones have none. The model is as it is after; of a class one module is tried."""
    names = {module: name for name, module in model.named_modules()}
    for module in _one_of_each_class(model):
        if (wanted := _wanted_linear(model, module)) is not None:
            yield starred(names[wanted])


def _one_of_each_class(model: PreTrainedModel) -> Collection[nn.Module]:
    """Of Linears one without a weight."""
    from torch import nn

    return {
        type(m): m
        for m in model.modules()
        if not isinstance(m, nn.Linear) or m._parameters.get("weight") is None
    }.values()


def _wanted_linear(model: PreTrainedModel, module: nn.Module) -> nn.Linear | None:
    """The first Linear whose weight the module's initialization asks for in vain."""
    import torch
    from torch import nn

    try:
        with torch.no_grad():
            model._init_weights(module)
    except AttributeError as error:
        if error.name == "weight" and isinstance(error.obj, nn.Linear):
            return error.obj
    except Exception:  # a family's own code, on the meta device: not what is asked here
        pass
    return None
