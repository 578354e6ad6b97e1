"""What a choice costs, against plain formulas; kept, taken up again, and refused where stale."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from search_models import kl_of_change
from tiny.tensors import tensors_in
from torch import Tensor

from ckptq.checkpoint.open import open_checkpoint
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.errors import SourceError, UsageError
from ckptq.evaluate.text import text_of
from ckptq.evaluate.weights.schemes import SchemeWeights
from ckptq.progress import silent
from ckptq.recipes.load import load_scheme
from ckptq.search.candidates import PLAIN, Candidates, LinearSet, find_candidates
from ckptq.search.changed import Change
from ckptq.search.changed_rows import Rows
from ckptq.search.choice import Budget
from ckptq.search.request import SearchRequest, search
from ckptq.search.weight_errors import WeightErrors, piece_starts
from ckptq.text.samples import read_samples

SCHEMES = ("nvfp4a16", "fp8-dynamic", PLAIN)


def fp8_error(w_RC: Tensor) -> float:
    """|Q(w) - w|^2 / |w|^2 of FP8 with a bf16 scale for each row, in float64."""
    scale_R1 = (w_RC.abs().amax(1, keepdim=True) / 448).double()
    code_RC = (w_RC.double() / scale_R1).float().clamp(-448, 448).to(torch.float8_e4m3fn)
    error_RC = code_RC.double() * scale_R1 - w_RC.double()
    return float(error_RC.square().sum() / w_RC.double().square().sum())


def test_errors_of_weights_are_relative_and_squared(llama: Path) -> None:
    candidates = find_candidates(open_checkpoint(llama), SCHEMES)
    errors, stored = WeightErrors(candidates, "cpu"), tensors_in(llama)
    for each in candidates.sets[:4]:
        found = errors.measure(each, SCHEMES)
        wanted = sum(fp8_error(stored[f"{name}.weight"]) for name in each.linears)
        assert found["fp8-dynamic"] == pytest.approx(wanted, rel=0.01)
        assert found["nvfp4a16"] > 5 * found["fp8-dynamic"]


def test_heads_that_vanish_are_seen(llama: Path, tmp_path: Path) -> None:
    """Small rows below the least scale of NVFP4, small columns below half a step of INT4."""
    changed = tmp_path / "changed"
    shutil.copytree(llama, changed)
    tensors, attention = tensors_in(llama), "model.layers.0.self_attn"
    tensors[f"{attention}.q_proj.weight"][:32] *= 2.0**-22
    tensors[f"{attention}.o_proj.weight"][:, :32] *= 2.0**-10
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    before, after = (losses_of_attention(each) for each in (llama, changed))
    for linears, scheme in (("q_proj", "nvfp4a16"), ("o_proj", "w4a16-channel")):
        rise = after[linears][scheme] - before[linears][scheme]
        assert rise == pytest.approx(0.5, rel=0.05)
    for linears, scheme in (("q_proj", "w4a16-channel"), ("o_proj", "nvfp4a16")):
        assert after[linears][scheme] == pytest.approx(before[linears][scheme], rel=0.05)


def losses_of_attention(model: Path) -> dict[str, dict[str, float]]:
    """Of the first layer: first Linear of a set -> scheme -> loss."""
    schemes = ("nvfp4a16", "w4a16-channel")
    candidates = find_candidates(open_checkpoint(model), schemes)
    first = [each for each in candidates.sets if ".0.self_attn." in each.name]
    errors = WeightErrors(candidates, "cpu")
    return {each.name.rpartition(".")[2]: errors.measure(each, schemes) for each in first}


def test_experts_count_as_one(experts: Path) -> None:
    candidates = find_candidates(open_checkpoint(experts), SCHEMES)
    every = next(each for each in candidates.sets if each.name.endswith("experts"))
    stored = tensors_in(experts)
    total = sum(fp8_error(stored[f"{name}.weight"]) for name in every.linears)
    found = WeightErrors(candidates, "cpu").measure(every, ["fp8-dynamic"])
    assert found["fp8-dynamic"] == pytest.approx(total / 4, rel=0.01)


def changed(candidates: Candidates, each: LinearSet, scheme: str) -> dict[str, Tensor]:
    weights = SchemeWeights(candidates.ckpt, candidates.plans[scheme])
    names = [f"{name}.weight" for name in each.linears]
    return {n.removesuffix(".weight"): w for n, w in weights.load(names).items()}


def measured(candidates: Candidates, rows: Path, changes: list[Change], **sizes) -> dict:
    samples = read_samples(str(rows), candidates.ckpt.path, samples=2, seq_len=16)
    found: dict[Change, float] = {}
    Rows(candidates, text_of(samples, []), "cpu", **sizes).measure(changes, found.update, silent)
    return found


def test_rows_are_what_transformers_computes(llama: Path, rows: Path) -> None:
    candidates = find_candidates(open_checkpoint(llama), SCHEMES)
    sets = [candidates.sets[at] for at in (0, 2, 7, 13)]
    changes = [Change("nvfp4a16", each.linears) for each in sets]
    found = measured(candidates, rows, changes)
    wanted = [kl_of_change(llama, rows, changed(candidates, e, "nvfp4a16")) for e in sets]
    assert [found[change] for change in changes] == pytest.approx(wanted, rel=1e-3)
    assert min(wanted) > 1e-4
    assert len({f"{each:.2g}" for each in wanted}) == 4  # a row of another set would be noticed


def test_experts_run_as_transformers_computes(experts: Path, rows: Path) -> None:
    candidates = find_candidates(open_checkpoint(experts), SCHEMES)
    every = next(each for each in candidates.sets if each.name.endswith("experts"))
    other = candidates.sets[-1]
    assert other is not every
    changes = [Change("nvfp4a16", each.linears) for each in (every, other)]
    found = measured(candidates, rows, changes)
    for each, change in zip((every, other), changes, strict=True):
        wanted = kl_of_change(experts, rows, changed(candidates, each, "nvfp4a16"))
        assert found[change] == pytest.approx(wanted, rel=1e-3)


def test_inputs_are_rounded_in_the_changed_layer(llama: Path, rows: Path) -> None:
    candidates = find_candidates(open_checkpoint(llama), ("mxfp8", "mxfp8a16", PLAIN))
    each = candidates.sets[0]
    both = [Change("mxfp8", each.linears), Change("mxfp8a16", each.linears)]
    found = measured(candidates, rows, both)
    weights_alone = kl_of_change(llama, rows, changed(candidates, each, "mxfp8"))
    assert found[both[1]] == pytest.approx(weights_alone, rel=1e-3)
    assert found[both[0]] > 1.2 * weights_alone


def test_few_rows_at_a_time_give_the_same(llama: Path, rows: Path) -> None:
    candidates = find_candidates(open_checkpoint(llama), SCHEMES)
    changes = [Change(s, each.linears) for each in candidates.sets for s in candidates.plans]
    assert measured(candidates, rows, changes) == measured(candidates, rows, changes, row_bytes=1)


def request(model: Path, folder: Path, bits: float, rows: Path | None = None, **more):
    data = str(rows) if rows is not None else None
    return SearchRequest(
        model=model, budget=Budget(bits=bits), output=folder / "mixed.yaml", schemes=SCHEMES,
        data=data, device="cpu", **more,
    )  # fmt: skip


class Tasks:
    """The tasks that were begun."""

    def __init__(self) -> None:
        self.amounts: dict[str, int] = {}

    def __call__(self, task: str, total: int, unit: str = "bytes"):
        self.amounts[task] = total
        return lambda what, done: None


@pytest.mark.parametrize("by_text", [False, True])
def test_another_budget_measures_nothing(
    llama: Path, rows: Path, tmp_path: Path, by_text: bool
) -> None:
    given = rows if by_text else None
    first = search(request(llama, tmp_path, 6, given))
    before = first.sensitivities.read_bytes()
    tasks = Tasks()
    second = search(request(llama, tmp_path, 9, given), tasks)
    assert not any(tasks.amounts.values())
    assert first.sensitivities.read_bytes() == before
    assert second.total.loss < first.total.loss
    assert second.total.bits <= 9


def test_a_killed_run_goes_on(
    llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = search(request(llama, tmp_path, 6, rows)).sensitivities
    whole = wanted.read_bytes()
    wanted.unlink()
    monkeypatch.setattr("ckptq.search.changed_rows.MOST_ROWS", 8)

    def killed(task: str, total: int, unit: str = "bytes"):
        def report(what: str, done: int) -> None:
            seen.append(what)
            if len(seen) == 10:
                raise KeyboardInterrupt

        seen: list[str] = []
        return report

    with pytest.raises(KeyboardInterrupt):
        search(request(llama, tmp_path, 6, rows), killed)
    kept = json.loads(wanted.read_bytes())["losses"]
    assert 0 < sum(len(each["sets"]) for each in kept.values()) < 32
    assert not (tmp_path / "other.yaml").exists()
    tasks = Tasks()
    search(request(llama, tmp_path, 6, rows), tasks)
    again = json.loads(wanted.read_bytes())["losses"]
    assert again == json.loads(whole)["losses"]


def test_what_is_kept_of_another_source_is_measured_again(
    llama: Path, rows: Path, tmp_path: Path
) -> None:
    import shutil

    model = Path(shutil.copytree(llama, tmp_path / "model"))
    notes: list[str] = []
    search(request(model, tmp_path, 6), note=notes.append)
    os.utime(model / "model.safetensors")
    tasks = Tasks()
    search(request(model, tmp_path, 6), tasks, notes.append)
    assert any("of another source" in line for line in notes)
    assert tasks.amounts["weights"] > 0
    kept = tmp_path / "mixed.sensitivities.json"
    kept.write_text('{"mine": 1}')
    with pytest.raises(UsageError, match="holds no sensitivities"):
        search(request(model, tmp_path, 6))
    assert kept.read_text() == '{"mine": 1}'


def test_sets_share_what_their_layer_costs(llama: Path, rows: Path, tmp_path: Path) -> None:
    found = search(request(llama, tmp_path, 6, rows, per="layer"))
    candidates = find_candidates(open_checkpoint(llama), SCHEMES)
    first = candidates.sets[:4]
    layer = Change("nvfp4a16", tuple(n for each in first for n in each.linears))
    kl = measured(candidates, rows, [layer])[layer]
    losses = [each.losses["nvfp4a16"] for each in found.chosen[:4]]
    assert sum(losses) == pytest.approx(kl, rel=1e-6)
    errors = [WeightErrors(candidates, "cpu").measure(e, ["nvfp4a16"])["nvfp4a16"] for e in first]
    shares = [loss / error for loss, error in zip(losses, errors, strict=True)]
    assert shares == pytest.approx([shares[0]] * 4)


def test_budgets_that_mean_nothing_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the smallest has 4\.5"):
        search(request(llama, tmp_path, 4))
    with pytest.raises(UsageError, match="nothing to quantize"):
        search(request(llama, tmp_path, 16))
    for odd in (Budget(bits=5, nbytes=10**6), Budget(bits=math.inf), Budget(bits=math.nan)):
        with pytest.raises(UsageError, match="one of --bits and --size"):
            search(SearchRequest(model=llama, budget=odd, output=tmp_path / "a.yaml"))
    with pytest.raises(UsageError, match="add --data"):
        search(SearchRequest(model=llama, budget=Budget(max_kl=0.1), output=tmp_path / "a.yaml"))
    assert not list(tmp_path.glob("*.yaml"))


def test_tokens_outside_the_vocabulary_are_named(llama: Path, tmp_path: Path) -> None:
    rows = tmp_path / "odd.jsonl"
    rows.write_text('{"input_ids": [1, 2, 99999]}\n')
    with pytest.raises(SourceError, match=r"odd\.jsonl: token id 99999 is outside"):
        search(request(llama, tmp_path, 5.0, rows))


def test_large_linears_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from search_models import save_model

    wide = save_model("Llama", tmp_path / "wide", intermediate_size=1280, num_hidden_layers=1)
    candidates = find_candidates(open_checkpoint(wide), SCHEMES)
    every = {e.name: WeightErrors(candidates, "cpu").measure(e, SCHEMES) for e in candidates.sets}
    assert piece_starts(1280, 128, 4 * 128) == [0, 384, 768, 1152]
    assert piece_starts(1200, 128, 10**6) == list(range(0, 1200, 128))
    assert piece_starts(100, 128, 1) == [0]
    monkeypatch.setattr("ckptq.search.weight_errors.ENOUGH", 4 * 128 * 64)
    for each in candidates.sets:
        found = WeightErrors(candidates, "cpu").measure(each, SCHEMES)
        assert found == pytest.approx(every[each.name], rel=0.05)
        assert (found != every[each.name]) == ("mlp" in each.name)


def test_blocks_of_rows_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a scheme has one scale for 128 rows."""
    from search_models import save_model

    wide = save_model("Llama", tmp_path / "wide", hidden_size=512, num_hidden_layers=1)
    monkeypatch.setattr("ckptq.search.weight_errors.ENOUGH", 1)
    for schemes, rows in ((SCHEMES, 16), ((*SCHEMES, "fp8-block"), 128)):
        candidates = find_candidates(open_checkpoint(wide), schemes)
        down = next(each for each in candidates.sets if "down_proj" in each.name)
        places = list(WeightErrors(candidates, "cpu").places(down))
        assert [(at, stop) for _, at, stop in places] == [(0, rows), (512 - rows, 512)]


def test_of_a_source_in_blocks_no_more_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are decoded from multiples of 128 on, but not up to the next."""
    from search_models import save_model

    wide = save_model("Llama", tmp_path / "wide", hidden_size=512, num_hidden_layers=1)
    blocks = tmp_path / "blocks"
    quantize(QuantizeRequest(model=wide, recipe=load_scheme("fp8-block"), out=blocks))
    candidates = find_candidates(open_checkpoint(blocks), SCHEMES)
    down = next(each for each in candidates.sets if "down_proj" in each.name)
    whole = WeightErrors(candidates, "cpu").measure(down, SCHEMES)
    monkeypatch.setattr("ckptq.search.weight_errors.ENOUGH", 1)
    few = WeightErrors(candidates, "cpu")
    assert [(at, stop) for _, at, stop in few.places(down)] == [(0, 16), (384, 400)]
    found = few.measure(down, SCHEMES)
    assert found == pytest.approx(whole, rel=0.1)
    assert found != whole


def test_some_of_many_experts_stand_for_all(experts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = find_candidates(open_checkpoint(experts), SCHEMES)
    every = next(each for each in candidates.sets if each.name.endswith("experts"))
    whole = WeightErrors(candidates, "cpu").measure(every, SCHEMES)
    monkeypatch.setattr("ckptq.search.weight_errors.EXPERTS", 2)
    errors = WeightErrors(candidates, "cpu")
    found = errors.measure(every, SCHEMES)
    assert found == pytest.approx(whole, rel=0.05)
    assert found != whole
    read = {weight.stored.name.split(".experts.")[1][0] for weight, *_ in errors.places(every)}
    assert read == {"0", "3"}
