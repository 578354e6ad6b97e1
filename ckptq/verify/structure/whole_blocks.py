"""Incomplete blocks and groups where engines need complete ones.

vLLM 0.32: each member of a merged layer but the last must have a whole number of blocks of rows
(`validate_fp8_block_shape`), and so must both of an expert's (`validate_fp8_block_shape_moe`).
Groups of activations must divide the columns: `per_token_group_quant_fp8` asserts it on GPUs, and
compressed-tensors in transformers; block weights may end in a partial block.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckptq.engines.vllm import fills_whole_blocks
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.subject import EXPERT, Module, Subject


def check_blocks(subject: Subject) -> Iterator[Finding]:
    """Members of fused sets whose rows, and Linears whose columns, fill no whole blocks."""
    for name, module in subject.modules.items():
        scheme = module.scheme
        if not module.quantized or scheme is None or not scheme.block_structure:
            continue
        yield from _columns(module)
        height = scheme.block_structure[0]
        there = subject.witnesses.fused_set(name, subject.modules)
        whole = fills_whole_blocks(name, there, of_expert=EXPERT.match(name) is not None)
        if module.shape and whole and module.shape[0] % height:
            found = f"{module.shape[0]} rows"
            wanted = f"a multiple of {height}"
            yield finding("block-rows", name, file=module.file, found=found, wanted=wanted)


def _columns(module: Module) -> Iterator[Finding]:
    inputs = module.group.inputs if module.group else None
    size = inputs.columns if inputs is not None else None
    if size and module.shape and module.shape[1] % size:
        wanted = f"a multiple of {size}, the activation group size"
        yield finding("block-columns", module, found=f"{module.shape[1]} columns", wanted=wanted)
