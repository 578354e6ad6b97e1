"""`ckptq search` as a user meets it: from a model to a recipe that `quantize` takes."""

from __future__ import annotations

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


def test_what_holds_when_it_is_run(llama: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", token_rows((9, 7), ids=(3, 60)))
    (llama / "tokenizer.json").write_text("{}")
    recipe = tmp_path / "r.yaml"
    command = ["search", llama, "--data", rows, "-o", recipe, "--schemes", "nvfp4a16,fp8-dynamic"]
    done = run(*command, "--max-kl", "0.5")
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines() if "accuracy" in line] == [
        ["measured", "bits", "loss", "KL", "accuracy"]
    ]
    recipe.unlink()
    done = run(*command, "--max-kl", "1e-12")
    assert done.returncode == 1
    assert "no plan holds --max-kl 1e-12" in done.stderr
    assert not recipe.exists()
    done = run(*command, "--min-accuracy", "0.9")
    assert done.returncode == 2
    assert "--task FILE" in done.stderr


def test_a_file_of_another_kind_is_not_overwritten(llama: Path, tmp_path: Path) -> None:
    """A recipe of an earlier search is; a hand-written one, or the model itself, stays."""
    recipe = tmp_path / "mixed.yaml"
    command = ("search", llama, "--bits", "6", "--device", "cpu")
    for _ in range(2):
        done = run(*command, "-o", recipe)
        assert done.returncode == 0, done.stderr
    recipe.write_text(own := recipe.read_text().partition("\n")[2])
    config = llama / "config.json"
    for output, more, said in (
        (recipe, [], "no recipe of"),
        (config, [], "no recipe of"),
        (tmp_path / "new.json", ["--sensitivities", tmp_path / "new.json"], "is the --output"),
        (tmp_path / "new.html", ["--report", tmp_path / "new.html"], "writes another file"),
    ):
        done = run(*command, "-o", output, *more)
        assert done.returncode == 2, output
        assert said in done.stderr
    assert recipe.read_text() == own
    assert config.read_text().startswith("{")
    assert not list(tmp_path.glob("new.*"))


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
