"""`ckptq calibrate`: killed, it goes on and ends with the same file; it leaves no litter."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from calibrate_models import LAYERS
from tiny.forked import Command, ckptq
from tiny.rows import token_rows, write_rows
from tiny.torchrun import environments
from typer.testing import CliRunner

from ckptq import files
from ckptq.calibrate import journal, to_file
from ckptq.calibrate.scales import RECORD_KEY
from ckptq.checkpoint.header import read_header
from ckptq.checkpoint.partial import claim, partial_of
from ckptq.cli import app
from ckptq.forward.layerwise import LayerwiseModel


def die_at_the_third_layer() -> None:
    """Of ranks, the second."""
    journal.SHARE_OF_TIME = float("inf")
    run_layer, rank = LayerwiseModel.run_layer, int(os.environ.get("RANK", "1"))

    def dying(self: LayerwiseModel, index: int, *args: Any) -> None:
        if index == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        run_layer(self, index, *args)

    LayerwiseModel.run_layer = dying  # type: ignore[method-assign]


@pytest.fixture
def command(saved, tmp_path) -> list[str]:
    """All but the output."""
    text = tmp_path / "rows.jsonl"
    rows = token_rows([24, 17, 9, 24, 24])
    write_rows(text, rows)
    command = ["calibrate", str(saved("llama").path), "--data", str(text), "--batch-size", "2"]
    return [*command, "--device", "cpu", "-o"]


@pytest.fixture(autouse=True)
def every_layer(monkeypatch) -> None:
    """The state is kept after every layer, however long that takes."""
    monkeypatch.setattr(journal, "SHARE_OF_TIME", float("inf"))


def run(command: list[str], output: Path, *options: str):
    return CliRunner().invoke(app, [*command, str(output), *options])


def killed(command: list[str], output: Path) -> int:
    return ckptq(*command, output, first=die_at_the_third_layer).returncode


def test_killed_it_goes_on(command, tmp_path, run_layers):
    assert run(command, tmp_path / "whole").exit_code == 0
    out = tmp_path / "scales"
    assert killed(command, out) == -signal.SIGKILL
    assert not out.exists()
    run_layers.clear()
    done = run(command, out)
    assert done.exit_code == 0, done.output
    assert run_layers == list(range(2, LAYERS))
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "scales.partial").exists()


def test_a_single_process_goes_on_where_ranks_were_killed(command, tmp_path, run_layers):
    """Their state is one: the batches that each had run, and what all had seen."""
    assert run(command, tmp_path / "whole").exit_code == 0
    out = tmp_path / "scales"
    how = [{"first": die_at_the_third_layer, "environment": each} for each in environments(2)]
    every = [Command(*command, out, **each) for each in how]
    for each in every:
        each.communicate()
    assert every[0].returncode not in (0, None)
    assert every[1].returncode == -signal.SIGKILL
    kept = [path.name for path in (tmp_path / "scales.partial").rglob("layer-?????")]
    assert kept == ["layer-00002"]
    run_layers.clear()
    done = run(command, out)
    assert done.exit_code == 0, done.output
    assert run_layers == list(range(2, LAYERS))
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "scales.partial").exists()


def test_another_command_is_refused_and_restart_begins_anew(command, tmp_path, run_layers):
    assert run(command, tmp_path / "whole").exit_code == 0
    out = tmp_path / "scales"
    assert killed([*command[:-1], "--batch-size", "1", "-o"], out) < 0
    refused = run(command, out)
    assert refused.exit_code != 0
    assert "batch_size was 1, is 2" in str(refused.exception)
    run_layers.clear()
    assert run(command, out, "--restart").exit_code == 0
    assert run_layers == list(range(LAYERS))
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def test_two_runs_on_one_file(command, tmp_path):
    held = claim(tmp_path / "scales.partial")
    refused = run(command, tmp_path / "scales")
    os.close(held)
    assert refused.exit_code != 0
    assert "another run is writing" in str(refused.exception)


def test_a_file_that_is_no_scales_file_is_not_replaced(command, tmp_path):
    out = tmp_path / "thesis.txt"
    out.write_text("mine")
    refused = run(command, out)
    assert "exists and is not a scales file" in str(refused.exception)
    assert out.read_text() == "mine"
    assert run(command, tmp_path / "scales").exit_code == 0
    assert run(command, tmp_path / "scales").exit_code == 0, "a scales file is replaced"


@pytest.mark.parametrize("when", ["before it is written", "just before the rename"])
def test_a_file_that_appears_meanwhile_is_not_replaced(command, tmp_path, monkeypatch, when):
    """What is done stays done: the same command ends at once when the name is free again."""
    out = tmp_path / "thesis.txt"
    module, name = {
        "before it is written": (to_file, "save_scales"),
        "just before the rename": (files, "_write_new"),
    }[when]
    real = getattr(module, name)

    def appears(path: Path, *rest, **options):
        if path == out or path.parent == partial_of(out):
            out.write_text("mine")
        return real(path, *rest, **options)

    monkeypatch.setattr(module, name, appears)
    refused = run(command, out)
    assert f"{out}: " in str(refused.exception)
    assert "xists" in str(refused.exception)
    assert out.read_text() == "mine"
    monkeypatch.undo()
    out.rename(tmp_path / "moved")
    assert run(command, out).exit_code == 0
    assert RECORD_KEY in read_header(out).metadata


def test_a_folder_that_no_run_has_made_is_left_alone(command, tmp_path):
    thesis = tmp_path / "scales.partial" / "calibration" / "a.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("mine")
    for options in ((), ("--restart",)):
        refused = run(command, tmp_path / "scales", *options)
        assert "not made by ckptq" in str(refused.exception)
    assert thesis.read_text() == "mine"


def test_a_command_that_could_not_begin_leaves_nothing(command, tmp_path):
    before = sorted(tmp_path.iterdir())
    command[command.index("--data") + 1] = str(tmp_path / "none.jsonl")
    assert run(command, tmp_path / "scales").exit_code != 0
    assert sorted(tmp_path.iterdir()) == before


def test_anybody_may_read_the_file(command, tmp_path):
    """As the process's umask lets them."""
    (tmp_path / "like").touch()
    assert run(command, tmp_path / "scales").exit_code == 0
    assert (tmp_path / "scales").stat().st_mode == (tmp_path / "like").stat().st_mode
