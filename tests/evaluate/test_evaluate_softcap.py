"""Soft caps of attention scores: transformers' SDPA leaves them out, engines do not."""

from __future__ import annotations

import pytest
import torch
import transformers
from evaluate_models import TEXT as SIZES
from evaluate_models import WORDS, rows_of
from tiny.models import causal
from tiny.words import word_tokenizer

from ckptq.checkpoint.open import open_checkpoint
from ckptq.evaluate.run import evaluate
from ckptq.evaluate.text import Line, Text
from ckptq.forward.layerwise import open_model
from ckptq.text.samples import Samples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = rows_of((19, 12))
TEXT = Text(tuple(Line(tuple(row)) for row in ROWS), "test")


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory):
    """Scores of several units, capped at one; the first of three layers has a window."""
    torch.manual_seed(3)
    cap = {"attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8, "sliding_window": 8}
    model = causal("Gemma2", SIZES, **cap)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    folder = tmp_path_factory.mktemp("softcap") / "gemma2"
    model.to(torch.bfloat16).save_pretrained(folder)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    word_tokenizer(WORDS, "<unk>", begin="<s>", **special).save_pretrained(folder)
    return folder


@torch.no_grad()
def plain(folder, attention: str, row):
    model = transformers.Gemma2ForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation=attention
    )
    return model(input_ids=torch.tensor([row]), use_cache=False).logits[0]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_forward_is_that_of_eager_attention(gemma2, batch_size):
    model = open_model(open_checkpoint(gemma2))
    samples = Samples(tuple(map(tuple, ROWS)), "test", 0, 0)
    stream = model.embed(samples.batches(batch_size))
    for index in range(len(model.layer_names)):
        model.run_layer(index, stream)
    found = [line for logits in model.head(stream) for line in logits]
    for row, logits in zip(ROWS, found, strict=True):
        wanted, uncapped = (plain(gemma2, name, row) for name in ("eager", "sdpa"))
        near = {"rtol": 0, "atol": 0} if batch_size == 1 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(logits[: len(row)], wanted, **near)
        assert (uncapped - wanted).abs().max() > 0.2


@pytest.mark.slow
def test_pages_cap_scores_too(gemma2, monkeypatch):
    names, source = ["fp8-per-head", "int8-per-token-head"], open_checkpoint(gemma2)
    wanted = evaluate(source, TEXT, caches=names)
    monkeypatch.setattr("ckptq.evaluate.watching.pages_serve", lambda _device: True)
    found = evaluate(source, TEXT, caches=names, device=DEVICE)
    for row, other in zip(found.rows, wanted.rows, strict=True):
        assert row.notes == ()
        assert row.outcome != other.outcome
        assert row.outcome.layers == pytest.approx(other.outcome.layers, rel=0.12)
