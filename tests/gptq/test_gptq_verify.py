"""`verify` of codes that GPTQ chose: no fault, no advice; what is wrong is still found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gptq_cases import by_oneshot, converted, each_once, save
from safetensors.torch import load_file, save_file
from tiny.rows import token_rows, write_rows

from ckptq.errors import UsageError
from ckptq.quantize.packing import pack_words, unpack_words
from ckptq.recipes.load import load_scheme, load_text
from ckptq.verify.run import verify

SCHEMES = ["w4a16-g32-gptq", "w4a16-asym-gptq", "w8a8-gptq", "nvfp4a16-gptq", "fp8-dynamic-gptq"]
WEIGHED = [
    *("w4a16-g32-imatrix", "nvfp4a16-imatrix", "w4a16-g32-imatrix-gptq", "w8a8-imatrix-gptq"),
    *("w4a16-g32-refined", "w4a16-asym-refined", "nvfp4a16-refined", "fp8-dynamic-refined"),
]
KNOWN = {"codes-not-nearest", "scale-differs", "scale-signed"}
UNORDERED = """
quant_stage:
  quant_modifiers:
    GPTQModifier: {targets: [Linear], scheme: W4A16, ignore: [lm_head], actorder: null}
"""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its channels differ so much that GPTQ gives some of them up."""
    return save(tmp_path_factory.mktemp("judged"))


@pytest.fixture(scope="session")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return each_once(llama, tmp_path_factory.mktemp("made"))


@pytest.fixture
def copied(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Scheme -> a copy to be damaged."""
    return lambda scheme: shutil.copytree(made(scheme), tmp_path / "out")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_that_gptq_chose_are_no_fault(
    llama: Path, made: Callable[[str], Path], scheme: str
) -> None:
    report = verify(made(scheme), llama)
    assert report.findings == ()
    [note] = {note.code: note for note in report.notes}.values()
    assert note.code == "codes-not-nearest"
    assert "codes chosen by GPTQ or AutoRound" in str(note)


@pytest.mark.parametrize("scheme", WEIGHED)
def test_ranges_that_inputs_weigh_are_no_fault(
    llama: Path, copied: Callable[[str], Path], scheme: str
) -> None:
    out = copied(scheme)
    report = verify(out, llama)
    assert report.findings == ()
    assert {note.code for note in report.notes} <= KNOWN

    def double(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors[f"{LAYER}.gate_proj.weight_scale"]
        scale.copy_(scale.float() * 4)

    edit(out, double)
    assert not verify(out, llama).ok


def test_the_recipe_says_so_where_config_json_does_not(llama: Path, tmp_path: Path) -> None:
    out = converted(llama, tmp_path / "out", load_text("own", UNORDERED))
    assert "actorder" not in (out / "config.json").read_text()
    assert _wanted(out, llama) == {"codes chosen by GPTQ or AutoRound"}
    (out / "recipe.yaml").unlink()
    assert "codes chosen by GPTQ or AutoRound" not in _wanted(out, llama)


def test_the_recipe_says_that_scales_were_fitted(llama: Path, tmp_path: Path) -> None:
    """config.json cannot, where ranges were not weighed before."""
    text = UNORDERED.replace("actorder: null", "actorder: null, descents: 2")
    text = text.replace("W4A16", "FP8_DYNAMIC")  # signs of scales would say it
    out = converted(llama, tmp_path / "out", load_text("own", text))
    assert verify(out, llama).findings == ()
    (out / "recipe.yaml").unlink()
    assert not verify(out, llama).ok


def _wanted(out: Path, source: Path) -> set[str]:
    report = verify(out, source)
    about = (*report.findings, *report.notes)
    return {str(one.wanted) for one in about if one.code == "codes-not-nearest"}


def edit(out: Path, change) -> None:
    file = out / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


LAYER = "model.layers.1.mlp"


@pytest.mark.parametrize("damage", ["random codes", "another Linear's codes", "a few scales"])
def test_what_is_wrong_with_them_is_found(
    llama: Path, copied: Callable[[str], Path], damage: str
) -> None:
    out = copied("w4a16-g32-gptq")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        codes, others = (f"{LAYER}.{name}_proj.weight_packed" for name in ("gate", "up"))
        if damage == "random codes":
            shape = tensors[codes].shape
            tensors[codes] = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).int()
        elif damage == "another Linear's codes":
            tensors[codes] = tensors[others].clone()
        else:
            tensors[f"{LAYER}.gate_proj.weight_scale"][0, :2] *= 2

    edit(out, change)
    report = verify(out, llama)
    assert not report.ok
    assert all(f"{LAYER}.gate_proj" in str(finding) for finding in report.findings)


@pytest.mark.parametrize("damage", ["the other sign", "another row"])
def test_a_lost_row_is_found_where_scales_were_fitted_too(
    llama: Path, copied: Callable[[str], Path], damage: str
) -> None:
    out = copied("w4a16-g32-refined")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        codes, scale = (
            tensors[f"{LAYER}.up_proj.{local}"] for local in ("weight_packed", "weight_scale")
        )
        if damage == "the other sign":
            scale[7] *= -1
        else:
            codes[7], scale[7] = codes[9], scale[9]

    edit(out, change)
    [found] = verify(out, llama).findings
    assert (found.code, found.tensor) == ("codes-corrupt", f"{LAYER}.up_proj.weight_packed")
    assert "1 of" in str(found.found)


def test_a_folder_says_in_its_record_what_gptq_did(made: Callable[[str], Path]) -> None:
    record = json.loads((made("w4a16-g32-gptq") / "ckptq.json").read_text())
    assert record["by_inputs"] == {"nearest": [], "unsolved": [], "massive": {}, "experts": {}}
    assert record["calibration"]["samples"] == 12


@pytest.fixture(scope="session")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Which no codes were chosen by."""
    return str(write_rows(tmp_path_factory.mktemp("text") / "other.jsonl", OTHER))


OTHER = token_rows([48] * 8, seed=5)

JUDGED = ["w4a16-g32-refined", "w4a16-g32-gptq", "w4a16-channel-gptq", "nvfp4a16-refined"]
JUDGED += ["w8a8-gptq", "fp8-dynamic-refined"]


@pytest.mark.parametrize("scheme", JUDGED)
def test_by_other_text_choices_are_right(
    llama: Path, made: Callable[[str], Path], other_text: str, scheme: str
) -> None:
    report = verify(made(scheme), llama, text=other_text)
    assert report.findings == ()
    assert report.checks["linears judged by text"] == 14


def test_by_other_text_what_oneshot_chose_is_right(
    llama: Path, tmp_path: Path, other_text: str
) -> None:
    by_oneshot(llama, tmp_path, load_scheme("w4a16-g32-gptq").text)
    report = verify(tmp_path, llama, text=other_text)
    assert report.findings == ()
    assert report.checks["linears judged by text"] == 14


def negate(linear: dict[str, torch.Tensor]) -> str:
    """A group's codes, of which -8 has no opposite."""
    codes = unpack_words(linear["weight_packed"], 4, 128)
    codes[7, 32:64] = (-codes[7, 32:64]).clamp(max=7)
    linear["weight_packed"] = pack_words(codes, 4)
    return "row 7 from column 32"


def exchange(linear: dict[str, torch.Tensor]) -> str:
    codes = unpack_words(linear["weight_packed"], 4, 128)
    codes[:, [5, 6]] = codes[:, [6, 5]]
    linear["weight_packed"] = pack_words(codes, 4)
    return "columns"


def double_a_scale(linear: dict[str, torch.Tensor]) -> str:
    linear["weight_scale"][9, 1] *= 2
    return "row 9 from column 32"


DAMAGE = [
    ("w4a16-g32-refined", negate),
    ("w4a16-g32-refined", exchange),
    ("w4a16-g32-refined", double_a_scale),
    ("w4a16-g32-gptq", negate),
    ("w4a16-g32-gptq", exchange),
    ("w4a16-channel-gptq", exchange),
]


@pytest.mark.parametrize(("scheme", "change"), DAMAGE)
def test_damage_that_looks_like_a_choice_is_seen_by_text(
    llama: Path, copied: Callable[[str], Path], other_text: str, scheme: str, change
) -> None:
    out = copied(scheme)
    where: list[str] = []

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{LAYER}.gate_proj."
        linear = {n.removeprefix(name): t for n, t in tensors.items() if n.startswith(name)}
        where.append(change(linear))
        tensors |= {name + local: tensor.contiguous() for local, tensor in linear.items()}

    edit(out, damage)
    assert verify(out, llama).ok, "the weights alone show it"
    [found] = verify(out, llama, text=other_text).findings
    assert (found.code, found.tensor) == ("codes-corrupt", f"{LAYER}.gate_proj.weight_packed")
    assert where[0] in str(found.found)


def test_text_for_nothing_is_refused(
    llama: Path, made: Callable[[str], Path], other_text: str
) -> None:
    out = made("w4a16-g32")
    with pytest.raises(UsageError, match=r"no codes of .* are said to be chosen by text"):
        verify(out, llama, text=other_text)
    with pytest.raises(UsageError, match="--samples 3 applies only to --attention and --data"):
        verify(out, llama, samples=3)


def test_a_row_that_another_tool_gave_up_is_no_fault(
    llama: Path, copied: Callable[[str], Path]
) -> None:
    """As oneshot does in SmolLM2's layers 11 and 28, for tokens that ckptq leaves out."""
    out = copied("w4a16-g32-gptq")

    def give_up(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{LAYER}.up_proj.weight_packed"][7] = tensors[f"{LAYER}.up_proj.weight_packed"][8]

    edit(out, give_up)
    assert verify(out, llama).counts == {"codes-corrupt": 1}
    (out / "ckptq.json").unlink()
    report = verify(out, llama)
    assert report.findings == ()
    [note] = [note for note in report.notes if f"{LAYER}.up_proj" in str(note)]
    assert "1 of 256 rows have more noise than signal, as massive activations" in str(note)
