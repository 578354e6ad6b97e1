import math

import pytest
import torch
from evaluate_models import kl_by_torch

from ckptq.evaluate.compare import Outcome
from ckptq.evaluate.result import Evaluation, Row, Thresholds
from ckptq.evaluate.scores import Position, Scores, divergence, log_softmax


def logits(seed: int, n: int = 9, v: int = 50) -> torch.Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def folded(reference, other, targets, **changes) -> Scores:
    scores = Scores()
    positions = [Position(0, 0, at, target, True, **changes) for at, target in enumerate(targets)]
    scores.add(positions, reference, other)
    return scores


def test_divergence_is_torch_s_kl():
    p, q = logits(1), logits(2)
    want = kl_by_torch(p, q)
    torch.testing.assert_close(divergence(log_softmax(p), log_softmax(q)), want, rtol=0, atol=1e-14)
    assert want.min() > 0.1


def test_what_both_exclude_counts_nothing_and_what_one_excludes_is_infinite():
    p, q = logits(1), logits(2)
    p[:, 7] = q[:, 7] = -math.inf
    without = [i for i in range(50) if i != 7]
    kl = divergence(log_softmax(p), log_softmax(q))
    torch.testing.assert_close(kl, kl_by_torch(p[:, without], q[:, without]), rtol=0, atol=1e-14)
    q[:, 8] = -math.inf
    assert divergence(log_softmax(p), log_softmax(q)).isposinf().all()


def test_a_model_against_itself_is_exactly_zero():
    found = folded(logits(1), logits(1).clone(), [3] * 9).measures()
    assert (found.kl, found.kl_reverse, found.kl_max, found.agreement) == (0.0, 0.0, 0.0, 1.0)


def test_measures_are_means_over_tokens_however_they_are_cut():
    p, q, targets = logits(1), logits(2), list(range(9))
    whole = folded(p, q, targets).measures()
    cut = Scores()
    for part in (slice(0, 2), slice(2, 9)):
        positions = [Position(0, 0, at, targets[at], True) for at in range(9)[part]]
        cut.add(positions, p[part], q[part])
    assert cut.measures() == whole
    assert whole.kl == kl_by_torch(p, q).mean().item()
    loss = torch.nn.functional.cross_entropy(q.double(), torch.tensor(targets))
    assert whole.perplexity == pytest.approx(loss.exp().item(), rel=1e-14)
    assert whole.agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()


def test_positions_that_are_not_scored_change_nothing_but_the_answers():
    p, q = logits(1), logits(2)
    scores = folded(p, q, [0] * 9)
    before = scores.measures()
    best = q.argmax(-1).tolist()
    scores.add([Position(4, 0, 0, best[0], False, True)], p[:1], q[:1])
    scores.add([Position(5, 1, 0, best[1] + 1, False, True)], p[1:2], q[1:2])
    after = scores.measures()
    assert (after.kl, after.perplexity, after.tokens) == (before.kl, before.perplexity, 9)
    assert before.accuracy is None
    assert after.accuracy == 0.5


def test_one_wrong_token_makes_an_answer_wrong():
    p, q = logits(1), logits(2)
    best = q.argmax(-1).tolist()
    assert folded(p, q, best, asked=True).measures().accuracy == 1.0
    best[4] += 1
    assert folded(p, q, best, asked=True).measures().accuracy == 0.0


def row(reference, other, layers=(0.0,), accuracy=False) -> Row:
    best = reference.argmax(-1).tolist()
    scores = folded(reference, other, best, **({"asked": True} if accuracy else {}))
    outcome = Outcome(measures=scores.measures(), layers=layers)
    return Row(weights="out", kv_cache="bf16", scales="-", nbytes=8, outcome=outcome)


def evaluation(one: Row, zero: Row | None = None, control: Row | None = None, **limits):
    source = row(logits(1), logits(1), accuracy=True)
    return Evaluation(
        source=source,
        rows=(one,),
        zero=zero or source,
        control=control or row(logits(1), 40 * logits(3)),
        text="text",
        samples=1,
        thresholds=Thresholds(**limits),
    )


BAD = {
    "max_kl": (1e-3, "KL divergence"),
    "min_agreement": (0.99, "top-1 agreement"),
    "max_ppl_ratio": (1.01, "perplexity ratio"),
    "min_accuracy": (0.5, "accuracy"),
}


@pytest.mark.parametrize("name", BAD)
def test_each_threshold_names_its_number_and_passes_a_good_row(name):
    limit, measure = BAD[name]
    bad = evaluation(row(logits(1), logits(2), accuracy=True), **{name: limit})
    assert [measure in failure for failure in bad.failures] == [True]
    assert f"{limit:g}" in bad.failures[0]
    assert bad.recommended is None
    good = evaluation(row(logits(1), logits(1), accuracy=True), **{name: limit})
    assert good.ok
    assert good.recommended is good.rows[0]


@pytest.mark.parametrize("name", BAD)
def test_a_model_that_gives_nan_passes_no_threshold(name):
    broken = row(logits(1), logits(2) * math.nan, accuracy=True)
    assert not evaluation(broken, **{name: BAD[name][0]}).ok
    assert evaluation(broken).to_dict()["rows"][0]["kl"] is None


def test_a_zero_that_is_not_zero_fails_whatever_is_asked():
    fine = row(logits(1), logits(1))
    assert evaluation(fine).ok
    for wrong in (row(logits(1), logits(2)), row(logits(1), logits(1), layers=(0.0, 1e-9))):
        assert "not zero" in evaluation(fine, zero=wrong).failures[0]


def test_a_control_that_is_not_worse_is_told():
    rather_bad = row(logits(1), logits(2))
    assert not evaluation(rather_bad).warnings
    assert "not clearly worse" in evaluation(rather_bad, control=rather_bad).warnings[0]
