"""The mark that records a checkpoint's RoPE order, so that it is not permuted twice.

It is kept in the safetensors metadata of every shard, as `ckptq.rope_order`, and in config.json, as
`{"ckptq": {"rope_order": ...}}`. transformers keeps unknown keys when it saves; vLLM and
transformers act on neither. The value is one order ("half-split"), or, where only some parts were
permuted, those: "scales=half-split zero-points=half-split". A part without a mark is in whatever
order its maker left it. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ckptq.errors import SourceError, UsageError
from ckptq.permute.effect import Part
from ckptq.rope_order import RopeOrder

METADATA_KEY = "ckptq.rope_order"

Marks = dict[Part, RopeOrder]
"""The order of each part that ckptq has permuted; empty for a checkpoint that it has not."""


def dump(marks: Marks) -> str:
    """The mark as it is written, for example "half-split" or "scales=half-split"."""
    orders = set(marks.values())
    if len(marks) == len(Part) and len(orders) == 1:
        return str(orders.pop())
    return " ".join(f"{part}={marks[part]}" for part in Part if part in marks)


def parse(text: str, where: str) -> Marks:
    """The opposite of `dump`. Raises SourceError, naming `where`, for anything else."""
    if text in tuple(RopeOrder):
        return dict.fromkeys(Part, RopeOrder(text))
    marks: Marks = {}
    for word in text.split():
        part, _, order = word.partition("=")
        if part not in tuple(Part) or order not in tuple(RopeOrder) or Part(part) in marks:
            raise SourceError(
                f"{where}: {METADATA_KEY} is {text!r}; expected one of {', '.join(RopeOrder)}, or "
                f"part=order with parts out of {', '.join(Part)}"
            )
        marks[Part(part)] = RopeOrder(order)
    return marks


def read(config: Mapping[str, Any], metadata: Mapping[str, Mapping[str, str]]) -> Marks:
    """The marks of a checkpoint, from its config.json and the metadata of each shard by file name.

    Raises SourceError if the files disagree: then they were not all permuted together, and the
    order of their rows is unknown."""
    said = {name: shard.get(METADATA_KEY, "") for name, shard in metadata.items()}
    said["config.json"] = _config_mark(config)
    parsed = {name: parse(text, name) for name, text in said.items()}
    marks = parsed["config.json"]
    for name, found in parsed.items():
        if found != marks:
            raise SourceError(
                f"contradictory RoPE order: {name} is marked {said[name] or 'nothing'!r}, "
                f"config.json {said['config.json'] or 'nothing'!r}; these files do not belong "
                "together, or a tool that drops metadata rewrote some of them"
            )
    return marks


def _config_mark(config: Mapping[str, Any]) -> str:
    section = config.get("ckptq", {})
    mark = section.get("rope_order", "") if isinstance(section, Mapping) else None
    if not isinstance(mark, str):
        raise SourceError(f'config.json: "ckptq" is {section!r}, expected {{"rope_order": "..."}}')
    return mark


def applied(
    marks: Marks, to: RopeOrder, only: Collection[Part], family: RopeOrder | None = None
) -> Marks:
    """The marks after permuting the parts `only` into order `to`.

    `family` is the order in which this family of models is published; it counts when a checkpoint
    without marks is permuted as a whole. A part permuted on its own is assumed to be in the other
    order, because another tool may have permuted it. Raises UsageError if a part is in order `to`.
    """
    whole = set(only) == set(Part)
    if whole and not marks and to is family:
        raise UsageError(
            f"this checkpoint is already in {to} order: its family is published that way, and it "
            "carries no other mark"
        )
    there = [part for part in Part if part in only and marks.get(part) is to]
    if there:
        raise UsageError(
            f"{', '.join(there)}: already in {to} order according to the checkpoint's "
            f"mark {dump(marks)!r}; permuting twice would corrupt them"
        )
    return {**marks, **dict.fromkeys(only, to)}


def marked_config(config: Mapping[str, Any], marks: Marks) -> dict[str, Any]:
    """A copy of config.json with the marks in it."""
    return {**config, "ckptq": {**config.get("ckptq", {}), "rope_order": dump(marks)}}


def marked_metadata(metadata: Mapping[str, str], marks: Marks) -> dict[str, str]:
    """A copy of a shard's metadata with the marks in it."""
    return {**metadata, METADATA_KEY: dump(marks)}
