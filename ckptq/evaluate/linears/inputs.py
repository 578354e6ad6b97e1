"""Rounding of the inputs of quantized Linears, as an engine does it.

Scales as vLLM computes them: amax / 448 for FP8, amax / 127 for INT8, amax / 7 for INT4, per token,
per group of columns of a token, or static; NVFP4, MXFP4 and MXFP8 in groups of their own.

Shape letters: T tokens and whatever leads, C columns, E experts, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ckptq.calibrate.observers import FP8_MAX, INT8_MAX, NVFP4_MAX
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.read import read_tensor
from ckptq.engines.vllm import group_of
from ckptq.errors import PlanError, SourceError
from ckptq.evaluate.largest import Largest
from ckptq.evaluate.linears.microscaling import mxfp4, mxfp8, nvfp4
from ckptq.forward.linear_inputs import real_tokens
from ckptq.recipes.args import Args
from ckptq.recipes.declared import declared

Made = TypeVar("Made")

LARGEST = {"float": 448.0, "int": 127.0, "int4": 7.0}
INPUT_SCALES = ("input_scale", "activation_scale", "input_global_scale")
"""Names of the scales of static activations; the second in FP8 sources."""

MICROSCALED = {"mxfp4": mxfp4, "mxfp8": mxfp8}
SMALLEST_SCALE = 1 / (448.0 * 512.0)
"""vLLM's floor for dynamic FP8 scales."""


@dataclass(frozen=True, slots=True)
class InputScheme:
    """How the input of a Linear is rounded."""

    type: str
    """ "float" (E4M3), "int" (INT8), "int4", or "nvfp4", "mxfp4", "mxfp8" with their own groups."""
    group: int | None = None
    """Columns that share a scale; None means the whole token."""
    scale: float | None = None
    """Of a static scheme: inputs are divided by it. NVFP4's is global, and a factor."""
    static: bool = False
    """Whether the scale has to be measured on the source, if none is given."""

    def round(self, x_TC: Tensor) -> Tensor:
        """x as the matrix product sees it, in its own dtype."""
        if self.type in MICROSCALED:
            return MICROSCALED[self.type](x_TC)
        if self.type == "nvfp4":
            assert self.scale is not None, "a static scheme has no scale yet"
            return nvfp4(x_TC, self.scale)
        if self.scale is not None:
            return _rounded(x_TC, _like(x_TC, self.scale), self.type)
        if self.group is None:
            return _rounded(x_TC, scale_of_inputs(x_TC, self.type), self.type)
        x_TGg = in_groups(x_TC, self.group)
        rounded = _rounded(x_TGg, scale_of_inputs(x_TGg, self.type), self.type)
        return rounded.flatten(-2)[..., : x_TC.shape[-1]]


def input_scheme(args: Args, name: str, scale: float | None = None) -> InputScheme:
    """From QuantizationArgs; PlanError for what vLLM would not run either.

    A static scheme without `scale` is `static`, and gets its scale later.
    """
    kind = _kind(args)
    if kind is None or not args.symmetric:
        raise PlanError(f"{name}: input_activations {args.to_dict()} cannot be simulated")
    if args.local or args.dynamic is False:
        return InputScheme(kind, scale=scale, static=scale is None)
    return InputScheme(kind, group=args.group_size if args.strategy == "group" else None)


def _kind(args: Args) -> str | None:
    """The `type` of an InputScheme; None if it has none."""
    bits, dynamic = args.num_bits, args.dynamic
    grouped = args.strategy, args.group_size
    if args.type == "int":
        return {8: "int", 4: "int4" if dynamic is True else None}.get(bits)
    if args.local:
        return "nvfp4" if bits == 4 and grouped == ("tensor_group", 16) else None
    if bits == 4:
        return "mxfp4" if dynamic is True and grouped == ("group", 32) else None
    if bits == 8 and args.scale_dtype == "uint8":
        return "mxfp8" if dynamic is True and grouped == ("group", 32) else None
    return "float" if bits == 8 else None


def declared_inputs(ckpt: Checkpoint, linears: Collection[str]) -> dict[str, InputScheme]:
    """Quantized Linear -> the input scheme of its group."""
    said = declared(ckpt)
    split = ((*name.rpartition("."), tensor) for name, tensor in ckpt.tensors.items())
    scales = {m: float(read_tensor(tensor)) for m, _, n, tensor in split if n in INPUT_SCALES}
    found = {}
    for name in linears:
        group = group_of(said, name)
        if group is not None and group.inputs is not None:
            found[name] = input_scheme(group.inputs, name, scales.get(name))
            if found[name].static:
                raise SourceError(f"{ckpt.path}: {name}: static activations, but no input_scale")
    return found


def shared_rule(rules: Collection[InputScheme], name: str) -> InputScheme:
    """The largest of static scales, which vLLM uses for all experts of one call.

    PlanError for rules that differ in more.
    """
    if len(rules) == 1:
        return next(iter(rules))
    scales = [rule.scale for rule in rules if rule.scale is not None]
    if len(scales) != len(rules) or len({rule.type for rule in rules}) != 1:
        raise PlanError(f"{name}: its experts' input_activations differ")
    kind = next(iter(rules)).type
    return InputScheme(kind, scale=min(scales) if kind == "nvfp4" else max(scales))


def remembering(
    made: Callable[[InputScheme, Tensor], Made],
) -> Callable[[InputScheme, Tensor], Made]:
    """`made`, once for an input and a scheme: q, k and v multiply the same tensor."""
    last: dict[InputScheme, tuple[Tensor, int, Made]] = {}

    def remembered(rule: InputScheme, x_TC: Tensor) -> Made:
        found = last.get(rule)
        if found is None or found[0] is not x_TC or found[1] != x_TC._version:
            found = last[rule] = x_TC, x_TC._version, made(rule, x_TC)
        return found[2]

    return remembered


class InputMaxima:
    """Largest magnitude of each weight's input, taken while the source runs."""

    def __init__(self) -> None:
        self.seen = Largest()

    def see(self, lengths: Sequence[int], parameter: str, x: Tensor) -> Tensor:
        """Fold one input in and return it; padding does not count."""
        self.seen.see(parameter, real_tokens(x, lengths, parameter).abs().amax())
        return x

    def filled(self, parameter: str, rule: InputScheme) -> InputScheme:
        """Give a static rule without a scale the one that calibration on this text would find."""
        if not rule.static:
            return rule
        amax = float(self.seen.values[parameter])
        if rule.type == "nvfp4":
            return replace(rule, scale=_global_scale(amax), static=False)
        top = FP8_MAX if rule.type == "float" else INT8_MAX
        return InputScheme(rule.type, scale=max(amax / top, SMALLEST_SCALE))


def _global_scale(amax: float) -> float:
    """1 if all inputs were zero, as in calibration."""
    return NVFP4_MAX / amax if amax > 0 else 1.0


def _like(x: Tensor, value: float) -> Tensor:
    return x.new_full((1,), value, dtype=x.float().dtype)


def in_groups(x_TC: Tensor, size: int) -> Tensor:
    """[T, G, size]; an incomplete last group is padded with zeros, as in vLLM's torch path for
    FP8."""
    from torch.nn.functional import pad

    return pad(x_TC, (0, -x_TC.shape[-1] % size)).unflatten(-1, (-1, size))


def scale_of_inputs(x: Tensor, kind: str) -> Tensor:
    """Of each token or group, in float32: [..., 1]."""
    scale = x.abs().amax(-1, keepdim=True).float() / LARGEST[kind]
    return scale.clamp_min(SMALLEST_SCALE) if kind == "float" else scale.clamp_min(1e-12)


def _rounded(x: Tensor, scale: Tensor, kind: str) -> Tensor:
    ratio = x.float() / scale
    if kind != "float":
        top = LARGEST[kind]
        code = ratio.round().clamp(-top - 1, top)
    else:
        code = ratio.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()
    return (code * scale).to(x.dtype)
