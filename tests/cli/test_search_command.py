"""`ckptq search` as a user meets it: from a model to a recipe that `quantize` takes."""

from __future__ import annotations

import json
from pathlib import Path

from test_cli import run
from tiny.rows import token_rows, write_rows


def test_a_size_becomes_a_recipe_and_a_checkpoint(llama: Path, tmp_path: Path) -> None:
    recipe, page = tmp_path / "mixed.yaml", tmp_path / "page.html"
    done = run("search", llama, "--bits", "6", "-o", recipe, "--report", page, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert f"ckptq quantize {llama} --recipe {recipe}" in done.stdout
    assert page.read_text().count("<svg") == 1
    assert "fp8-dynamic" in page.read_text()
    assert (tmp_path / "mixed.sensitivities.json").is_file()
    out = tmp_path / "out"
    assert run("quantize", llama, "--recipe", recipe, "-o", out).returncode == 0
    assert run("verify", out, "--source", llama).returncode == 0


def test_kl_within_a_limit(llama: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", token_rows((9, 7), ids=(3, 60)))
    (llama / "tokenizer.json").write_text("{}")
    command = ["search", llama, "--data", rows, "-o", tmp_path / "r.yaml", "--json"]
    command += ["--schemes", "nvfp4a16,fp8-dynamic"]
    done = run(*command, "--bits", "8.5")
    assert done.returncode == 0, done.stderr
    small = json.loads(done.stdout)
    limit = small["uniform"][0]["loss"] / 2
    done = run(*command, "--max-kl", f"{limit:.9f}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["total"]["loss"] <= limit
    assert found["total"]["bits"] < small["total"]["bits"] + 1
    done = run(*command, "--max-kl", "1e-12")
    assert done.returncode == 2
    assert "the closest has 8" in done.stderr


def test_what_is_asked_wrongly_is_refused_before_the_work(llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    for more in (
        [],
        ["--kv-bits", "8"],
        ["--bits", "3"],
        ["--bits", "5", "--size", "1MB"],
        ["--max-kl", "1"],
    ):
        done = run("search", llama, "-o", recipe, *more)
        assert done.returncode == 2, more
    assert run("search", llama, "-o", tmp_path, "--bits", "5").returncode == 2
    assert not recipe.exists()
