"""What has been seen at each point of a model, and the scales that follow from it.

A point is named as its scale is on disk, without the ending: "model.layers.0.self_attn.k" for
"...self_attn.k_scale", "model.layers.0.mlp.up_proj.input" for "...up_proj.input_scale" or
"...up_proj.input_global_scale".

Shape letters: B batch, H heads, S positions, D head size, T tokens, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ckptq.calibrate.observers import FP8_MAX, NVFP4_MAX, Observer, Stats, Strategy, heads
from ckptq.errors import SourceError
from ckptq.kernels.attention.maxima import Maxima


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which statistics are taken, and how scales are read off them."""

    strategy: Strategy | None
    """None leaves attention out."""
    attention: Observer
    inputs: Mapping[str, float]
    """Linear, as named on disk -> what its largest input becomes: 448 for FP8, 127.5 for INT8,
    448 * 6 for NVFP4, whose global scale is what inputs are multiplied by, not divided."""
    linear: Observer

    def to_json(self) -> dict[str, Any]:
        """What two runs must agree on to have the same statistics."""
        return {
            "strategy": self.strategy,
            "observer": asdict(self.attention),
            "inputs": dict(sorted(self.inputs.items())),
            "input_observer": asdict(self.linear),
        }


@dataclass
class Statistics:
    """A statistic per point, grown batch by batch."""

    wanted: Wanted
    points: dict[str, Stats] = field(default_factory=dict)
    _unchecked: set[str] = field(default_factory=set)
    _maxima: dict[str, tuple[Maxima, torch.dtype]] = field(default_factory=dict)

    def add_attention(
        self, module: str, qkv_BHSD: Mapping[str, Tensor], lengths: Sequence[int]
    ) -> None:
        """Add a batch of q, k and v, of which `lengths[b]` positions of row b are real."""
        assert self.wanted.strategy is not None
        for which, x_BHSD in qkv_BHSD.items():
            point, x_BHSD = f"{module}.{which}", heads(x_BHSD, self.wanted.strategy)
            stats = self.points.get(point, {})
            self._put([point], self.wanted.attention.fold(stats, x_BHSD, lengths))

    def add_latent(self, module: str, row_B1SD: Tensor, lengths: Sequence[int]) -> None:
        """Add a batch of what latent attention caches, which is read as k and as v."""
        assert self.wanted.strategy is not None
        points, x_B1SD = [f"{module}.k", f"{module}.v"], heads(row_B1SD, self.wanted.strategy)
        stats = self.points.get(points[0], {})
        self._put(points, self.wanted.attention.fold(stats, x_B1SD, lengths))

    def add_input(self, linears: Sequence[str], x_TF: Tensor) -> None:
        """Add tokens that are the input of all these Linears."""
        if not linears or not len(x_TF):
            return
        stats = self.points.get(f"{linears[0]}.input", {})
        stats = self.wanted.linear.fold(stats, x_TF[None, None], [len(x_TF)])
        self._put([f"{linear}.input" for linear in linears], stats)

    def maxima(self, module: str, q_BHSD: Tensor, k_BKSD: Tensor) -> Maxima:
        """Buffers for the largest |q|, |k| and |v| of a module, which a kernel folds into."""
        if module not in self._maxima:
            H, K = q_BHSD.shape[1], k_BKSD.shape[1]
            self._maxima[module] = (Maxima.zeros(H, K, q_BHSD.device), q_BHSD.dtype)
        return self._maxima[module][0]

    def settle(self) -> None:
        """Move the kernels' results from the buffers into the points."""
        for module, (maxima, dtype) in self._maxima.items():
            for which, amax_H in (("q", maxima.q_H), ("k", maxima.k_K), ("v", maxima.v_K)):
                if self.wanted.strategy == "tensor":
                    amax_H = amax_H.amax().reshape(1)
                amax_H, point = amax_H.cpu().to(dtype), f"{module}.{which}"
                seen = {"amin": -amax_H, "amax": amax_H}
                merged = self.wanted.attention.merge(self.points.get(point, {}), seen)
                self._put([point], merged)
        self._maxima.clear()

    def add(self, points: Mapping[str, Stats]) -> None:
        """Merge the statistics of other samples."""
        for point, seen in points.items():
            which = point.rpartition(".")[2]
            observer = self.wanted.linear if which == "input" else self.wanted.attention
            self._put([point], observer.merge(self.points.get(point, {}), seen))

    def _put(self, points: Sequence[str], stats: Stats) -> None:
        self.points |= dict.fromkeys(points, stats)
        self._unchecked.update(points)

    def check_finite(self, where: str) -> None:
        """Raise SourceError when NaN or Inf was seen at a point since the last check."""
        for point in sorted(self._unchecked):
            stats = self.points[point]
            worst = stats["amin"].abs().maximum(stats["amax"].abs()).max().item()
            if not worst < float("inf"):
                raise SourceError(
                    f"{where}: {point} is {worst} during calibration: a weight before it is "
                    "not finite, or its dtype overflows"
                )
        self._unchecked.clear()

    def scale_name(self, point: str) -> str:
        """The tensor that holds the scale of a point."""
        return f"{point}_global_scale" if self._is_global(point) else f"{point}_scale"

    def _is_global(self, point: str) -> bool:
        module, _, which = point.rpartition(".")
        return which == "input" and self.wanted.inputs[module] == NVFP4_MAX

    def scale(self, point: str, dtype: torch.dtype) -> Tensor:
        """The scale of a point: [1] per tensor, [H, 1, 1] per head; NVFP4's is float32."""
        if self._is_global(point):
            from ckptq.quantize.scales import nvfp4_global

            return nvfp4_global(self.wanted.linear.magnitude(self.points[point]))
        stats, (module, _, which) = self.points[point], point.rpartition(".")
        computed = stats["amin"].dtype
        if which == "input":
            top = self.wanted.inputs[module]
            return self.wanted.linear.scale(stats, computed, top).to(dtype)
        scale_H = self.wanted.attention.scale(stats, computed, FP8_MAX).to(dtype)
        return scale_H.reshape(-1, 1, 1) if self.wanted.strategy == "attn_head" else scale_H
