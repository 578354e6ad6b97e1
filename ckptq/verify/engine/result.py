"""What asking an engine gives: how it was asked, and what it found."""

from __future__ import annotations

from dataclasses import dataclass

from ckptq.verify.report import EngineRun, Finding


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One engine's answer."""

    run: EngineRun
    findings: tuple[Finding, ...]
