"""`ckptq calibrate` as a user meets it: what it says of the text, and of every kind of scale."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_cli import run
from tiny.rows import write_rows


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Three samples of four tokens; ids need no tokenizer."""
    file = tmp_path / "text.jsonl"
    rows = ([number, 2, 3, 4] for number in range(3))
    write_rows(file, rows)
    return file


@pytest.mark.parametrize(
    ("scheme", "kinds"),
    [
        ("fp8-per-head", {"q_scale": "2", "k_scale": "2", "v_scale": "2"}),
        ("fp8-static", {"input_scale": "14"}),
        ("nvfp4", {"input_global_scale": "14"}),
    ],
)
def test_every_kind_of_scale_is_shown(
    llama: Path, text: Path, tmp_path: Path, scheme: str, kinds: dict[str, str]
) -> None:
    """Those of inputs were not: the table was empty."""
    arguments = ("calibrate", llama, "-o", tmp_path / "s", "-s", scheme, "--data", text)
    title, _, *rows = run(*arguments).stdout.splitlines()
    assert title.endswith(f"llama on {text.name}, samples: 3, tokens: 12")
    assert {row.split()[0]: row.split()[1] for row in rows} == kinds


@pytest.mark.parametrize(("asked", "said"), [("4", True), ("3", False)])
def test_a_text_that_is_too_short_is_told(
    llama: Path, text: Path, tmp_path: Path, asked: str, said: bool
) -> None:
    words = f"{text}: has 3 of the 4 requested samples, 12 tokens in all\n"
    rest = ("--data", text, "--samples", asked)
    scales = run("calibrate", llama, "-o", tmp_path / "s", *rest)
    whole = run("quantize", llama, "-o", tmp_path / "out", "-s", "kv-fp8-per-head", *rest)
    assert (scales.returncode, whole.returncode) == (0, 0), (scales.stderr, whole.stderr)
    assert (words in scales.stderr, words in whole.stderr) == (said, said)


def test_scales_of_another_scheme_are_refused_before_a_run_begins(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "scales.safetensors", tmp_path / "out"
    assert run("calibrate", llama, "-o", file, "--data", text).returncode == 0
    arguments = ("quantize", llama, "-o", out, "--scales", file)
    done = run(*arguments, "-s", "fp8-per-tensor")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {file}: the scales of llama, one scale per head: model.layers.0.self_attn."
        "q_scale is BF16 [2, 1, 1]; expected BF16 [1] for fp8-per-tensor\n"
    )
    done = run(*arguments, "-s", "fp8-static")
    assert done.returncode == 2
    assert "down_proj.input_scale is missing; they are for another model or scheme" in done.stderr
    assert not out.with_name("out.partial").exists()
    assert run(*arguments, "-s", "fp8-per-head").returncode == 0
