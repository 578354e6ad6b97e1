"""The command that `verify` proposes after its findings."""

from __future__ import annotations

from ckptq.mend.mendable import ALONE, FROM_SOURCE, TEXT, WITH_SOURCE
from ckptq.printable import shell_word
from ckptq.verify.report import Report


def proposal(report: Report) -> str | None:
    """`ckptq mend PATH OUT`, with the source where a repair needs it; None where nothing found can
    be repaired by it."""
    codes = {one.code for one in report.findings} - set(TEXT)
    mendable = codes & {*ALONE, *FROM_SOURCE, *WITH_SOURCE}
    if not mendable:
        return None
    words = f"ckptq mend {shell_word(report.path)} OUT"
    if report.source is not None:
        return f"{words} --source {shell_word(report.source)}"
    needs = mendable & {*FROM_SOURCE, *WITH_SOURCE}
    return f"{words} --source SOURCE" if needs else words
