"""`verify --data` of Linears that AutoRound tuned: columns and groups are judged, rows are not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gptq_cases import converted, save
from test_gptq_verify import LAYER, OTHER, double_a_scale, edit, exchange, negate
from tiny.rows import write_rows
from tuned_cases import in_steps

from ckptq.quantize.packing import pack_words, unpack_words
from ckptq.verify.run import verify

Linear = dict[str, torch.Tensor]
TENSOR = f"{LAYER}.gate_proj.weight_packed"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("judged"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def tuned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = in_steps("w4a16-g32-tuned", 2, lr=0.03)
    return converted(llama, tmp_path_factory.mktemp("tuned") / "out", recipe)


def verified(llama: Path, tuned: Path, tmp_path: Path, damage: Callable[[Linear], object]):
    """By the weights alone, and by another text, with one Linear damaged."""
    out = tmp_path / "out"
    shutil.copytree(tuned, out)

    def change(tensors: Linear) -> None:
        name = f"{LAYER}.gate_proj."
        linear = {n.removeprefix(name): t for n, t in tensors.items() if n.startswith(name)}
        damage(linear)
        tensors |= {name + local: tensor.contiguous() for local, tensor in linear.items()}

    edit(out, change)
    text = str(write_rows(tmp_path / "other.jsonl", OTHER))
    return verify(out, llama), verify(out, llama, text=text)


def nothing(_: Linear) -> None:
    """What was tuned."""


def roll(linear: Linear) -> None:
    codes = unpack_words(linear["weight_packed"], 4, 128)
    linear["weight_packed"] = pack_words(codes.roll(1, 1), 4)


def another_row(linear: Linear) -> None:
    for tensor in (linear["weight_packed"], linear["weight_scale"]):
        tensor[7] = tensor[8]


def half_a_row(linear: Linear) -> None:
    linear["weight_scale"][7] /= 2


@pytest.mark.parametrize(
    ("damage", "alone", "by_text"),
    [
        (nothing, False, False),
        (roll, True, True),
        (negate, False, True),
        (exchange, False, True),
        (another_row, True, True),
        (half_a_row, False, False),
        (double_a_scale, False, False),
    ],
)
def test_what_is_found_of_a_tuned_linear(
    llama: Path,
    tuned: Path,
    tmp_path: Path,
    damage: Callable[[Linear], object],
    alone: bool,
    by_text: bool,
) -> None:
    for report, found in zip(
        verified(llama, tuned, tmp_path, damage), (alone, by_text), strict=True
    ):
        assert {finding.tensor for finding in report.findings} == ({TENSOR} if found else set())
