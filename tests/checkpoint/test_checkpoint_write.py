"""Writing: what the safetensors library reads back, in whatever order and from wherever it came."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_files import INDEX
from safetensors import safe_open
from safetensors.torch import load_file, save
from tiny.tensors import differences
from torch import Tensor

import ckptq.checkpoint.write as module
from ckptq.checkpoint.header import StoredTensor, read_header
from ckptq.checkpoint.read import bytes_of
from ckptq.checkpoint.write import Shards, copy_bytes, lay_out, write_index
from ckptq.errors import MachineError, SourceError
from ckptq.files import write_whole
from ckptq.spec import TensorSpec, spec_of

PT = {"format": "pt"}


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Sizes that would misalign one another if they lay in this order."""
    torch.manual_seed(0)
    return {
        "codes": torch.randint(-100, 100, (3, 5), dtype=torch.int8),
        "fp8": torch.randn(7).to(torch.float8_e4m3fn),
        "scale": torch.randn(3, 1).bfloat16(),
        "shape": torch.tensor([3, 5]),
        "gewicht_ä": torch.randn(2, 2),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }


def specs(tensors: dict[str, Tensor]) -> dict:
    return {name: spec_of(tensor) for name, tensor in tensors.items()}


def pieces(tensors: dict[str, Tensor], size: int) -> list[tuple[str, int, memoryview]]:
    """The bytes of all tensors in small pieces, shuffled."""
    found = [
        (name, start, bytes_of(tensor)[start : start + size])
        for name, tensor in tensors.items()
        for start in range(0, tensor.nbytes, size)
    ]
    random.Random(0).shuffle(found)
    return found


def test_the_library_reads_what_arrived_in_pieces_from_many_threads(tmp_path, tensors):
    shards = Shards(tmp_path, {"m.safetensors": specs(tensors)}, PT)
    todo = pieces(tensors, 3)
    threads = [
        threading.Thread(target=lambda part=todo[i::4]: [shards.write(*piece) for piece in part])
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shards.check_complete(tensors)
    shards.sync(["m.safetensors"])
    shards.close()
    assert differences(load_file(tmp_path / "m.safetensors"), tensors) == []
    with safe_open(tmp_path / "m.safetensors", "pt") as library:
        assert library.metadata() == PT
    assert read_header(tmp_path / "m.safetensors").tensors.keys() == tensors.keys()


def test_every_tensor_is_aligned_to_its_elements(tensors):
    head, starts = lay_out(specs(tensors), PT)
    assert len(head) % 8 == 0
    assert all(starts[name] % tensor.element_size() == 0 for name, tensor in tensors.items())
    at = [starts[name] for name in json.loads(head[8:]) if name != "__metadata__"]
    assert at == sorted(at)


def test_the_bytes_are_those_that_the_library_writes(tmp_path, tensors):
    """Not only readable: the very file, where the library would choose the same order."""
    tensors = {"b": tensors["gewicht_ä"], "c": tensors["scale"], "d": tensors["codes"]}
    shards = Shards(tmp_path, {"m": specs(tensors)}, PT)
    for name, tensor in tensors.items():
        shards.write(name, 0, bytes_of(tensor))
    shards.close()
    assert (tmp_path / "m").read_bytes() == save(tensors, PT)


def test_more_or_less_than_was_promised_is_noticed(tmp_path, tensors):
    shards = Shards(tmp_path, {"m": specs(tensors)}, PT)
    with pytest.raises(AssertionError, match="beyond"):
        shards.write("codes", 1, bytes_of(tensors["codes"]))
    with pytest.raises(KeyError):
        shards.write("unknown", 0, memoryview(b""))
    shards.write("codes", 0, bytes_of(tensors["codes"])[:-1])
    with pytest.raises(AssertionError, match="14 of 15 bytes"):
        shards.check_complete(["codes"])
    shards.write("codes", 13, bytes_of(tensors["codes"])[13:])
    with pytest.raises(AssertionError, match="16 of 15 bytes"):
        shards.check_complete(["codes"])
    shards.close()


def test_a_run_that_goes_on_keeps_what_is_there(tmp_path, tensors):
    names = list(tensors)
    for part in (names[:3], names[3:]):
        shards = Shards(tmp_path, {"m": specs(tensors)}, PT)
        for name in part:
            shards.write(name, 0, bytes_of(tensors[name]))
        shards.close()
    assert differences(load_file(tmp_path / "m"), tensors) == []


@pytest.mark.parametrize(
    "refusal", [None, errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EIO]
)
def test_a_range_is_copied_inside_the_kernel_or_through_memory(tmp_path, monkeypatch, refusal):
    data = random.Random(0).randbytes(100_000)
    (tmp_path / "source").write_bytes(data)

    def refuse(*_: object) -> int:
        raise OSError(refusal, "refused")

    if refusal is not None:
        monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(module, "COPY_CHUNK", 1000)
    source = os.open(tmp_path / "source", os.O_RDONLY)
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    copy_bytes(stored(tmp_path / "source", 99_000, 10), source, 0, target, 5, 99_000)
    os.close(source)
    os.close(target)
    assert (tmp_path / "target").read_bytes() == bytes(5) + data[10:99_010]


def stored(file: Path, count: int, offset: int = 0) -> StoredTensor:
    return StoredTensor("x", TensorSpec("U8", (count,)), file, offset)


def test_a_source_that_ends_early_is_no_success(tmp_path):
    (tmp_path / "source").write_bytes(b"1234")
    source = os.open(tmp_path / "source", os.O_RDONLY)
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    with pytest.raises(SourceError, match="tensor 'x': the file ends at byte 4, expected 5"):
        copy_bytes(stored(tmp_path / "source", 5), source, 0, target, 0, 5)
    os.close(source)
    os.close(target)


def test_the_index_names_every_tensor_and_a_single_file_needs_none(tmp_path, tensors):
    found = specs(tensors)
    write_index(tmp_path, {"model.safetensors": found})
    assert not (tmp_path / INDEX).exists()
    write_index(tmp_path, {"one": {"b": found["codes"]}, "two": {"a": found["shape"]}})
    index = json.loads((tmp_path / INDEX).read_text())
    assert index == {"metadata": {"total_size": 15 + 16}, "weight_map": {"a": "two", "b": "one"}}


def test_what_the_system_refuses_names_the_file(tmp_path, tensors):
    with pytest.raises(MachineError, match=r"none/m: No such file"):
        Shards(tmp_path / "none", {"m": specs(tensors)}, PT)
    Path(tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match=r"file/config.json"):
        write_whole(tmp_path / "file" / "config.json", b"{}")
