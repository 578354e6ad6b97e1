import pytest
import torch
from evaluate_models import LAYERS, kl_by_torch, plain_logits, plain_model, rows_of

from ckptq.errors import SourceError, UsageError
from ckptq.evaluate import compare, pieces
from ckptq.evaluate.run import evaluate
from ckptq.evaluate.text import Line, Text
from ckptq.evaluate.weights.spoil import spoiled
from ckptq.forward.decoded import DecodedWeights
from ckptq.recipes.load import load_scheme

ROWS = rows_of((24, 17, 31))
TEXT = Text(tuple(Line(tuple(row)) for row in ROWS), "test")


def with_weights(source, ckpt):
    """The source's model with the quantized checkpoint's weights put into it, parameter by
    parameter, through transformers' own loading."""
    model = plain_model(source.path)
    weights = DecodedWeights(ckpt, source)
    decoded = weights.load(weights.names())
    state = model.state_dict()
    for name, tensor in decoded.items():
        if name in state:
            state[name].copy_(tensor)
    # Mixtral's experts are the only ones with other names in memory than on disk
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        for expert in range(2) if f"{prefix}.0.w1.weight" in decoded else ():
            w1, w2, w3 = (decoded[f"{prefix}.{expert}.w{i}.weight"] for i in (1, 2, 3))
            module = f"model.layers.{layer}.mlp.experts"
            state[f"{module}.gate_up_proj"][expert].copy_(torch.cat([w1, w3]))
            state[f"{module}.down_proj"][expert].copy_(w2)
    return model


@pytest.mark.parametrize("family", ["llama", "llama4", "mixtral"])
def test_layer_by_layer_is_the_plain_forward(saved, family):
    """w4a16 rounds no activation, so the output is the plain model with other weights."""
    source, ckpt = saved(family), saved(family, "w4a16")
    found = evaluate(ckpt, TEXT, source=source)
    reference, output = plain_model(source.path), with_weights(source, ckpt)
    kl, loss, agree = [], [], []
    for row in ROWS:
        p_SV, q_SV = plain_logits(reference, row)[:-1], plain_logits(output, row)[:-1]
        kl.append(kl_by_torch(p_SV, q_SV))
        agree.append(p_SV.argmax(-1) == q_SV.argmax(-1))
        target = torch.tensor(row[1:])
        loss.append(torch.nn.functional.cross_entropy(q_SV.double(), target, reduction="none"))
    measures = found.rows[0].measures
    assert measures.tokens == sum(len(row) - 1 for row in ROWS) == TEXT.tokens
    assert measures.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-12)
    assert measures.kl_max == pytest.approx(torch.cat(kl).max().item(), rel=1e-12)
    assert measures.perplexity == pytest.approx(torch.cat(loss).mean().exp().item(), rel=1e-12)
    assert measures.agreement == torch.cat(agree).double().mean().item()
    assert 0.001 < measures.kl < 3


@pytest.mark.parametrize("family", ["llama", "llama4"])
def test_the_zero_is_exactly_zero_and_the_control_is_noticed(saved, family):
    found = evaluate(saved(family, "fp8-dynamic"), TEXT, source=saved(family))
    zero, row, control = found.zero, found.rows[0], found.control
    assert (zero.measures.kl, zero.measures.kl_reverse, zero.measures.kl_max) == (0.0, 0.0, 0.0)
    assert zero.outcome.layers == (0.0,) * LAYERS
    assert control.measures.kl > 5 * row.measures.kl > 0
    assert control.outcome.layers[0] == row.outcome.layers[0]
    assert control.outcome.layers[1] > 5 * row.outcome.layers[1]
    assert found.ok
    assert not found.warnings


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_and_padding_change_only_the_rounding(saved, batch_size):
    source, ckpt = saved("llama"), saved("llama", "w4a16")
    one = evaluate(ckpt, TEXT, source=source)
    many = evaluate(ckpt, TEXT, source=source, batch_size=batch_size)
    assert many.rows[0].measures.tokens == one.rows[0].measures.tokens
    assert many.rows[0].measures.kl == pytest.approx(one.rows[0].measures.kl, rel=0.05)
    assert many.zero.measures.kl == 0.0


def test_without_a_size_neighbours_of_one_length_go_together(monkeypatch):
    lines = tuple(Line(tuple(row)) for row in rows_of((5, 5, 3, 5, 5, 5)))
    text = Text(lines, "test")

    def grouped(size):
        return [batch.lengths for batch, _ in text.batches(size)]

    assert grouped(None) == [(5, 5), (3,), (5, 5, 5)]
    monkeypatch.setattr("ckptq.evaluate.text.TOKENS_AT_ONCE", 14)
    assert grouped(None) == [(5, 5), (3,), (5, 5), (5,)]
    monkeypatch.setattr("ckptq.evaluate.text.LINES_AT_ONCE", 1)
    assert grouped(None) == [(5,), (5,), (3,), (5,), (5,), (5,)]
    assert grouped(4) == [(5, 5, 3, 5), (5, 5)]
    assert [line for _, chunk in text.batches(None) for line in chunk] == list(lines)


def test_on_a_cpu_one_line_runs_at_a_time(saved):
    source, ckpt = saved("llama"), saved("llama", "w4a16")
    text = Text(tuple(Line(tuple(row)) for row in rows_of((9, 9, 9))), "test")
    one, default = (evaluate(ckpt, text, source=source, batch_size=b) for b in (1, None))
    three = evaluate(ckpt, text, source=source, batch_size=3)
    assert default.rows[0].outcome == one.rows[0].outcome != three.rows[0].outcome


def test_the_head_in_chunks_is_the_head(saved, monkeypatch):
    source, ckpt = saved("llama"), saved("llama", "w4a16")
    whole = evaluate(ckpt, TEXT, source=source, batch_size=2)
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", 5 * 64 * 2)
    calls = []
    cut = compare.cut
    monkeypatch.setattr(compare, "cut", lambda t, p, rows: calls.append(len(p)) or cut(t, p, rows))
    chunked = evaluate(ckpt, TEXT, source=source, batch_size=2)
    assert calls[0] == 5 + 3  # 23 positions of two rows by 5, 30 of one row by 10
    assert chunked.rows[0].measures.kl == pytest.approx(whole.rows[0].measures.kl, rel=1e-2)
    assert chunked.rows[0].measures.tokens == whole.rows[0].measures.tokens


def test_errors_of_layers_are_those_of_the_plain_forward(saved):
    source, ckpt = saved("llama"), saved("llama", "w4a16")
    found = evaluate(ckpt, TEXT, source=source).rows[0].outcome.layers
    states = []
    for model in (plain_model(source.path), with_weights(source, ckpt)):
        seen = []
        # a decoder layer's output, as hooks see it: the last of `hidden_states` is normed already
        for layer in model.model.layers:
            layer.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        for row in ROWS:
            plain_logits(model, row)
        states.append(seen)
    for index in range(LAYERS):
        want = torch.cat([x[0].double() for x in states[0][index::LAYERS]])
        got = torch.cat([x[0].double() for x in states[1][index::LAYERS]])
        error = ((got - want).norm(dim=-1) / want.norm(dim=-1)).mean().item()
        assert found[index] == pytest.approx(error, rel=1e-9)


def test_a_spoiled_layer_is_mended_afterwards():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6))
    before = {name: p.clone() for name, p in layer.named_parameters()}
    x = torch.randn(3, 4)
    with spoiled(layer):
        assert torch.equal(layer[0].weight, before["0.weight"].roll(1, 0))
        assert torch.equal(layer[1].weight, before["1.weight"])
        spoilt = layer(x)
    assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())
    assert not torch.allclose(layer(x), spoilt)


def test_schemes_on_a_source_equal_the_checkpoints_they_would_write(saved):
    source = saved("llama")
    tried = evaluate(source, TEXT, schemes=[load_scheme(s) for s in ("w4a16", "fp8-dynamic")])
    for row in tried.rows:
        written = evaluate(saved("llama", row.weights), TEXT, source=source).rows[0]
        assert row.outcome == written.outcome
        assert row.nbytes == written.nbytes
    assert tried.rows[0].nbytes < tried.rows[1].nbytes
    assert tried.rows[0].snr_db < tried.rows[1].snr_db
    assert tried.rows[0].measures.kl > tried.rows[1].measures.kl


def test_answers_are_right_when_greedy_decoding_gives_them(saved):
    source = saved("llama")
    model = plain_model(source.path)
    answers = []
    for row in rows_of((6, 9), seed=3):
        ids = list(row)
        for _ in range(4):
            ids.append(int(plain_logits(model, ids)[-1].argmax()))
        answers.append(Line(tuple(ids), scored=len(row), answer=len(row)))
    first = answers[0].token_ids
    wrong = Line((*first[:-2], (first[-2] + 1) % 60, first[-1]), answer=6)
    found = evaluate(source, Text((*answers, wrong), "test"), caches=["bf16"])
    assert found.source.measures.accuracy == 2 / 3
    assert found.source.measures.tokens == 4 + 4 + 9


def test_what_cannot_be_compared_is_refused(saved):
    source = saved("llama")
    with pytest.raises(UsageError, match="nothing to compare"):
        evaluate(source, TEXT)
    with pytest.raises(SourceError, match="outside the model's vocabulary"):
        evaluate(source, Text((Line((5, 6, 99)),), "test"), caches=["bf16"])
    with pytest.raises(SourceError, match="two tokens"):
        Text((Line((5,)),), "test")
