"""Block scales where vLLM merges weights: its blocks must not straddle two of them.

vLLM 0.32, `validate_fp8_block_shape`: each member of a merged layer but the last must have a whole
number of blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.subject import Subject


def check_blocks(subject: Subject) -> Iterator[Finding]:
    """Members of fused sets in block formats whose rows do not fill whole blocks."""
    for name, module in subject.modules.items():
        scheme = module.group.scheme if module.group else None
        if not module.quantized or scheme is None or not scheme.block_structure:
            continue
        height = scheme.block_structure[0]
        there = subject.witnesses.fused_set(name, subject.modules)
        if module.shape and name in there[:-1] and module.shape[0] % height:
            yield finding(
                "block-rows", name, file=module.file, found=f"{module.shape[0]} rows",
                wanted=f"a multiple of {height}",
            )  # fmt: skip
