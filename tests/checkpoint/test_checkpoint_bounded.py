"""Files that a stranger made: an end is put to them before they put one to the memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_files import INDEX, entry, write_raw, write_sharded

from ckptq.checkpoint import bounded
from ckptq.checkpoint.bounded import count_values
from ckptq.checkpoint.header import MAX_TENSORS, read_header
from ckptq.checkpoint.open import open_checkpoint
from ckptq.errors import SourceError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    import torch

    return write_sharded(tmp_path / "ckpt", [{"a": torch.ones(2)}, {"b": torch.ones(2)}])


def in_place_of(file: Path, what: str) -> None:
    file.unlink()
    if what == "pipe":
        os.mkfifo(file)
    elif what == "device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()


@pytest.mark.parametrize("what", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_what_is_no_file_is_refused_at_once(folder, name, what):
    in_place_of(folder / name, what)
    with pytest.raises(SourceError, match=rf"{name}: is a {what}, expected a file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("what", ["pipe", "device"])
def test_a_shard_that_is_no_file_is_refused_at_once(folder, what):
    shard = next(folder.glob("*.safetensors"))
    in_place_of(shard, what)
    with pytest.raises(SourceError, match=shard.name):
        open_checkpoint(folder)
    with pytest.raises(SourceError, match=f"is a {what}, expected a file"):
        read_header(shard)


def test_a_config_that_is_too_large_is_not_read(folder):
    """A file with a hole takes no disk, and would take all memory."""
    os.truncate(folder / "config.json", 1 << 40)
    with pytest.raises(SourceError, match=r"config.json: 1,099,511,627,776 bytes; .* up to"):
        open_checkpoint(folder)


def test_a_config_of_too_many_values_is_not_parsed(folder):
    (folder / "config.json").write_text(json.dumps({"a": [[]] * 2_000_000}))
    with pytest.raises(SourceError, match=r"config.json: holds 4,\d+,\d+ values"):
        open_checkpoint(folder)


def test_a_config_that_is_large_and_sound_is_read(folder):
    """The twin: 50,000 Linears that are left alone, by name."""
    names = [f"model.layers.{i}.mlp.experts.{i}.down_proj, [{{" for i in range(50_000)]
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"ignore": names}}))
    assert open_checkpoint(folder).quantization_config == {"ignore": names}


def counted(text: str) -> tuple[int, int, int]:
    """The same, a letter at a time."""
    counts, inside, at = dict.fromkeys("[{,", 0), False, 0
    while at < len(text):
        letter = text[at]
        if letter == "\\":
            at += 1
        elif letter == '"':
            inside = not inside
        elif not inside and letter in counts:
            counts[letter] += 1
        at += 1
    return counts["["], counts["{"], counts[","]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1 << 20])
def test_values_are_counted_outside_of_strings_wherever_chunks_end(monkeypatch, size):
    monkeypatch.setattr(bounded, "SMALL", size)
    rng = random.Random(size)
    for _ in range(300):
        text = "".join(rng.choice('"\\[{,a"\\') for _ in range(rng.randrange(40)))
        assert count_values(text.encode()) == counted(text), text


HOSTILE = {
    "keys": lambda: b"{" + b",".join(b'"%d":1' % i for i in range(1_500_000)) + b"}",
    "labels": lambda: (
        b'{"__metadata__":{%b}}' % b",".join(b'"%d":""' % i for i in range(1_500_000))
    ),
    "lists": lambda: b'{"a":[%b]}' % b",".join([b"[]"] * 10_000_000),
    "depth": lambda: b'{"a":' + b"[" * 30_000_000,
    "axes": lambda: (
        json.dumps({"a": entry("U8", [1], 0, 1)})
        .encode()
        .replace(b"[1]", b"[%b]" % b",".join([b"1"] * 15_000_000))
    ),
    "name": lambda: json.dumps({"a" * 30_000_000: entry("U8", [1], 0, 1)}).encode(),
}

READ = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (400_000_000, 400_000_000))
from pathlib import Path
from ckptq.checkpoint.header import read_header
from ckptq.errors import SourceError
try:
    read_header(Path(sys.argv[1]))
except SourceError as error:
    print(error)
"""


@pytest.mark.parametrize("what", HOSTILE)
def test_a_header_of_too_much_of_anything_is_refused_in_little_memory(tmp_path, what):
    """What Python makes of these takes a gigabyte or more; the process has 400 MB."""
    file = write_raw(tmp_path / "m.safetensors", HOSTILE[what](), b"x")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(file)],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(file) in done.stdout
    assert len(done.stdout) < 500


def test_a_header_of_many_tensors_is_read(tmp_path):
    """The twin: as many as no known file has, and names full of what is counted."""
    count = 60_000
    header = {f"[{i}], {{experts}}, ": entry("U8", [1], i, i + 1) for i in range(count)}
    header["__metadata__"] = {"notes": json.dumps([[{}]] * 100_000)}
    file = write_raw(tmp_path / "m.safetensors", header, bytes(count))
    assert len(read_header(file).tensors) == count < MAX_TENSORS
