"""Exchanged weights: another Linear as the explanation of one.

The comparison has digested the expected and the stored scales of each Linear, so their owner is a
lookup; samples of the data then show what else was moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ckptq.numbered import starred
from ckptq.verify.diagnosis.sample import Sample
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.roundtrip.tally import Tally
from ckptq.verify.roundtrip.verdict import CHOSEN_DB
from ckptq.verify.stored_linear import Held, StoredLinear
from ckptq.verify.subject import CODES, EXPERT

MOST = 8
"""How many others are tried on one weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Directory:
    """Who has which scales, and who stands near whom."""

    observed: Mapping[tuple[str, ...], tuple[str, ...]]
    """Digest of the scales that the source gives -> the Linears that should hold them."""
    siblings: Mapping[str, tuple[str, ...]]
    """Parent -> its Linears."""
    alike: Mapping[str, tuple[str, ...]]
    """Name without its numbers -> the Linears of all layers, and of all experts."""
    place: Mapping[str, int]
    """Linear -> where it stands in `alike`."""

    def owners(self, name: str, tally: Tally) -> tuple[str, ...]:
        """The other Linears whose scales this one holds."""
        return tuple(owner for owner in self.observed.get(tally.held, ()) if owner != name)


def directory(tallies: Mapping[str, Tally]) -> Directory:
    observed: dict[tuple[str, ...], tuple[str, ...]] = {}
    siblings: dict[str, tuple[str, ...]] = {}
    alike: dict[str, list[str]] = {}
    place: dict[str, int] = {}
    for name, tally in tallies.items():
        if tally.observed:
            observed[tally.observed] = (*observed.get(tally.observed, ()), name)
        parent = name.rpartition(".")[0]
        siblings[parent] = (*siblings.get(parent, ()), name)
        same = alike.setdefault(starred(name), [])
        place[name] = len(same)
        same.append(name)
    return Directory(
        observed=observed,
        siblings=siblings,
        alike={key: tuple(names) for key, names in alike.items()},
        place=place,
    )


def candidates(
    name: str, linears: Mapping[str, StoredLinear], tallies: Mapping[str, Tally], known: Directory
) -> list[str]:
    """Others of the same shape and scheme, the likeliest first: by digest, siblings, neighbours."""
    same, at = known.alike[starred(name)], known.place[name]
    near = same[max(at - MOST, 0) : at + MOST + 1]
    ordered = dict.fromkeys(
        (
            *known.owners(name, tallies[name]),
            *known.siblings[name.rpartition(".")[0]],
            *sorted(near, key=lambda other: abs(known.place[other] - at)),
        )
    )
    fits = (n for n in ordered if n != name and _alike(linears[name], linears[n]))
    return [n for n, _ in zip(fits, range(MOST), strict=False)]


def _alike(a: StoredLinear, b: StoredLinear) -> bool:
    return a.shape == b.shape and a.scheme == b.scheme


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """One Linear explained by another."""

    code: str
    other: str
    snr_db: float


def explain(mine: Sample, other: Sample) -> Iterator[Explained]:
    """Whether this one holds the other's weight, scales, or codes."""
    name = other.linear.name
    accept = mine.floor - CHOSEN_DB
    whole = mine.snr(against=other.w_RK)
    if whole >= accept:
        yield Explained(code="misplaced", other=name, snr_db=whole)
        return
    scales = {k: t for k, t in other.held.items() if k not in CODES}
    with_theirs = mine.snr({**mine.held, **scales})
    if with_theirs >= accept:
        yield Explained(code="scale-of-another", other=name, snr_db=with_theirs)
    if _same_zero_points(mine.held, other.held):
        yield Explained(code="zero-points-of-another", other=name, snr_db=accept)
    as_theirs = mine.snr({**mine.held, **scales}, against=other.w_RK)
    if as_theirs >= accept:
        yield Explained(code="codes-of-another", other=name, snr_db=as_theirs)


def _same_zero_points(mine: Held, theirs: Held) -> bool:
    """Equal zero points are no coincidence, unless all are the same number."""
    zeros = mine.get("weight_zero_point")
    other = theirs.get("weight_zero_point")
    if zeros is None or other is None or zeros.shape != other.shape:
        return False
    return bool((zeros == other).all() and (zeros != zeros.flatten()[0]).any())


def gather(found: Mapping[str, Explained], linears: Mapping[str, StoredLinear]) -> list[Finding]:
    """Single explanations put together: exchanges, and orders of experts."""
    experts: dict[str, dict[int, int]] = {}
    made: list[Finding] = []
    for name, explained in found.items():
        pair = _expert_pair(name, explained)
        if pair is not None:
            prefix, index, source = pair
            experts.setdefault(prefix, {})[index] = source
        else:
            made.append(_one(linears[name], explained, found))
    for prefix, order in experts.items():
        first = next(n for n in found if n.startswith(f"{prefix}."))
        said = ", ".join(f"{i} holds {j}" for i, j in sorted(order.items())[:8])
        file, wanted = linears[first].module.file, "experts in the source's order"
        found_order = f"expert {said}"
        made.append(
            finding("experts-permuted", prefix, file=file, found=found_order, wanted=wanted)
        )
    return made


def _expert_pair(name: str, explained: Explained) -> tuple[str, int, int] | None:
    mine, theirs = EXPERT.match(name), EXPERT.match(explained.other)
    if explained.code != "misplaced" or not mine or not theirs:
        return None
    if (mine["experts"], mine["projection"]) != (theirs["experts"], theirs["projection"]):
        return None
    return mine["experts"], int(mine["index"]), int(theirs["index"])


def _one(linear: StoredLinear, explained: Explained, found: Mapping[str, Explained]) -> Finding:
    part_of = {
        "scale-of-another": "weight_scale",
        "zero-points-of-another": "weight_zero_point",
        "codes-of-another": linear.scheme.codes,
    }
    local = part_of.get(explained.code)
    back = found.get(explained.other)
    mutual = back is not None and back.other == linear.name and back.code == explained.code
    code = "exchanged" if mutual and explained.code == "misplaced" else explained.code
    what = {
        "scale-of-another": "the scales",
        "zero-points-of-another": "the zero points",
        "codes-of-another": "the codes",
    }
    part = what.get(explained.code, "the weight")
    repair = f"exchange {part} of {linear.name} and {explained.other}" if mutual else None
    return finding(
        code,
        f"{linear.name}.{local}" if local else linear.name,
        file=linear.module.file,
        found=f"{part} of {explained.other}",
        wanted="its own",
        repair=repair,
    )
