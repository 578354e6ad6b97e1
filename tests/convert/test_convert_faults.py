"""A machine that fails is named with the file that failed; the same command goes on afterwards."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from convert_cases import LAYOUTS, save, weights
from convert_killed import digests
from faulty import Fault, ckptq
from safetensors.torch import save_file

from ckptq.checkpoint.partial import partial_of

SOURCE, OUT = "source/model-00001", "out.partial/checkpoint/model"
WRITING = "ckptq-unfinished"

FAULTS: dict[str, tuple[tuple[Fault, ...], str]] = {
    "reading a source": ((("preadv", SOURCE, errno.EIO, 3),), SOURCE),
    "reading a header": ((("pread", SOURCE, errno.EIO, 0),), SOURCE),
    "reading the config": ((("pread", "source/config.json", errno.EIO, 0),), "source/config.json"),
    "reading a side file": ((("pread", "source/tok", errno.EIO, 0),), "source/tokenizer.json"),
    "copying, the source": (
        (("copy_file_range", SOURCE, errno.EIO, 0), ("preadv", SOURCE, errno.EIO, 0)),
        SOURCE,
    ),
    "copying, the output": (
        (("copy_file_range", OUT, errno.EIO, 0), ("pwrite", OUT, errno.EIO, 2)),
        OUT,
    ),
    "copying to a full disk": ((("copy_file_range", OUT, errno.ENOSPC, 1),), OUT),
    "writing": ((("pwrite", OUT, errno.EIO, 9),), OUT),
    "writing to a full disk": ((("pwrite", OUT, errno.ENOSPC, 9),), OUT),
    "syncing": ((("fsync", OUT, errno.EIO, 0),), OUT),
    "syncing the journal": ((("fsync", "journal.jsonl", errno.EIO, 1),), "journal.jsonl"),
    "a full disk, the journal": ((("write", "journal.jsonl", errno.ENOSPC, 1),), "journal.jsonl"),
    "syncing a document": (
        (("fsync", WRITING, errno.EIO, 1),),
        "checkpoint/recipe.yaml",
    ),
    "a full disk, a document": ((("write", WRITING, errno.ENOSPC, 0),), "config.json"),
    "renaming a document": ((("replace", "README.md", errno.EIO, 0),), "README.md"),
    "syncing a folder": ((("fsync", "partial/checkpoint$", errno.EIO, 5),), "partial/checkpoint"),
    "opening a source": ((("open", SOURCE, errno.ENFILE, 1),), SOURCE),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = save(tmp_path_factory.mktemp("faults") / "source", LAYOUTS["llama4"]())
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


@pytest.fixture(scope="module")
def whole(source) -> dict[str, str]:
    out = source.with_name("whole")
    done = ckptq("quantize", source, "--scheme", "fp8-dynamic", "-o", out)
    assert done.returncode == 0, done.stderr
    return digests(out)


@pytest.mark.parametrize("what", FAULTS)
def test_the_file_that_failed_is_named_and_the_same_command_goes_on(source, whole, what, tmp_path):
    faults, named = FAULTS[what]
    command = ("quantize", source, "--scheme", "fp8-dynamic", "-o", tmp_path / "out")
    failed = ckptq(*command, faults=faults)
    assert failed.returncode == 4, failed.stderr
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert named in last.split(": ")[1]
    assert ("free some space" in last) == any(fault[2] == errno.ENOSPC for fault in faults)
    assert not (tmp_path / "out").exists()
    done = ckptq(*command)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == whole
    assert not partial_of(tmp_path / "out").exists()


def test_the_kernel_s_copy_may_fail_where_copying_by_hand_works(source, whole, tmp_path):
    faults = (("copy_file_range", "model", errno.EIO, 0),)
    done = ckptq(
        "quantize", source, "--scheme", "fp8-dynamic", "-o", tmp_path / "out", faults=faults
    )
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == whole


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory) -> Path:
    """A Llama of which every tensor has a file of its own: 43 files."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("many") / "source"
    made = LAYOUTS["llama"]()
    tensors = {**made.tensors, **{f"extra.{i}": weights(2, 2) for i in range(24)}}
    folder.mkdir()
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        weight_map[name] = f"model-{number:05d}-of-{len(tensors):05d}.safetensors"
        save_file({name: tensor}, folder / weight_map[name], metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(made.config))
    return folder


def test_more_shards_than_descriptors(many_shards, tmp_path):
    """Sources and, with shards of a tensor each, outputs."""
    assert len(os.listdir(many_shards)) > 43
    command = ("quantize", many_shards, "--scheme", "fp8-dynamic", "--shard-size", "1kB", "-o")
    for name, limit in (("whole", 1024), ("out", 24)):
        done = ckptq(*command, tmp_path / name, descriptors=limit)
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 20
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    verified = ckptq("verify", tmp_path / "out", "--source", many_shards, descriptors=24)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    shutil.rmtree(tmp_path / "out")
