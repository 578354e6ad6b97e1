"""What a transformers model needs to be initialized, as it is before weights are loaded into it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from ckptq.numbered import starred

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def wants_weights(model: PreTrainedModel) -> frozenset[str]:
    """Linears, numbers as `*`, whose parents ask for their weights.

    Tried on the model itself: its Linears lose their weights, all else is initialized.
    """
    linears, others = _linears_and_others(model)
    held = {linear: linear._parameters.pop("weight") for linear in linears}
    found = set()
    for module in others:
        while (wanted := _wanted_linear(model, module)) is not None:
            found.add(starred(linears[wanted]))
            wanted._parameters["weight"] = held[wanted]
    return frozenset(found)


def asked_in_vain(model: PreTrainedModel) -> Iterator[str]:
    """A Linear, numbers as `*`, for each class whose initialization asks for a weight that is not
    there, as packed ones have none. The model is as it is after; of a class one module is tried."""
    linears, others = _linears_and_others(model)
    for module in others:
        if (wanted := _wanted_linear(model, module)) is not None:
            yield starred(linears[wanted])


def _linears_and_others(
    model: PreTrainedModel,
) -> tuple[dict[nn.Linear, str], Collection[nn.Module]]:
    """Every Linear and its name; one module of each other class."""
    from torch import nn

    linears = {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    others = {type(m): m for m in model.modules() if m not in linears}
    return linears, others.values()


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
