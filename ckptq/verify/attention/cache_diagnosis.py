"""Cache scales against the values in the model: which explanation fits?

A calibrated scale is the largest value seen, over 448; other text gives a similar value. So
log2(448 * scale / amax) is near 0 for each head; if it is not, the hypothesis that brings it near 0
is the explanation. Shape letters: H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ckptq.quantize.scales import E4M3_MAX
from ckptq.verify.attention.fp8_heads import HeadSums
from ckptq.verify.attention.watch import Watch
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding

NEAR = 1.0
"""Every head within a factor of 2."""

FAR, FAR_ALONE = 1.5, 3.0
"""Several scales of which one is off by a factor of 3, or a lone one by 8, ask for an
explanation."""

BETTER = 1.0
"""An explanation must bring the worst head nearer by a factor of 2."""

TOGETHER, FEWEST = 0.75, 8
"""One factor for all: at least 1.7, and so many scales within 1.7 of one another."""

BESIDE = 3.0
"""Times the error of the middle head: one head's own trouble."""

NEARLY = 0.5
"""Every head within 1.4 of what it needs, once the heads are in order."""

LOST = 0.1
"""Relative error of a head that FP8 spoils; with a right scale it is 0.03."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """A hypothesis that fits."""

    code: str
    found: str
    distance: float


def diagnose_cache(watch: Watch) -> list[Finding]:
    """One finding for each scale tensor that does not fit the values."""
    found: list[Finding] = []
    for (module, which), sums in watch.heads.items():
        scale, amax = fit(sums)
        own = distance(scale, amax)
        name = f"{module}.{which}_scale"
        if own <= (FAR if len(scale) > 1 else FAR_ALONE):
            found += _one_spoiled(name, sums)
            continue
        fitting = [e for e in _explanations(watch, module, which) if e.distance <= NEAR]
        best = min(fitting, key=lambda e: e.distance, default=None)
        if best is not None and own - best.distance >= BETTER:
            found.append(finding(best.code, name, found=best.found, wanted="its own scales"))
        else:
            found += _unexplained(name, sums)
    return found or list(_one_factor(watch))


def _one_spoiled(name: str, sums: HeadSums) -> Iterator[Finding]:
    """A head with a large error although no scale is far off: two similar heads were exchanged, or
    it was not calibrated on such text."""
    error_H = sums.errors_3H[0]
    worst = float(error_H.max())
    if worst < LOST or worst < BESIDE * float(error_H.median()):
        return
    scale, amax = fit(sums)
    exchanged = _exchanged(scale, amax) if len(scale) > 1 else None
    if exchanged is not None and exchanged.found and exchanged.distance <= NEARLY:
        yield finding(exchanged.code, name, found=exchanged.found, wanted="its own scales")
    else:
        yield from _unexplained(name, sums)


def fit(sums: HeadSums) -> tuple[Tensor, Tensor]:
    """Scales and largest values, [H] each; [1] where all heads share one scale."""
    scale, amax = sums.choices.stored.double(), sums.amax_H
    if bool((scale == scale[0]).all()):
        return scale[:1], amax.amax(0, keepdim=True)
    return scale, amax


def distance(scale_H: Tensor, amax_H: Tensor) -> float:
    """The worst head's |log2(448 * scale / amax)|; heads that nothing passed through are fine."""
    passed = amax_H > 0
    if not bool(passed.any()):
        return 0.0
    return float((E4M3_MAX * scale_H[passed] / amax_H[passed]).log2().abs().max())


def _explanations(watch: Watch, module: str, which: str) -> Iterator[Explanation]:
    scale, amax = fit(watch.heads[module, which])
    yield Explanation(
        code="cache-scale-inverted", found="reciprocals", distance=distance(1 / scale, amax)
    )
    other = {"k": "v", "v": "k"}.get(which)
    if other is not None:
        theirs = fit(watch.heads[module, other])[1]
        if len(theirs) == len(scale):
            found, far = f"the scales of {other}", distance(scale, theirs)
            yield Explanation(code="kv-exchanged", found=found, distance=far)
    if len(scale) > 1:
        yield _exchanged(scale, amax)
    for (there, theirs_are), others in watch.heads.items():
        theirs = fit(others)[1]
        if there != module and theirs_are == which and len(theirs) == len(scale):
            found, far = f"the scales of {there}", distance(scale, theirs)
            yield Explanation(code="cache-scale-of-another", found=found, distance=far)


def _exchanged(scale_H: Tensor, amax_H: Tensor) -> Explanation:
    """Heads in the order of their sizes; nothing is `found` where that is theirs."""
    order = _best_order(scale_H, amax_H)
    said = ", ".join(f"head {i} holds {j}" for i, j in enumerate(order) if i != j)
    restored = scale_H[torch.tensor(order).argsort()]
    return Explanation(
        code="heads-exchanged", found=said[:200], distance=distance(restored, amax_H)
    )


def _one_factor(watch: Watch) -> Iterator[Finding]:
    """All scales off by the same factor, such as amax / 240: only visible in all heads together."""
    distances = [(E4M3_MAX * scale / amax).log2() for scale, amax in map(fit, watch.heads.values())]
    all_N = torch.cat([d[d.isfinite()] for d in distances]) if distances else torch.zeros(0)
    if len(all_N) < FEWEST:
        return
    low, middle, high = all_N.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=all_N.dtype)).tolist()
    if abs(middle) >= TOGETHER and high - low <= TOGETHER:
        module, which = next(iter(watch.heads))
        found = f"all {len(all_N)} scales are about {2**middle:.2g} times what this text requires"
        wanted = "the largest values over 448"
        yield finding("cache-scale-factor", f"{module}.{which}_scale", found=found, wanted=wanted)


def _best_order(scale_H: Tensor, amax_H: Tensor) -> list[int]:
    """order[i]: the head whose scale stands at i; sorted against sorted is the best matching."""
    order = [0] * len(scale_H)
    for at, head in zip(scale_H.argsort().tolist(), amax_H.argsort().tolist(), strict=True):
        order[at] = head
    return order


def _unexplained(name: str, sums: HeadSums) -> Iterator[Finding]:
    """It is a fault only if a head's error is large: texts differ."""
    error_H = sums.errors_3H[0]
    worst = int(error_H.argmax())
    if float(error_H[worst]) < LOST:
        return
    holds, reaches = 448 * float(sums.choices.stored[worst]), float(sums.amax_H[worst])
    share = float(sums.saturated_H[worst]) / max(sums.counted, 1)
    found = (
        f"head {worst} reaches {reaches:.3g}, its scale covers {holds:.3g}: error "
        f"{float(error_H[worst]):.0%}, {share:.2%} of its values are clipped"
    )
    code = "head-saturates" if holds < reaches else "cache-scale-wrong"
    yield finding(code, name, found=found, wanted=f"an error under {LOST:.0%}")
