"""One decoder layer tuned by AutoRound: which way each weight is rounded, and each scale, learned
by gradients of what the whole layer makes of its inputs.

The library is called as llm-compressor's `AutoRoundModifier` calls it, so that results are equal,
but for the dtype of scales: it is the one that they are stored in, and not FP16, so that what is
stored is what was tuned. Layers that are not in BF16 are tuned in float32.

Shape letters: S positions, E hidden size, R rows, C columns.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Any, cast

from ckptq.autoround.integers import register_integers
from ckptq.recipes.scheme import Tuning

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What the layer is called with for one sample: hidden states [1, S, E] first."""


@dataclass(frozen=True)
class Target:
    """How one Linear of a layer is to be quantized."""

    scheme: Mapping[str, Any]
    """AutoRound's: bits, sym, group_size, data_type, ..."""
    scale_dtype: torch.dtype
    global_scale: Tensor | None = None
    """[1], of NVFP4."""


UNQUANTIZED = {"bits": 16, "act_bits": 16}


@dataclass(frozen=True)
class Tuned:
    """What AutoRound made of one Linear."""

    weight_RC: Tensor
    """Dequantized, in the dtype that the layer was tuned in."""
    scale: Tensor
    """[R, G]; of NVFP4 as numbers of E4M3, of MXFP4 exponents."""
    zero_point: Tensor | None
    """[R, G], from 0."""


class Block:
    """A decoder layer at work. The layer itself is left without use: its weights are tuned."""

    def __init__(self, layer: nn.Module, config: Any, device: torch.device) -> None:
        from llmcompressor.modeling.moe.linearize import linearize_moe
        from llmcompressor.modifiers.autoround.base import _wrap_decoding_layer

        gpu = device.type == "cuda"  # which AutoRound wants to be told by number
        self._device = f"cuda:{device.index or 0}" if gpu else str(device)
        self._layer = _with_own_parameters(layer)
        self._model = cast("Any", _wrap_decoding_layer(self._layer))
        self._model.config, self._model.name_or_path = config, ""
        self.reached: set[str] = set()
        """Linears that the samples have reached: not all experts, maybe."""
        with _undisturbed(), redirect_stderr(StringIO()):  # its progress bar
            linearize_moe(self._model)

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Every one, by its name in the layer; experts fused in one tensor have become Linears."""
        from torch import nn

        named = self._layer.named_modules()
        return {name: module for name, module in named if type(module) is nn.Linear}

    def tune(
        self,
        targets: Mapping[str, Target],
        calls: Sequence[Call],
        quantized: list[Tensor] | None,
        how: Tuning,
    ) -> tuple[dict[str, Tuned], list[Tensor]]:
        """Each target by its name in the layer, and what the tuned layer makes of each sample.

        `calls` are of the unquantized layers before it, and say what the layer should make of the
        samples; `quantized`, [1, S, E] each, is what the tuned ones made of them, which it will
        get. Samples of different length are padded at their end.
        """
        import torch
        from auto_round import AutoRound
        from auto_round.schemes import QuantizationScheme
        from llmcompressor.modifiers.autoround import AutoRoundModifier

        register_integers()
        linears = self.linears
        for name, target in targets.items():
            if target.global_scale is not None:
                linears[name].weight_global_scale = target.global_scale
        usual = next(iter(targets.values()), None)
        each = {
            f"model.layers.0.{name}": dict(targets[name].scheme if name in targets else UNQUANTIZED)
            for name in linears
        }
        with torch.enable_grad(), _undisturbed(), self._watched(linears):
            padded, _ = AutoRoundModifier()._pad_captured_inputs(list(calls))
            rounder: Any = AutoRound(
                model=self._model,
                tokenizer="",
                scheme=QuantizationScheme(**usual.scheme) if usual else "W4A16",
                layer_config=each,
                iters=how.iters,
                lr=how.lr,
                batch_size=how.batch_size,
                enable_torch_compile=how.enable_torch_compile,
                device_map=self._device,
                scale_dtype=usual.scale_dtype if usual else None,
                amp=self._model.dtype == torch.bfloat16,
                low_gpu_mem_usage=True,
            )
            rounder.configure_layer_config(enable_gguf_official_mixed=False)
            rounder.batch_dim = 0
            made, _ = rounder.quantize_block(
                block=self._layer,
                inputs=[(call,) for call in padded],
                q_input=quantized,
                device=self._device,
                auto_offload=False,
            )
        return {name: _tuned(self._layer.get_submodule(name)) for name in targets}, made

    @contextmanager
    def _watched(self, linears: Mapping[str, nn.Linear]) -> Iterator[None]:
        """Which of these are called, before they are tuned: what the layer should make of the
        samples is found out first."""

        def see(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            if args[0].numel():
                self.reached.add(name)

        hooks = [linears[n].register_forward_pre_hook(partial(see, n)) for n in linears]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _tuned(module: Any) -> Tuned:
    zero_point = module.zp if hasattr(module.zp, "shape") else None
    return Tuned(module.weight.detach(), module.scale, zero_point)


def _with_own_parameters(layer: nn.Module) -> nn.Module:
    """A copy of the module that shares the memory of its weights: AutoRound leaves attributes, and
    other modules, behind."""
    from torch import nn

    memo = {id(p): nn.Parameter(p.data, requires_grad=False) for p in layer.parameters()}
    return deepcopy(layer, memo)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Around the library, which asks all of torch for deterministic algorithms, says what it does,
    and collects garbage six times a layer: what is in memory before is frozen, and not looked
    through."""
    import torch
    from loguru import logger as theirs

    logger = logging.getLogger("autoround")
    level, strict = logger.level, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    logger.setLevel(logging.ERROR)
    theirs.disable("llmcompressor")
    gc.freeze()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        gc.unfreeze()
        theirs.enable("llmcompressor")
        logger.setLevel(level)
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
