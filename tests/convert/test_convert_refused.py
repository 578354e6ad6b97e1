"""What the machine or the source does not allow: named, with nothing lost and nothing half done."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from convert_cases import LAYOUTS, convert, recipe_of, save
from convert_killed import digests

from ckptq.calibrate.request import ScalesSource
from ckptq.checkpoint import journal
from ckptq.checkpoint.open import open_checkpoint
from ckptq.checkpoint.partial import partial_of
from ckptq.convert import output, preflight
from ckptq.convert.slabs import held_bytes
from ckptq.errors import MachineError, SourceError, UsageError
from ckptq.plan.make import make_plan

Usage = namedtuple("Usage", "total used free")

FP8 = recipe_of("fp8 channel")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save(tmp_path / "source", LAYOUTS["llama4"]())


def plan_of(source: Path):
    return make_plan(open_checkpoint(source), FP8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", ["llama", "llama4"])
def test_a_value_that_is_no_number_is_named_with_tensor_and_file(tmp_path, layout, value):
    torch.manual_seed(0)
    made = LAYOUTS[layout]()
    name = {
        "llama": "model.layers.1.mlp.up_proj.weight",
        "llama4": "model.layers.1.feed_forward.experts.gate_up_proj",
    }[layout]
    made.tensors[name].view(-1)[-7] = value
    source = save(tmp_path / "source", made)
    for format in ("fp8 channel", "fp8 tensor"):
        with pytest.raises(SourceError) as caught:
            convert(source, tmp_path / "out", recipe_of(format), restart=True)
        assert f"tensor {name!r}" in str(caught.value)
        assert str(open_checkpoint(source).tensors[name].file) in str(caught.value)
        assert not (tmp_path / "out").exists()
    if layout == "llama4":
        assert "experts.3.up_proj" in str(caught.value), "and the Linear it is cut out for"


def test_a_value_that_is_no_number_may_be_copied(tmp_path):
    """Only a weight that gets a scale has to be finite: a mask of -inf is data."""
    torch.manual_seed(0)
    made = LAYOUTS["llama"]()
    made.tensors["model.mask"] = torch.full((3, 3), float("-inf"))
    convert(save(tmp_path / "source", made), tmp_path / "out", FP8)


def test_too_little_disk_is_said_before_the_first_byte(source, tmp_path, monkeypatch):
    plan = plan_of(source)
    (source / "notes.bin").write_bytes(bytes(1_000_000))
    beside = open_checkpoint(source).side_bytes()
    assert beside > 1_000_000
    needed = plan.write_bytes + beside + preflight.SPARE_BYTES
    for free, enough in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(0, 0, free))
        if enough:
            preflight.check_disk(plan.write_bytes, tmp_path / "out", beside)
            continue
        with pytest.raises(MachineError) as caught:
            convert(source, tmp_path / "out", FP8)
        assert f"needs {needed:,} bytes, {free:,} are free" in str(caught.value)
        assert sorted(os.listdir(tmp_path)) == ["source"]


def test_what_an_interrupted_run_has_written_needs_no_room_again(source, tmp_path, monkeypatch):
    plan = plan_of(source)
    scratch = partial_of(tmp_path / "out") / "checkpoint"
    scratch.mkdir(parents=True)
    (scratch / "m.safetensors").write_bytes(bytes(100_000))
    needed = plan.write_bytes + preflight.SPARE_BYTES - 100_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed))
    preflight.check_disk(plan.write_bytes, tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_named(source, monkeypatch):
    for out in ("/proc/none/out", "/proc/out"):
        with pytest.raises(MachineError, match="/proc: nothing can be written here"):
            convert(source, Path(out), FP8)
    for out in ("", "/"):
        with pytest.raises(UsageError, match=r"is no name for an output; name a new folder"):
            convert(source, Path(out), FP8)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(MachineError, match="no permission to write here"):
        convert(source, source.parent / "out", FP8)


def test_an_output_behind_a_file_is_refused(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file: is a file; expected a folder to write x in"):
        convert(source, tmp_path / "file" / "x", FP8)


@pytest.mark.parametrize("place", ["out", "deeper/out", "../link/out"])
def test_an_output_inside_the_source_is_refused(source, place):
    """Its journal and shards would be side files of the source, and copied into it."""
    (source.parent / "link").symlink_to(source)
    before = digests(source)
    with pytest.raises(UsageError, match=r"out: lies inside the source .*source; choose"):
        convert(source, source / place, FP8)
    assert digests(source) == before
    convert(source, source.parent / "source-fp8", FP8)


def test_an_output_that_exists_is_refused_whatever_the_disk(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "out", FP8)
    before = digests(tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    for restart in (False, True):
        with pytest.raises(UsageError, match="already exists"):
            convert(source, tmp_path / "out", FP8, restart=restart)
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_in_the_middle_loses_nothing(source, tmp_path, monkeypatch, number):
    convert(source, tmp_path / "whole", FP8)
    calls, pwrite = 0, os.pwrite

    def full(*args):
        nonlocal calls
        calls += 1
        if calls > 30:
            raise OSError(number, os.strerror(number))
        return pwrite(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        patched.setattr(output, "COMMIT_BYTES", 10_000)
        with pytest.raises(MachineError, match="free some space and rerun the same command"):
            convert(source, tmp_path / "out", FP8)
    assert calls > 30
    assert not (tmp_path / "out").exists()
    result = convert(source, tmp_path / "out", FP8)
    assert result.resumed_units > 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of its own, of 256 kB at first."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(source, tmp_path, small_disk, monkeypatch):
    convert(source, tmp_path / "whole", FP8)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 1 << 40))
        patched.setattr(output, "COMMIT_BYTES", 10_000)
        with pytest.raises(MachineError, match="No space left"):
            convert(source, small_disk / "out", FP8)
    with pytest.raises(MachineError, match="not enough disk space"):
        convert(source, small_disk / "out", FP8)
    subprocess.run(["mount", "-o", "remount,size=80m", str(small_disk)], check=True)
    assert convert(source, small_disk / "out", FP8).resumed_units > 0
    assert digests(small_disk / "out") == digests(tmp_path / "whole")


def test_a_source_that_changed_since_is_refused_and_named(source, tmp_path, monkeypatch):
    file = source / "model-00001-of-00002.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(journal, "rename_new", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(source, tmp_path / "out", FP8)
    with pytest.raises(UsageError, match="recipe was"):
        convert(source, tmp_path / "out", recipe_of("int4 group"))
    with pytest.raises(UsageError, match=r"arguments.ignore was \[\], is \[.*down"):
        convert(source, tmp_path / "out", FP8, ignore=("re:.*down.*",))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    with pytest.raises(UsageError, match=rf"modified.{file.name} was .*--restart"):
        convert(source, tmp_path / "out", FP8)
    convert(source, tmp_path / "out", FP8, restart=True)


def test_a_ceiling_on_memory_is_refused_or_respected(source):
    plan = plan_of(source)
    room = max(map(held_bytes, plan.units))
    program = preflight.BASE_BYTES + 2 * preflight.WORKER_BYTES
    with pytest.raises(UsageError) as caught:
        preflight.slab_rooms(plan.units, program + room - 1, workers=2)
    assert "--max-ram" in str(caught.value)
    assert f"{room:,}" in str(caught.value)
    assert preflight.slab_rooms(plan.units, program + room, workers=2) == (room, 1)
    assert preflight.slab_rooms(plan.units, program + 5 * room, workers=2) == (room, 5)
    assert preflight.slab_rooms(plan.units, None, workers=2)[1] > 5


def test_large_experts_get_two_rooms(source, monkeypatch):
    plan = plan_of(source)
    room = max(map(held_bytes, plan.units))
    monkeypatch.setattr(preflight, "SMALL_ROOMS", room // 2)
    assert preflight.slab_rooms(plan.units, None, workers=8) == (room, 2)


def test_a_machine_that_is_too_small_is_named(source, monkeypatch):
    monkeypatch.setattr(preflight, "available_ram", lambda: 500_000_000)
    with pytest.raises(MachineError, match=r"not enough memory.*500,000,000 are available"):
        convert(source, source.parent / "out", FP8)


def test_a_layer_that_is_too_large_to_calibrate_is_named(source, monkeypatch):
    scales = ScalesSource(arguments={}, load=lambda folder: 1 / 0, runs_model=True)
    preflight.check_layers(open_checkpoint(source), plan_of(source), "cpu")
    monkeypatch.setattr(preflight, "_free_on", lambda device: ("cuda:0", 400_000))
    with pytest.raises(MachineError, match=r"cuda:0: .* model.layers.0 has 590,\d+ bytes, 400,000"):
        convert(source, source.parent / "out", FP8, scales=scales)
    assert not partial_of(source.parent / "out").exists()


def test_memory_is_what_machine_and_control_group_leave(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:      50 kB\nCached: 3 kB\n")
    assert preflight._machine_ram(meminfo) == 50 * 1024
    assert preflight._machine_ram(tmp_path / "none") is None
    assert preflight._group_ram(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\nactive_file 100\ninactive_file 200\n")
    assert preflight._group_ram(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert preflight._group_ram(tmp_path) == 1000 - 700 + 300


def test_unit_that_streams_needs_no_room(tmp_path):
    torch.manual_seed(0)
    source = save(tmp_path / "source", LAYOUTS["llama"]())
    assert preflight.slab_rooms(plan_of(source).units, None, workers=2) == (0, 0)
