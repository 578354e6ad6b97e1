"""What has been seen at each point of a model, and the scales that follow from it.

A point is a module and what is observed there: "model.layers.0.self_attn.k". On disk its scale is
called "...self_attn.k_scale", its statistics "...k_amin" and "...k_amax".

Shape letters: B batch, H heads, S positions, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ckptq.calibrate.observers import Observer, Stats, Strategy, heads
from ckptq.errors import SourceError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ckptq.calibrate.attention import Tap


class Statistics:
    """A statistic per point, grown batch by batch."""

    def __init__(self, observer: Observer, strategy: Strategy) -> None:
        self.observer = observer
        self.strategy = strategy
        self.points: dict[str, Stats] = {}

    def tap(self, lengths: Sequence[int]) -> Tap:
        """What attention shows its q, k and v to, for one batch."""

        def tap(module: str, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> None:
            for which, x_BHSD in (("q", q_BHSD), ("k", k_BHSD), ("v", v_BHSD)):
                self.fold(f"{module}.{which}", heads(x_BHSD, self.strategy), lengths)

        return tap

    def fold(self, point: str, x_BHSD: Tensor, lengths: Sequence[int]) -> None:
        """Add one batch to a point."""
        self.points[point] = self.observer.fold(self.points.get(point, {}), x_BHSD, lengths)

    def check_finite(self, where: str, prefix: str) -> None:
        """Raise SourceError when NaN or Inf was seen at a point whose name begins with `prefix`."""
        for point, stats in self.points.items():
            if point.startswith(prefix + "."):
                worst = stats["amin"].abs().maximum(stats["amax"].abs()).max().item()
                if not worst < float("inf"):
                    raise SourceError(
                        f"{where}: {point} is {worst} during calibration: a weight before it is "
                        "not finite, or its dtype overflows"
                    )

    def scales(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """Point -> scale in the dtype of its module: [1] per tensor, [H, 1, 1] per head."""
        found = {}
        for point, stats in self.points.items():
            scale_H = self.observer.scale(stats, stats["amin"].dtype).to(dtypes[point])
            found[point] = scale_H.reshape(-1, 1, 1) if self._per_head(point) else scale_H
        return found

    def _per_head(self, point: str) -> bool:
        return self.strategy == "attn_head" and point.rpartition(".")[2] in ("q", "k", "v")
