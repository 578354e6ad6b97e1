"""`ckptq quantize` as a process: signals, exit codes, progress, two runs at once."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_cases import LAYOUTS, save
from convert_killed import digests
from safetensors.torch import save_file
from tiny.forked import SECONDS, Command

from ckptq.checkpoint.partial import partial_of


def quantize(source: Path, out: Path, *more: str, **how: Any) -> Command:
    return Command("quantize", source, "-o", out, *more, **how)


def wait_for(path: Path, process: Command) -> None:
    """Until the run has begun to write."""
    end = time.monotonic() + SECONDS
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    """160 MB of layers: packed with zero points by one worker, seconds of work."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 10}')
    w_RC = torch.randn(2048, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    layers = {f"model.layers.{i}.mlp.down_proj.weight": w_RC * (i + 1) for i in range(10)}
    save_file(layers, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


SLOW = ("--scheme", "w4a16-asym", "--workers", "1")


@pytest.fixture(scope="module")
def whole(slow, tmp_path_factory) -> dict[str, str]:
    """What a run that nothing stops makes of it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    process = quantize(slow, out, *SLOW)
    _, said = process.communicate()
    assert process.returncode == 0, said
    return digests(out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_says_how_it_goes_on_and_does(slow, whole, tmp_path, number):
    out = tmp_path / "out"
    first = quantize(slow, out, *SLOW)
    wait_for(partial_of(out) / "journal.jsonl", first)
    first.send_signal(number)
    printed, said = first.communicate()
    assert first.returncode == 130, said
    assert printed == ""
    assert "rerun the same command to resume" in said
    assert "Traceback" not in said
    assert not out.exists()
    last = quantize(slow, out, *SLOW)
    _, said = last.communicate()
    assert last.returncode == 0, said
    assert digests(out) == whole


def test_a_second_run_is_refused_while_the_first_one_writes(slow, tmp_path):
    partial = partial_of(tmp_path / "out")
    partial.mkdir()
    with (partial / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = quantize(slow, tmp_path / "out", *SLOW)
        _, said = second.communicate()
    assert second.returncode == 2
    assert f"{partial}: another run is writing this output" in said
    assert os.listdir(partial) == ["lock"]


def test_progress_is_lines_where_stderr_is_no_terminal(slow, tmp_path):
    process = quantize(slow, tmp_path / "out", "--scheme", "fp8-dynamic")
    printed, said = process.communicate()
    assert process.returncode == 0
    assert re.search(
        r"^quantize: 167\.8 MB of 167\.8 MB, [\d.]+ [MG]B/s, 0 s left \(.*down_proj\)$", said, re.M
    )
    assert "\r" not in said
    assert "\x1b" not in said + printed


def test_a_weight_that_is_no_number_ends_in_exit_code_3(tmp_path):
    torch.manual_seed(0)
    made = LAYOUTS["llama"]()
    made.tensors["model.layers.0.mlp.gate_proj.weight"][5, 5] = float("nan")
    source = save(tmp_path / "source", made)
    process = quantize(source, tmp_path / "out", "--scheme", "fp8-dynamic")
    printed, said = process.communicate()
    assert process.returncode == 3
    assert printed == ""
    assert "error: " in said
    assert "'model.layers.0.mlp.gate_proj.weight'" in said
    assert "model-0000" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def allow_little() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def test_too_little_disk_ends_in_exit_code_4(slow, tmp_path):
    """By the limit on file sizes, which stands for a disk without asking for one."""
    process = quantize(slow, tmp_path / "out", *SLOW, first=allow_little)
    _, said = process.communicate()
    assert process.returncode == 4
    assert "error: " in said
    assert "model.safetensors: File too large" in said
    assert "Traceback" not in said
    assert sorted(os.listdir(tmp_path)) == ["out.partial"]
