"""What a row does at the products of one layer: multiply codes, round inputs, or look at them.

Shape letters: T tokens and whatever leads, C input features, N output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ckptq.evaluate.linears.coded_parameter import Parts, parts_of
from ckptq.evaluate.linears.coded_product import CodesOf, input_codes, product_of
from ckptq.evaluate.linears.inputs import InputScheme, remembering, shared_rule
from ckptq.evaluate.linears.products import Change, Treatment
from ckptq.quantize.coded import Coded

Linears = Mapping[str, Collection[str]]
"""Parameter of a layer -> the Linears whose weights it holds, by their names on disk."""


@dataclass(frozen=True)
class Weights:
    """The weights of a loaded layer, and what is known of them: the same for every row on them."""

    parameters: Mapping[str, Tensor]
    linears: Linears
    parts: Mapping[str, Parts] = field(default_factory=dict)
    """Of parameters whose codes are known."""


def weights_of_layer(
    layer: nn.Module,
    name: str,
    stored_names: Mapping[str, tuple[str, ...]],
    consumed: Mapping[str, tuple[str, ...]],
    codes: Mapping[str, Coded],
) -> Weights:
    """Of a layer called `name`. `stored_names`: parameter -> tensors on disk; `consumed`: tensor
    on disk -> Linears; `codes`: Linear -> its codes."""
    parameters = {f"{name}.{local}": weight for local, weight in layer.named_parameters()}
    linears = {
        parameter: [
            linear
            for stored in stored_names.get(parameter, ())
            for linear in consumed.get(stored, ())
        ]
        for parameter in parameters
    }
    found = {
        parameter: parts_of(parameters[parameter], {each: codes[each] for each in names})
        for parameter, names in linears.items()
        if names and codes and all(each in codes for each in names)
    }
    return Weights(parameters, linears, {p: parts for p, parts in found.items() if parts})


def rules_of(weights: Weights, inputs: Mapping[str, InputScheme]) -> dict[str, InputScheme]:
    """Parameter -> how the input of its Linears is rounded. PlanError if experts that share a
    tensor have different schemes."""
    found: dict[str, InputScheme] = {}
    for parameter, linears in weights.linears.items() if inputs else ():
        rules = {inputs[linear] for linear in linears if linear in inputs}
        if rules:
            found[parameter] = shared_rule(rules, parameter)
    return found


def observed(
    weights: Weights, rules: Collection[str], see: Callable[[str, Tensor], Tensor]
) -> Iterator[tuple[Tensor, Treatment]]:
    """Weights whose inputs are shown to `see`, with the parameter's name."""
    for parameter in rules:
        yield weights.parameters[parameter], Treatment(partial(see, parameter))


def treated(
    weights: Weights, rules: Mapping[str, InputScheme], codes: bool
) -> Iterator[tuple[Tensor, Treatment]]:
    """Weights whose inputs are rounded, or whose `codes` are multiplied. For one pass of a layer:
    what is made of an input is remembered."""
    rounded, codes_of = remembering(InputScheme.round), remembering(input_codes)
    for parameter, weight in weights.parameters.items():
        rule = rules.get(parameter)
        change: Change | None = None if rule is None else partial(rounded, rule)
        parts = weights.parts.get(parameter) if codes else None
        if parts is not None and has_products(parts, rule, weight.dtype):
            yield weight, Treatment(change, partial(_multiply, parts, rule, codes_of))
        elif change is not None:
            yield weight, Treatment(change)


def has_products(parts: Parts, rule: InputScheme | None, dtype: torch.dtype) -> bool:
    """Whether all of these weights can be multiplied as codes."""
    schemes = {each.scheme for weights in parts.values() for each in weights}
    return all(product_of(scheme, rule, dtype) is not None for scheme in schemes)


def _multiply(
    parts: Parts, rule: InputScheme | None, codes_of: CodesOf, x_TC: Tensor, w_NC: Tensor
) -> Tensor | None:
    """x times the codes of a matrix, transposed; None for a part of the parameter that is none of
    its matrices, and where there is no input."""
    weights = parts.get(int(w_NC.storage_offset()), ())
    if not weights or sum(each.shape[0] for each in weights) != len(w_NC) or not x_TC.numel():
        return None
    made = []
    with torch.cuda.device_of(x_TC):  # triton launches on the current device
        for each in weights:
            product = product_of(each.scheme, rule, x_TC.dtype)
            assert product is not None
            made.append(product(x_TC, rule, each, codes_of))
    out = made[0] if len(made) == 1 else torch.cat(made, -1)
    return out.view(*x_TC.shape[:-1], -1)
