"""The smallest plan that holds what is asked, when it is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.errors import FoundWrong, SourceError, UsageError
from ckptq.evaluate.request import EvaluationRequest, evaluate_request
from ckptq.recipes.load import load_recipe
from ckptq.search.candidates import PLAIN
from ckptq.search.choice import Budget
from ckptq.search.request import SearchRequest, search
from ckptq.search.result import Found
from ckptq.search.trials import SOURCE, Trials

SCHEMES = ("nvfp4a16", "fp8-dynamic", PLAIN)


@pytest.fixture(autouse=True)
def _few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptq.search.trials.RUNGS", 1)


@pytest.fixture(scope="module")
def task(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions that the model answers itself, in one word: some of those that it is sure of."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    ids_BS = torch.cat([torch.ones(300, 1, dtype=torch.long), torch.randint(4, 64, (300, 5))], 1)
    with torch.no_grad():
        best_B2, token_B2 = model(ids_BS).logits[:, -1, 4:].float().topk(2)
    sure = (best_B2[:, 0] - best_B2[:, 1]).argsort(descending=True)[20:140:10].tolist()
    words = [[f"w{i - 4}" for i in row[1:]] for row in ids_BS.tolist()]
    asked = [{"prompt": " ".join(words[i]), "answer": f"w{token_B2[i, 0]}"} for i in sure]
    file = tmp_path_factory.mktemp("task") / "task.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in asked))
    return file


def request(model: Path, folder: Path, task: Path | None, **more) -> SearchRequest:
    budget = {name: more.pop(name) for name in ("max_kl", "min_accuracy", "bits") if name in more}
    given = {"schemes": SCHEMES, **more}
    return SearchRequest(
        model=model, budget=Budget(**budget), output=folder / "mixed.yaml", task=task,
        device="cpu", **given,
    )  # fmt: skip


class Runs:
    """Counts how often plans are run, and ends one of them."""

    def __init__(self, killed: int | None = None) -> None:
        self.count, self.killed = 0, killed

    def __call__(self, task: str, total: int, unit: str = "bytes"):
        self.count += task == "evaluate"

        def report(what: str, done: int) -> None:
            if task == "evaluate" and self.count == self.killed:
                raise KeyboardInterrupt

        return report


@pytest.fixture(scope="module")
def wanted(llama: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, int]:
    """A search, and how often it ran plans."""
    folder, runs = tmp_path_factory.mktemp("wanted"), Runs()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ckptq.search.trials.RUNGS", 1)
        return search(request(llama, folder, task, min_accuracy=0.8), runs), runs.count


def test_the_smallest_that_answers_enough(
    wanted: tuple[Found, int], llama: Path, task: Path, tmp_path: Path
) -> None:
    found = wanted[0]
    bits = [each.point.bits for each in found.tried]
    assert bits == sorted(bits)
    at = bits.index(found.total.bits)
    assert [each.holds for each in found.tried[: at + 1]] == [False] * at + [True]
    assert bits[at] - bits[at - 1] < 1.5  # a size of one bit, and what is left of the one before
    assert found.tried[0].accuracy < 0.8 <= found.tried[at].accuracy
    source = found.tried[-1]
    assert (source.point.name, source.kl) == (SOURCE, 0.0)
    assert source.accuracy > 0.9
    out = tmp_path / "out"
    quantize(QuantizeRequest(model=llama, recipe=load_recipe(found.recipe), out=out))
    real = evaluate_request(out, EvaluationRequest(source=str(llama), task=task, device="cpu"))
    measures = real.rows[0].measures
    assert measures.accuracy == found.tried[at].accuracy
    assert measures.kl == pytest.approx(found.tried[at].kl, rel=1e-6)


def test_a_killed_run_and_another_limit(
    wanted: tuple[Found, int], llama: Path, task: Path, tmp_path: Path
) -> None:
    (whole, count), again, other, fewer = wanted, Runs(), Runs(), Runs()
    assert count > 1
    asked = request(llama, tmp_path, task, min_accuracy=0.8)
    with pytest.raises(KeyboardInterrupt):
        search(asked, Runs(killed=2))
    assert not asked.output.exists()
    found = search(asked, again)
    assert (found.tried, found.chosen, again.count) == (whole.tried, whole.chosen, count - 1)
    assert asked.kept.read_bytes() == whole.sensitivities.read_bytes()
    some = whole.tried[0].accuracy
    assert search(request(llama, tmp_path, task, min_accuracy=some), other).tried[0].holds
    assert other.count == 0
    search(request(llama, tmp_path, task, min_accuracy=some, questions=5), fewer)
    assert fewer.count > 0  # other questions are another task


def test_what_holds_need_not_grow_with_size(
    llama: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest that was seen to hold, although a larger one did not."""
    monkeypatch.setattr(Trials, "_trial", uneven(Trials._trial))
    found = search(request(llama, tmp_path, task, min_accuracy=0.5))
    at = [each.point.bits for each in found.tried].index(found.total.bits)
    assert [each.holds for each in found.tried][: at + 1] == [False] * at + [True]
    assert not all(each.holds for each in found.tried[at:])
    assert 6 <= found.total.bits <= 8


def uneven(made):
    """Trials of which only those between 6 and 9 bits hold, and the source."""
    from dataclasses import replace

    def trial(self, plan, kl, accuracy):
        found = made(self, plan, kl, accuracy)
        return replace(found, holds=6 <= found.point.bits <= 9 or found.point.bits > 15.9)

    return trial


def test_kl_is_that_of_the_whole_plan(llama: Path, rows: Path, tmp_path: Path) -> None:
    asked = {"data": str(rows), "samples": 2, "seq_len": 16}
    small = search(request(llama, tmp_path, None, bits=4.6, **asked))
    assert small.tried == ()
    found = search(request(llama, tmp_path, None, max_kl=small.total.loss / 4, **asked))
    at = [each.point.bits for each in found.tried].index(found.total.bits)
    trial = found.tried[at]
    assert trial.kl <= small.total.loss / 4 < found.tried[at - 1].kl
    assert trial.accuracy is None
    assert trial.kl != trial.point.loss
    quantize(QuantizeRequest(model=llama, recipe=load_recipe(found.recipe), out=tmp_path / "out"))
    same = EvaluationRequest(source=str(llama), device="cpu", **asked)
    assert evaluate_request(tmp_path / "out", same).rows[0].measures.kl == pytest.approx(trial.kl)


def test_a_size_shows_what_it_costs(llama: Path, task: Path, tmp_path: Path) -> None:
    found = search(request(llama, tmp_path, task, bits=8.5))
    assert [each.point.nbytes for each in found.tried] == [found.total.nbytes]
    assert 0 < found.tried[0].accuracy <= 1


def test_nothing_holds(llama: Path, task: Path, tmp_path: Path) -> None:
    harder = tmp_path / "task.jsonl"
    lines = [json.loads(line) for line in task.read_text().splitlines()]
    harder.write_text("".join(json.dumps({**each, "answer": "w9 w9"}) + "\n" for each in lines))
    with pytest.raises(FoundWrong, match=r"the source, 16\.000 bits.*accuracy 0"):
        search(request(llama, tmp_path, harder, min_accuracy=0.8))
    alone = ("nvfp4a16",)
    with pytest.raises(FoundWrong, match=r"no plan holds --min-accuracy 0\.99\nplan, 4\.506 bits"):
        search(request(llama, tmp_path, task, min_accuracy=0.99, schemes=alone))
    assert not list(tmp_path.glob("*.yaml"))


def test_limits_that_mean_nothing_are_refused(llama: Path, task: Path, tmp_path: Path) -> None:
    for more, said in (
        ({"task": None, "min_accuracy": 0.9}, "needs questions: --task"),
        ({"task": task, "min_accuracy": 1.5}, "--min-accuracy 1.5: expected a share"),
        ({"task": task, "min_accuracy": 0.9, "bits": 5}, "give one of --bits and --size"),
        ({"task": task, "max_kl": 0.1}, "--max-kl: KL is measured on text"),
        ({"task": task, "max_kl": -1, "data": "x"}, "--max-kl -1: expected a number"),
        ({"task": task}, "give one of --bits and --size"),
    ):
        with pytest.raises(UsageError, match=said):
            search(request(llama, tmp_path, **more))
    with pytest.raises(SourceError, match="no such file"):
        search(request(llama, tmp_path, tmp_path / "none.jsonl", min_accuracy=0.9))
    assert not list(tmp_path.glob("*.json"))
