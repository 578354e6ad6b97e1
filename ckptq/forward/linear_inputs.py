"""The inputs of Linears, for static activation scales; of experts fused in one tensor too.

Every expert sees every token, routed to it or not, as in llm-compressor's calibration, so that no
expert is left without a scale. That costs one pass of all tokens through each expert's gate and up.

Shape letters: B batch, S positions, F features in, T tokens that are real, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ckptq.errors import UsageError
from ckptq.forward.loader import Loader

Fold = Callable[[Sequence[str], "Tensor"], None]
"""Gets the names of the Linears that share an input, and that input's real tokens [T, F]."""

Experts = Mapping[int, Sequence[str]]
"""Expert -> its wanted Linears."""

Route = Callable[[Experts, "nn.Module", tuple[Any, ...]], None]
"""Gets the wanted Linears of a module of fused experts, and what it is called with."""

INTO_HIDDEN = ("gate_proj", "up_proj", "w1", "w3")
"""Projections of an expert that read its input; the other reads their result."""


class Inputs:
    """The Linears, by their names on disk, whose inputs are wanted."""

    def __init__(self, loader: Loader, wanted: Collection[str]) -> None:
        self._loader = loader
        self._wanted = wanted
        self._experts = _by_experts(wanted)

    @contextmanager
    def watched(
        self,
        layer: nn.Module,
        name: str,
        lengths: Sequence[int],
        fold: Fold,
        route: Route | None = None,
    ) -> Iterator[None]:
        """In the block, `fold` sees the inputs of the wanted Linears of a layer called `name`.

        `route` gets the calls of fused experts, instead of `fold` every token for each expert.
        """
        with ExitStack() as stack:
            for path, module in layer.named_modules(prefix=name) if self._wanted else ():
                hook = self._hook(path, module, lengths, fold, route)
                if hook is not None:
                    handle = module.register_forward_pre_hook(hook)
                    stack.callback(handle.remove)
            yield

    def _hook(
        self,
        path: str,
        module: nn.Module,
        lengths: Sequence[int],
        fold: Fold,
        route: Route | None,
    ) -> Callable[..., None] | None:
        if isinstance(module, nn.Linear):
            linear = self._loader.stored_module(path)
            if linear in self._wanted:
                return partial(_see_linear, linear, lengths, fold)
        elif _is_fused_experts(module):
            experts = self._experts.get(self._loader.stored_module(path))
            if experts is not None and route is not None:
                return partial(route, experts)
            if experts is not None:
                return partial(_see_experts, experts, lengths, fold)
        return None


def _by_experts(wanted: Collection[str]) -> dict[str, dict[int, list[str]]]:
    """The module that holds the experts -> expert -> its wanted Linears.

    Example: "model.layers.0.mlp.experts" -> 3 -> ["model.layers.0.mlp.experts.3.up_proj"].
    """
    found: dict[str, dict[int, list[str]]] = {}
    for name in sorted(wanted):
        expert, _, _ = name.rpartition(".")
        prefix, _, number = expert.rpartition(".")
        if number.isdigit():
            found.setdefault(prefix, {}).setdefault(int(number), []).append(name)
    return found


def _see_linear(
    name: str, lengths: Sequence[int], fold: Fold, module: nn.Module, args: tuple[Any, ...]
) -> None:
    fold([name], real_tokens(args[0], lengths, name))


def _see_experts(
    experts: dict[int, list[str]],
    lengths: Sequence[int],
    fold: Fold,
    module: Any,
    args: tuple[Any, ...],
) -> None:
    first = next(iter(experts.values()))[0]
    x_TF = real_tokens(args[0], lengths, first)
    # Llama-4 hands each expert all tokens, zeroed where they are not routed to it
    x_TF = x_TF[x_TF.any(-1)]
    held = {n: names for n, names in experts.items() if n < len(module.gate_up_proj)}
    every = [name for names in held.values() for name in names]
    fold([name for name in every if reads_input(name)], x_TF)
    for number, names in held.items():
        inner = [name for name in names if not reads_input(name)]
        if inner:
            fold(inner, between(module, number, x_TF))


def reads_input(name: str) -> bool:
    return name.rpartition(".")[2] in INTO_HIDDEN


def between(experts: Any, number: int, x_TF: Tensor) -> Tensor:
    """The input of one expert's down projection, [T, I]: activation(gate) * up."""
    transposed = getattr(experts, "is_transposed", not hasattr(experts, "has_gate"))
    weight = experts.gate_up_proj[number]
    up_T2I = x_TF @ weight if transposed else torch.nn.functional.linear(x_TF, weight)
    if getattr(experts, "has_bias", False):
        up_T2I = up_T2I + experts.gate_up_proj_bias[number]
    if hasattr(experts, "_apply_gate"):
        gated_TI: Tensor = experts._apply_gate(up_T2I)
        return gated_TI
    gate_TI, up_TI = up_T2I.chunk(2, dim=-1)
    return up_TI * experts.act_fn(gate_TI)


def _is_fused_experts(module: nn.Module) -> bool:
    """Experts as transformers 5 fuses them: `gate_up_proj` and `down_proj` are 3-D parameters."""
    fused = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return all(getattr(tensor, "ndim", 0) == 3 for tensor in fused)


def real_tokens(x: Tensor, lengths: Sequence[int], name: str) -> Tensor:
    """The tokens of [B, S, F], [B * S, F] or [n * B * S, F] that are not padding, as [T, F]."""
    B, S, F = len(lengths), max(lengths), x.shape[-1]
    where = real_positions(lengths, S, x.device)
    if where is None:
        return x.reshape(-1, F)
    if prod(x.shape[:-1]) % (B * S):
        raise UsageError(
            f"{name}: gets {prod(x.shape[:-1])} of a batch's {B} x {S} positions, so padding "
            "cannot be told from text; use --batch-size 1"
        )
    return x.reshape(-1, B * S, F).index_select(1, where).reshape(-1, F)


def real_positions(lengths: Sequence[int], S: int, device: torch.device) -> Tensor | None:
    """Which of B * S positions are not padding, [T], found without waiting for a device; None if
    all are real."""
    if all(length == S for length in lengths):
        return None
    real = [torch.arange(row * S, row * S + length) for row, length in enumerate(lengths)]
    return torch.cat(real).to(device, non_blocking=True)
