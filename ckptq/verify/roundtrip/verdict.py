"""From counts to a verdict: right, right with a note, or suspect.

Other tools may use other observers, or GPTQ codes: both are right as long as the signal-to-noise
ratio shows that the weight is intact.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ckptq.quantize import scales
from ckptq.spec import torch_dtype
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.roundtrip.tally import Tally, floor_db
from ckptq.verify.stored_linear import StoredLinear

CLIPPED_DB = 3.0
"""Another observer's scales cost less than this against the floor."""

CHOSEN_DB = 6.0
"""GPTQ's codes cost less than this against the floor."""

LEAST_CHOSEN_DB = 3.0
"""Where config.json or the recipe says GPTQ or iMatrix, codes reach this. Columns of small
inputs lose accuracy for the sake of the others; codes of another weight reach 0."""

LEAST_DB = 0.0
"""Of codes whose choice nobody tells: below it, zeros would be nearer."""

ARRIVED_DB = 1.0
"""A weight that arrives as it is stored is no further than this from its tally, which `fast` takes
of a few rows."""

DAMAGED = 0.005
"""GPTQ changes more of the codes than this share; damage to a file less."""

CHOSEN = "codes chosen by GPTQ or AutoRound"


def expected_scales(dtype: str, tally: Tally, linear: StoredLinear) -> torch.Tensor:
    """The scale of strategy "tensor", or the global scale, from the source's extremes."""
    amax = torch.tensor([max(-tally.low, tally.high)], dtype=torch_dtype(dtype))
    if linear.scheme.strategy == "tensor_group":
        return scales.nvfp4_global(amax)
    if linear.scheme.symmetric:
        return scales.symmetric(amax, linear.scheme.half_range)
    low, high = torch.tensor([[tally.low], [tally.high]], dtype=torch_dtype(dtype))
    return scales.asymmetric(low, high, linear.scheme.num_bits)[0]


def arrival_floor_db(linear: StoredLinear, tally: Tally | None) -> float:
    """What a weight in an engine must reach: the format's own, or what a right weight reaches as it
    is stored, where the format suits it badly."""
    floor = floor_db(linear.scheme, linear.shape) - CHOSEN_DB
    if tally is None or (tally.wrong > tally.twice and not linear.module.chosen):
        return floor
    return min(floor, tally.snr_db - ARRIVED_DB)


def verdict(linear: StoredLinear, tally: Tally) -> list[Finding] | None:
    """Notes on a right weight, or a fault that the counts prove; None for a suspect."""
    floor = floor_db(linear.scheme, linear.shape)
    if tally.wrong > tally.twice:
        return None
    if tally.scales_wrong:
        return [_other_scales(linear, tally, floor)]
    notes = []
    if tally.twice:
        found = f"{tally.twice} of {tally.elements} codes are one step off"
        notes.append(_about(linear, "rounded-twice", found, "the nearest codes"))
    if tally.snr_db < floor:
        notes.append(_low(linear, tally, floor))
    return notes


def _other_scales(linear: StoredLinear, tally: Tally, floor: float) -> Finding:
    least = LEAST_CHOSEN_DB if linear.module.weighed else floor - CLIPPED_DB
    code = "scale-differs" if tally.snr_db >= least else "scale-clips"
    found = f"{tally.scales_wrong} of {tally.scales} scales, {tally.snr_db:.1f} dB"
    return _about(linear, code, found, f"scales from minimum and maximum, {floor:.1f} dB or more")


def _low(linear: StoredLinear, tally: Tally, floor: float) -> Finding:
    found = f"{tally.snr_db:.1f} dB with every code the nearest"
    return _about(linear, "low-snr", found, f"{floor:.1f} dB, as on Gaussian weights")


def undiagnosed(linear: StoredLinear, tally: Tally) -> Finding:
    """The finding for a suspect that no hypothesis explains."""
    floor = floor_db(linear.scheme, linear.shape)
    unexplained = tally.wrong - tally.twice
    share, snr = unexplained / max(tally.elements, 1), tally.snr_db
    if tally.scales_wrong and tally.foreign == 0:
        if tally.zeros_wrong == tally.scales_wrong:
            found = f"{tally.zeros_wrong} of {tally.scales} zero points do not match the codes"
            return _about(linear, "zero-points-wrong", found, "the codes' zero points")
        found = f"{tally.scales_wrong} of {tally.scales} scales do not match the codes"
        code = "scale-corrupt" if _few_scales(tally) else "scale-wrong"
        return _about(linear, code, found, "the codes' scales")
    plain = linear.scheme.search is None and not linear.module.refitted
    if linear.module.chosen and _few_scales(tally) and plain:
        found = f"{tally.scales_wrong} of {tally.scales} scales are of another range"
        return _about(linear, "scale-corrupt", found, "scales from minimum and maximum")
    lost = f"{tally.rows_lost} of {linear.shape[0]} rows have more noise than signal"
    massive = linear.module.by_all and tally.rows_lost
    if linear.module.chosen and tally.rows_lost and not massive and snr >= LEAST_CHOSEN_DB:
        return _about(linear, "codes-corrupt", lost, f"{CHOSEN}, which lose no row")
    known = not tally.scales_wrong or linear.module.weighed
    if linear.module.chosen and known and snr >= LEAST_CHOSEN_DB:
        found = f"{snr:.1f} dB, {share:.0%} of the codes are not the nearest"
        found += f", {lost}, as massive activations make GPTQ choose" if massive else ""
        return _about(linear, "codes-not-nearest", found, CHOSEN)
    if share < DAMAGED:
        found = f"{unexplained} of {tally.elements} codes are not the nearest"
        return _about(linear, "codes-corrupt", found, "the nearest codes")
    found = f"{snr:.1f} dB, {share:.0%} of the codes are not the nearest"
    if snr >= max(floor - CHOSEN_DB, LEAST_DB):
        if linear.module.rounded and tally.rows_lost:
            return _about(linear, "codes-corrupt", lost, "the nearest codes")
        return _about(linear, "codes-not-nearest", found, f"near {floor:.1f} dB")
    return _about(linear, "weight-wrong", found, f"{floor:.1f} dB or more")


def _few_scales(tally: Tally) -> bool:
    """Damage, not another way to choose them."""
    return 0 < tally.scales_wrong < 0.25 * tally.scales


def _about(linear: StoredLinear, code: str, found: str, wanted: str) -> Finding:
    local = "weight_scale" if code.startswith("scale") else linear.scheme.codes
    local = "weight_zero_point" if code.startswith("zero") else local
    tensor = linear.tensors[local]
    return finding(code, tensor, found=found, wanted=wanted)


def with_tensor_scales(
    linears: Mapping[str, StoredLinear],
    tallies: Mapping[str, Tally],
    held: Mapping[str, torch.Tensor],
    sets: Mapping[str, tuple[str, ...]],
) -> dict[str, Tally]:
    """Tallies that also count a wrong scale of a whole tensor.

    Right is the scale of the weight alone, and the one that its fused set shares.
    """
    made = {}
    for name, tally in tallies.items():
        linear = linears[name]
        made[name] = tally
        if name not in held or linear.module.origin is None:
            continue
        together = tally
        for member in sets.get(name, ()):
            other = tallies.get(member)
            if other is not None:
                together = Tally(
                    low=min(together.low, other.low), high=max(together.high, other.high)
                )
        dtype = linear.module.origin.weight.spec.dtype
        right = [expected_scales(dtype, t, linear) for t in (tally, together)]
        found = held[name].reshape(-1).float()
        if not any(torch.equal(found, r.reshape(-1).float()) for r in right):
            made[name] = tally + Tally(scales=1, scales_wrong=1)
    return made
