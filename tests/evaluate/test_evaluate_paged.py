"""Attention over pages beside the same of q, k and v that were rounded as the cache would.

Kernels run interpreted where there is no GPU. With static FP8 they round the softmax's weights too.
"""

from __future__ import annotations

import pytest
import torch
from evaluate_models import HEAD_DIM, HEADS, KV_HEADS, rows_of

from ckptq.evaluate.caches.held import Held
from ckptq.evaluate.caches.kv_cache import MODES, STATIC, Maxima, parse_cache
from ckptq.evaluate.caches.simulated import Scales, simulated
from ckptq.evaluate.run import evaluate
from ckptq.evaluate.text import Line, Text
from ckptq.forward.kernel_attention import Words
from ckptq.kernels.attention.mask import Mask, seen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = [name for name in MODES if name != "bf16"]
NAMES += ["int4-per-token-head-unrotated", "int2-per-token-head-unrotated"]
NAMES += ["fp8-per-token-head-rotated"]
TEXT = Text(tuple(Line(tuple(row)) for row in rows_of((21, 18))), "test")


@pytest.fixture
def kernels(monkeypatch):
    """Attention goes over pages, as on a GPU."""
    monkeypatch.setattr("ckptq.evaluate.watching.pages_serve", lambda _device: True)


def qkv(S: int = 21):
    generator = torch.Generator().manual_seed(9)
    shapes = ((2, HEADS, S, HEAD_DIM), *((2, KV_HEADS, S, HEAD_DIM),) * 2)
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    made[1][:, 1] *= 3
    made[2][:, 1] *= 50
    return [x.bfloat16().to(DEVICE) for x in made]


def dense(q, k, v, words: Words):
    """[B, S, H, D] in float64."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    score = q.double() @ k.mT * words.scaling
    if words.softcap is not None:
        score = torch.tanh(score / words.softcap) * words.softcap
    unseen = ~seen(words.mask, q.shape[2], k.shape[2], device=q.device)
    return (score.masked_fill(unseen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def both(name: str, words: Words) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over pages, and of what the cache would give back."""
    cache = parse_cache(name, None)
    rounded = qkv()
    maxima = Maxima()
    maxima.see("attn", dict(zip("qkv", rounded, strict=True)), (21, 21))
    simulated(cache, Scales(cache, maxima, str))("attn", *rounded)
    held = Held(cache, maxima, str, in_pages=True, note=pytest.fail)
    replace = held.tap((21, 21)).replace
    assert replace is not None
    return replace("attn", tuple(qkv()), lambda: words), dense(*rounded, words)


def distance(found, wanted) -> float:
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm()).item()


PLAIN = Words(Mask(), HEAD_DIM**-0.5)
OTHERS = [
    Words(Mask(sliding_window=5), 0.3),
    Words(Mask(chunk=8), HEAD_DIM**-0.5),
    Words(Mask(), 0.5, softcap=2.0),
]


@pytest.mark.parametrize("name", NAMES)
def test_pages_give_what_the_simulation_gives(kernels, name):
    found, wanted = both(name, PLAIN)
    assert distance(found, wanted) < (0.02 if name in STATIC else 0.006)
    assert distance(found.flip(2), wanted) > 0.5  # heads exchanged


@pytest.mark.parametrize("words", OTHERS, ids=str)
@pytest.mark.parametrize("name", ["fp8-per-head", "int4-per-token-head"])
def test_windows_chunks_and_soft_caps(kernels, name, words):
    found, wanted = both(name, words)
    assert distance(found, wanted) < 0.02
    assert distance(both(name, PLAIN)[0], wanted) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama4"])
def test_rows_over_pages_are_those_of_the_simulation(saved, request, family):
    """Layer by layer, chunks and all; nothing had to be simulated, and the control is another."""
    source, names = saved(family), ["fp8-per-head", "int8-per-token-head", "int4-per-token-head"]
    wanted = evaluate(source, TEXT, caches=names)
    request.getfixturevalue("kernels")
    found = evaluate(source, TEXT, caches=names, device=DEVICE)
    for row, other, bound in zip(found.rows, wanted.rows, (0.12, 0.05, 0.05), strict=True):
        assert row.outcome.layers == pytest.approx(other.outcome.layers, rel=bound), row.kv_cache
        assert row.outcome != other.outcome
        assert row.notes == ()
        assert found.control.outcome.layers != pytest.approx(other.outcome.layers, rel=4 * bound)
    assert found.zero.measures.kl == 0.0


def test_what_kernels_do_not_know_is_simulated_and_told(saved, kernels, monkeypatch):
    """To the bit as without pages; the row says so."""
    monkeypatch.setattr("ckptq.forward.kernel_attention.in_words", lambda *_: None)
    names = ["fp8-per-head", "int4-per-token-head"]
    found = evaluate(saved("llama"), TEXT, caches=names, device=DEVICE)
    monkeypatch.setattr("ckptq.evaluate.watching.pages_serve", lambda _device: False)
    wanted = evaluate(saved("llama"), TEXT, caches=names, device=DEVICE)
    for row, other in zip(found.rows, wanted.rows, strict=True):
        assert row.measures == other.measures
        assert row.notes == (
            "cache simulated, not held in pages: sinks, or a mask, that kernels do not know",
        )
        assert other.notes == ()
