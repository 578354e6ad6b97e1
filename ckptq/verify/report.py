"""What `verify` returns: findings, a row per tensor, figures. Plain data, no printing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["fault", "note"]
"""A fault makes the checkpoint wrong in some engine; a note is only information."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One problem: what and where it is, and how to repair it."""

    code: str
    """A key of `ckptq.verify.kinds.KINDS`: what scripts and tests compare."""
    severity: Severity
    tensor: str | None
    """Tensor or module; None where the finding is about the whole checkpoint."""
    file: str | None
    found: str
    wanted: str
    repair: str

    def __str__(self) -> str:
        where = f"{self.tensor}: " if self.tensor else f"{self.file}: " if self.file else ""
        return f"{where}{self.code}: found {self.found}; expected {self.wanted}; {self.repair}"


def once(found: Iterable[Finding]) -> list[Finding]:
    """Keep one finding per kind and tensor."""
    seen: dict[tuple[str, str | None], Finding] = {}
    for one in found:
        seen.setdefault((one.code, one.tensor), one)
    return list(seen.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorResult:
    """One Linear after its round trip. `snr_db` and `floor_db` are decibels, inf for exact."""

    name: str
    scheme: str
    elements: int
    """How many weights were compared; fewer than the weight has with `fast`."""
    snr_db: float
    floor_db: float
    codes_wrong: int
    """Codes that are not the nearest to weight / scale."""
    codes_rounded_twice: int
    """Of those, codes that a division in the weight's dtype explains."""
    scales_wrong: int
    """Scales that the plain minimum and maximum do not give."""
    exact: int = 0
    """Elements that are the numbers of a quantized source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadResult:
    """One head of q, k or v in one layer, as text excited it."""

    module: str
    which: str
    """"q", "k" or "v"."""
    head: int
    scale: float
    amax: float
    """Largest absolute value seen."""
    saturated: float
    """Share of values beyond 448 * scale."""
    underflowed: float
    """Share of nonzero values that became zero."""
    error: float
    """Relative error of the values in FP8 with this scale."""
    error_unscaled: float
    """The same with scale 1.0."""
    error_shared: float
    """The same with one scale for all heads of the layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerResult:
    """One attention layer: relative error of its output in FP8 against the source's dtype."""

    module: str
    error: float
    error_unscaled: float
    error_shared: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """What one weight or scale has become once an engine has loaded it."""

    tensor: str
    done: str
    """What the loader did to it."""
    snr_db: float | None
    """Against the source in the engine's order of rows; None where there is nothing to compare."""
    ok: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleRow:
    """The k, v or q scales of one layer, for tables and plots."""

    tensor: str
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """Results of reading tensors; empty if none were read."""

    findings: tuple[Finding, ...] = ()
    tensors: tuple[TensorResult, ...] = ()
    scales: tuple[ScaleRow, ...] = ()
    copied: int = 0
    arrivals: tuple[Arrival, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ByText:
    """What text that ran through the source has shown; empty if none did."""

    findings: tuple[Finding, ...] = ()
    heads: tuple[HeadResult, ...] = ()
    layers: tuple[LayerResult, ...] = ()
    judged: int = 0
    """Linears whose codes were."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRun:
    """How an engine was asked. Its answer is among the findings."""

    name: str
    version: str | None
    """None for a simulation."""
    real: bool
    """Whether the engine itself built its model; else its loader was simulated."""
    places: int
    """Parameters of its model that were looked at."""
    seconds: float
    remarks: tuple[str, ...]
    """What its answer does not cover."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One engine's answer."""

    run: EngineRun
    findings: tuple[Finding, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything `verify` has found."""

    path: str
    source: str | None
    fast: bool
    seconds: float
    tensors_on_disk: int
    nbytes: int
    findings: tuple[Finding, ...]
    """Faults only."""
    notes: tuple[Finding, ...]
    tensors: tuple[TensorResult, ...] = ()
    copied: int = 0
    """Tensors that equal the source byte for byte."""
    scales: tuple[ScaleRow, ...] = ()
    engine: str | None = None
    engine_run: EngineRun | None = None
    arrivals: tuple[Arrival, ...] = ()
    heads: tuple[HeadResult, ...] = ()
    layers: tuple[LayerResult, ...] = ()
    headers_only: bool = False
    checks: Mapping[str, int] = field(default_factory=dict)
    """What was checked, and how often: a check that saw nothing proves nothing."""

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def counts(self) -> dict[str, int]:
        """How often each kind of fault was found."""
        return dict(Counter(f.code for f in self.findings).most_common())

    def to_dict(self) -> dict[str, Any]:
        """JSON data: numbers that JSON has no word for (inf, nan) become None."""
        plain = _plain({**asdict(self), "ok": self.ok, "counts": self.counts})
        assert isinstance(plain, dict)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
