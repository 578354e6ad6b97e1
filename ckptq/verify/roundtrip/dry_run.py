"""A simulated loader: do the weights that arrive in an engine equal the source's?

Without a source, the stored weights are the reference, so that only loading is checked.
Shape letters: R rows, C columns, H query heads, K key/value heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, read_tensor
from ckptq.engines.vllm import LATENT_SCALES, common_set
from ckptq.models.weight_rows import weight_rows
from ckptq.permute.apply import permute_rows
from ckptq.permute.effect import Part
from ckptq.permute.targets import head_geometry
from ckptq.rope_order import Heads, RopeOrder
from ckptq.spec import FLOATS
from ckptq.verify.kinds import finding
from ckptq.verify.loaders import Engine
from ckptq.verify.report import Arrival, Finding
from ckptq.verify.roundtrip import nearest
from ckptq.verify.roundtrip.tally import Tally, snr_db
from ckptq.verify.roundtrip.undo import source_order
from ckptq.verify.roundtrip.verdict import arrival_floor_db
from ckptq.verify.stored_linear import StoredLinear
from ckptq.verify.structure.geometry import well_typed
from ckptq.verify.structure.rope_readers import order_of, turned_modules
from ckptq.verify.subject import Module, Subject

MISSING, REFUSED, AS_IT_IS = "missing", "refused", "loads as it is"
"""Start of `done` for a placeholder, a refusal, and unchanged tensors."""

WANTED = {
    "arrives-wrong": "the source's weight",
    "engine-default": "the stored scale",
    "engine-refuses": "tensors that it loads",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """What arrives, tensor by tensor, and the faults."""

    arrivals: tuple[Arrival, ...]
    findings: tuple[Finding, ...]


def dry_run(
    subject: Subject,
    linears: Mapping[str, StoredLinear],
    tallies: Mapping[str, Tally],
    engine: Engine,
    files: Files,
) -> DryRun:
    """Simulate the engine's loader for q/k projections, fused sets and cache scales."""
    asked = {n: Asked(one, arrival_floor_db(one, tallies.get(n))) for n, one in linears.items()}
    arrivals = [
        *_turned(subject, asked, engine, files),
        *_merged(asked, engine, files),
        *_cache(subject, engine, files),
    ]
    return DryRun(arrivals=tuple(arrivals), findings=tuple(_wrong(subject, engine, arrivals)))


@dataclass(frozen=True, slots=True)
class Asked:
    """A Linear, and the required SNR after loading."""

    linear: StoredLinear
    floor_db: float


def _wrong(subject: Subject, engine: Engine, arrivals: list[Arrival]) -> Iterator[Finding]:
    for one in arrivals:
        if one.ok:
            continue
        code = "engine-default" if one.done.startswith(MISSING) else "arrives-wrong"
        code = "engine-refuses" if one.done.startswith(REFUSED) else code
        snr = "" if one.snr_db is None else f", {one.snr_db:.1f} dB"
        found = f"{engine.name}: {one.done}{snr}"
        repair = _repair(subject, engine, one) if code == "arrives-wrong" else None
        yield finding(code, one.tensor, found=found, wanted=WANTED[code], repair=repair)


def _repair(subject: Subject, engine: Engine, one: Arrival) -> str | None:
    """A specific repair; None for the general one."""
    if subject.family.rope != "interleaved":
        return None
    if order_of(subject, Part.WEIGHTS) is RopeOrder.HALF_SPLIT:
        return f"{engine.name} needs the source's order: `ckptq permute CKPT OUT --to interleaved`"
    return None


def _turned(
    subject: Subject, linears: Mapping[str, Asked], engine: Engine, files: Files
) -> Iterator[Arrival]:
    """q and k of a family that is stored in interleaved order."""
    if subject.family.rope != "interleaved" or not well_typed(subject):
        return
    geometry = head_geometry(subject.ckpt.text_config)
    came_in = source_order(subject)
    for module in turned_modules(subject):
        heads = geometry[module.name.rpartition(".")[2][0]]
        turn = Turn(engine=engine, heads=heads, came_in=came_in)
        asked = linears.get(module.name)
        if asked is not None and heads.rows == asked.linear.shape[0]:
            yield _turned_codes(asked, turn, files)
        elif not module.quantized and module.origin is not None:
            yield _turned_plain(module, turn, files)


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What an engine does to the rows of one projection, and what it should have in the end."""

    engine: Engine
    heads: Heads
    came_in: RopeOrder
    """The order of the source."""

    def moved(self, rows: Tensor) -> Tensor:
        """What the engine makes of rows, believing that they are interleaved."""
        return permute_rows(rows, self.heads, RopeOrder.HALF_SPLIT)

    def wanted(self, source: Tensor) -> Tensor:
        """The source's rows in the order that the engine computes with."""
        order = RopeOrder.HALF_SPLIT if self.engine.permutes else RopeOrder.INTERLEAVED
        return source if order is self.came_in else permute_rows(source, self.heads, order)


def _turned_codes(asked: Asked, turn: Turn, files: Files) -> Arrival:
    linear = asked.linear
    held = linear.read(files, 0, linear.shape[0])
    arrived, moved = {}, []
    for local, tensor in held.items():
        arrived[local] = tensor
        if not turn.engine.moves(local, linear.tensors[local].spec):
            continue
        if tensor.shape[0] != turn.heads.rows:
            return _moved_blocks(linear, local, tensor, turn.heads)
        arrived[local] = turn.moved(tensor)
        moved.append(local)
    wanted = turn.wanted(_wanted(linear, files, held))
    snr = snr_db(nearest.weights(arrived, linear.scheme, linear.shape[1]), wanted)
    left = [local for local in held if local not in moved and linear.dims(local) > 1]
    done = f"permutes {', '.join(moved)}" if moved else AS_IT_IS
    if moved and left and any(held[local].numel() > 1 for local in left):
        done += f"; not {', '.join(left)}"
    return Arrival(tensor=linear.name, done=done, snr_db=snr, ok=snr >= asked.floor_db)


def _moved_blocks(linear: StoredLinear, local: str, tensor: Tensor, heads: Heads) -> Arrival:
    """A grid of blocks, treated as rows: refused, or silently wrong."""
    fits = tensor.shape[0] % (2 * heads.count) == 0
    done = f"treats the {tensor.shape[0]} rows of blocks in {local} as rows of the weight"
    if not fits:
        done = f"{REFUSED}: {done}, of {heads.count} heads"
    return Arrival(tensor=linear.name, done=done, snr_db=None, ok=False)


def _turned_plain(module: Module, turn: Turn, files: Files) -> Arrival:
    """An unquantized q or k."""
    assert module.origin is not None
    view, weight = module.origin.weight, module.tensors["weight"]
    moves = turn.engine.moves("weight", weight.spec)
    snr = -inf
    if weight.spec.shape == view.spec.shape and weight.spec.shape[0] == turn.heads.rows:
        found = read_tensor(weight, files).float()
        wanted = turn.wanted(weight_rows(files, view)(0, view.spec.shape[0]).float())
        snr = snr_db(turn.moved(found) if moves else found, wanted)
    done = "permutes weight" if moves else AS_IT_IS
    return Arrival(tensor=module.name, done=done, snr_db=snr, ok=snr == inf)


def _wanted(linear: StoredLinear, files: Files, held: Mapping[str, Tensor]) -> Tensor:
    """The source's weight, or without a source the stored one, in float32."""
    origin = linear.module.origin
    if origin is None:
        return nearest.weights(held, linear.scheme, linear.shape[1])
    return weight_rows(files, origin.weight)(0, linear.shape[0]).float()


def _merged(linears: Mapping[str, Asked], engine: Engine, files: Files) -> Iterator[Arrival]:
    """Sets whose members have one scale each are requantized with the largest."""
    if not engine.merges_tensor_scales:
        return
    for name, asked in linears.items():
        linear = asked.linear
        if linear.scheme.strategy != "tensor" or linear.scheme.type != "float":
            continue
        parent, _, projection = name.rpartition(".")
        names = common_set(projection)
        members = [linears[m].linear for n in names if (m := f"{parent}.{n}") in linears]
        scales = [read_tensor(m.tensors["weight_scale"], files).float().max() for m in members]
        if not scales or len({float(scale) for scale in scales}) == 1:
            continue
        yield _requantized(asked, torch.stack(scales).max(), files)


def _requantized(asked: Asked, scale: Tensor, files: Files) -> Arrival:
    linear = asked.linear
    held = linear.read(files, 0, linear.shape[0])
    once = nearest.weights(held, linear.scheme, linear.shape[1])
    theirs = {**held, "weight_scale": scale.reshape(1)}
    twice = nearest.recode(once, theirs, linear.scheme, torch.float32) * scale
    snr = snr_db(twice, _wanted(linear, files, held))
    done = f"requantizes to {float(scale):.3g}, the largest scale of its fused set"
    return Arrival(tensor=linear.name, done=done, snr_db=snr, ok=snr >= asked.floor_db)


def _cache(subject: Subject, engine: Engine, files: Files) -> Iterator[Arrival]:
    """k, v and q scales as the attention backend gets them."""
    strategy = subject.declared.kv_strategy
    if strategy is None:
        return
    for module, kind in subject.attention.items():
        for which in "kvq" if kind == "heads" else "kv":
            yield _scale(subject, engine, files, module, which)
    if strategy == "attn_head" and engine.name.startswith("vllm"):
        done = "per-head scales need FlashAttention 3 (Hopper): --attention-backend FLASH_ATTN"
        yield Arrival(tensor="kv_cache_scheme", done=done, snr_db=None, ok=True)


def _scale(subject: Subject, engine: Engine, files: Files, module: str, which: str) -> Arrival:
    name = f"{module}.{which}_scale"
    tensor = subject.cache_scales.get((module, which))
    if tensor is None:
        return Arrival(tensor=name, done=f"{MISSING}: 1.0 is used", snr_db=None, ok=False)
    if subject.attention[module] == "latent" and engine.name.startswith("vllm"):
        return Arrival(tensor=name, done=LATENT_SCALES, snr_db=None, ok=True)
    if which == "q" and engine.needs_attention_group and not subject.declared.has_attention_group:
        done = "ignored: no config group quantizes attention"
        return Arrival(tensor=name, done=done, snr_db=None, ok=True)
    per_head = subject.declared.kv_strategy == "attn_head"
    if which == "q" and engine.reduces_queries and per_head:
        return _reduced(subject, files, tensor)
    return Arrival(tensor=name, done="used as it is", snr_db=None, ok=True)


def _reduced(subject: Subject, files: Files, tensor: StoredTensor) -> Arrival:
    """One q scale a key/value head: the largest of its group."""
    heads = subject.heads_in(tensor.name.rpartition(".")[0])
    if heads is None or tensor.spec.numel != heads[0] or heads[0] % heads[1]:
        done = f"{REFUSED}: {tensor.spec} is not one scale for each query head"
        return Arrival(tensor=tensor.name, done=done, snr_db=None, ok=False)
    if tensor.spec.dtype not in FLOATS:
        done = f"{REFUSED}: {tensor.spec} is not a float"
        return Arrival(tensor=tensor.name, done=done, snr_db=None, ok=False)
    scale_HK = read_tensor(tensor, files).reshape(heads[1], -1).float()
    spread = float((scale_HK.amax(1) / scale_HK.amin(1)).max())
    done = f"uses the largest of each group of {scale_HK.shape[1]} heads, up to {spread:.3g}x"
    return Arrival(tensor=tensor.name, done=done, snr_db=None, ok=True)
