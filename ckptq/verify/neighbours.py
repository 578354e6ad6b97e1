"""Weights that stand in each other's place: other Linears as the explanation of one.

The scales that a Linear should have and those that it holds were digested while it was compared,
so whose scales they are is a look-up; samples of the data then decide what else was moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ckptq.verify.compare import Tally
from ckptq.verify.judge import CHOSEN_DB
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.sample import Sample
from ckptq.verify.stored_linear import StoredLinear
from ckptq.verify.subject import CODES, EXPERT

MOST = 8
"""How many others are tried on one weight."""


@dataclass(frozen=True, slots=True)
class Directory:
    """Who has which scales, by digest."""

    observed: Mapping[tuple[str, ...], tuple[str, ...]]
    """Digest of the scales that the source gives -> the Linears that should hold them."""

    def owners(self, tally: Tally) -> tuple[str, ...]:
        """The Linears whose scales this one holds."""
        return self.observed.get(tally.held, ())


def directory(tallies: Mapping[str, Tally]) -> Directory:
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for name, tally in tallies.items():
        if tally.observed:
            found[tally.observed] = (*found.get(tally.observed, ()), name)
    return Directory(found)


def candidates(
    name: str, linears: Mapping[str, StoredLinear], tallies: Mapping[str, Tally], known: Directory
) -> list[str]:
    """Others of the same shape and scheme, the likeliest first: by digest, siblings, neighbours."""
    mine = linears[name]
    by_digest = known.owners(tallies[name])
    parent = name.rpartition(".")[0]
    siblings = [n for n in linears if n.rpartition(".")[0] == parent]
    alike = [n for n in linears if _template(n) == _template(name)]
    at = alike.index(name)
    near = sorted(alike, key=lambda n: abs(alike.index(n) - at)) if len(alike) < 4096 else []
    ordered = dict.fromkeys((*by_digest, *siblings, *near))
    fits = (n for n in ordered if n != name and n in tallies and _alike(mine, linears[n]))
    return [n for n, _ in zip(fits, range(MOST), strict=False)]


def _template(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


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
    as_theirs = mine.snr({**mine.held, **scales}, against=other.w_RK)
    if as_theirs >= accept:
        yield Explained(code="codes-of-another", other=name, snr_db=as_theirs)


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
        made.append(
            finding(
                "experts-permuted", prefix, file=linears[first].module.file, found=f"expert {said}",
                wanted="experts in the source's order",
            )
        )  # fmt: skip
    return made


def _expert_pair(name: str, explained: Explained) -> tuple[str, int, int] | None:
    mine, theirs = EXPERT.match(name), EXPERT.match(explained.other)
    if explained.code != "misplaced" or not mine or not theirs:
        return None
    if (mine["experts"], mine["projection"]) != (theirs["experts"], theirs["projection"]):
        return None
    return mine["experts"], int(mine["index"]), int(theirs["index"])


def _one(linear: StoredLinear, explained: Explained, found: Mapping[str, Explained]) -> Finding:
    part_of = {"scale-of-another": "weight_scale", "codes-of-another": linear.scheme.codes}
    local = part_of.get(explained.code)
    back = found.get(explained.other)
    mutual = back is not None and back.other == linear.name and back.code == explained.code
    code = "exchanged" if mutual and explained.code == "misplaced" else explained.code
    what = {"scale-of-another": "the scales", "codes-of-another": "the codes"}
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
