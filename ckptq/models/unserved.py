"""Models that vLLM does not load, quantized or not: a warning before the work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckptq.engines.table import EngineTable, load_table
from ckptq.models.witnesses import Witnesses

BACKEND = "Transformers"
"""Prefix of the vLLM classes that run any transformers model."""


def model_doubts(witnesses: Witnesses, linears: Iterable[str]) -> Iterator[str]:
    """Why vLLM would not load this model, whatever its scheme; nothing if it was seen to load, or
    may through transformers.

    `linears` are the names on disk of what may be quantized.
    """
    table = load_table()
    names = witnesses.architectures
    engine = f"vLLM {table.version}"
    reason = table.failure(names)
    if reason is not None:
        yield f"{engine} does not load {names[0]}, quantized or not: {reason}"
        return
    if not names or not table.has_class(names):
        reason = _why_not_by_transformers(witnesses)
        if reason is not None:
            yield f"{engine} has no class for {_named(witnesses)}, and {reason}"
            return
    elif _runs_by_transformers(table, names) and (reason := _layer_without_attention(witnesses)):
        yield f"{engine} runs {names[0]} through transformers, where {reason}"
        return
    yield from _unknown_names(witnesses, linears, engine)


def unseen_by_engine(witnesses: Witnesses) -> Iterator[str]:
    """What to do about a model for which vLLM has a class that the table has not seen: it may merge
    or rename Linears in its own way, and be served with scales that no tensor filled (HY-V4)."""
    table = load_table()
    own = table.engine_class(witnesses.architectures)
    if witnesses.engine is None and own is not None and not own.startswith(BACKEND):
        yield (
            f"vLLM {table.version} has a class of its own for {_named(witnesses)}, and ckptq has "
            "not seen what it does with quantized Linears: before serving, let it check them: "
            "`ckptq verify OUT --engine vllm --vllm-python PYTHON`"
        )


def _named(witnesses: Witnesses) -> str:
    return witnesses.architectures[0] if witnesses.architectures else "a model without architecture"


def _runs_by_transformers(table: EngineTable, names: tuple[str, ...]) -> bool:
    return (table.engine_class(names) or "").startswith(BACKEND)


def _why_not_by_transformers(witnesses: Witnesses) -> str | None:
    """vllm/model_executor/models/registry.py, `_try_resolve_transformers`: what it lacks it takes
    from transformers, where attention is exchangeable."""
    tree = witnesses.tree
    if tree is None:
        return f"neither has transformers ({witnesses.no_tree})"
    if not tree.attention_interface:
        return "its transformers class has an attention that vLLM cannot replace"
    return _layer_without_attention(witnesses)


def _layer_without_attention(witnesses: Witnesses) -> str | None:
    """models/transformers/base.py, `_create_attention_instances`: every layer has to have one."""
    tree = witnesses.tree
    bare = [i for i in range(tree.num_layers) if i not in tree.attending] if tree else []
    return f"layer {bare[0]} has no attention that it could replace" if bare else None


def _unknown_names(witnesses: Witnesses, linears: Iterable[str], engine: str) -> Iterator[str]:
    known = witnesses.engine
    if known is None or known.engine_class.startswith(BACKEND):
        return
    linears = [name for name in linears if known.experts(name) is None]  # they have names enough
    odd = [name for name in linears if known.row(name) is not None and not known.takes_name(name)]
    if odd:
        yield (
            f"{engine} does not load {known.name} under these names (such as {odd[0]}); rename the "
            "source's tensors to the family's usual names"
        )
