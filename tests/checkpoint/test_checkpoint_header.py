"""Headers: what the format allows is read, all else is refused with file and tensor named."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from checkpoint_files import entry, write_raw
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ckptq.checkpoint.header import MAX_HEADER, read_header
from ckptq.errors import SourceError
from ckptq.spec import DTYPES, TensorSpec

A, B = entry("U8", [4], 0, 4), entry("BF16", [2, 3], 4, 16)


def refusal(file: Path) -> str:
    with pytest.raises(SourceError) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    return str(caught.value)


def test_names_shapes_and_places_of_the_library_s_own_file(tmp_path):
    tensors = {
        "norm.weight": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 7),
        "scalar": torch.tensor(3.0),
        "w_ä": torch.arange(6, dtype=torch.int8).reshape(2, 3),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    assert header.metadata == {"format": "pt"}
    assert header.nbytes == len(content)
    for name, tensor in tensors.items():
        stored = header.tensors[name]
        data = content[stored.offset : stored.offset + stored.nbytes]
        assert data == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert stored.spec.shape == tuple(tensor.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_known_dtype_has_the_library_s_size(tmp_path, dtype):
    spec = TensorSpec(dtype, (3,))
    file = write_raw(
        tmp_path / "m.safetensors", {"x": entry(dtype, [3], 0, spec.nbytes)}, bytes(spec.nbytes)
    )
    assert read_header(file).tensors["x"].spec == spec
    with safe_open(file, "pt") as library:
        assert str(library.get_slice("x").get_dtype()) == dtype


def test_the_digest_tells_of_any_change_of_the_header(tmp_path):
    one = read_header(write_raw(tmp_path / "1", {"a": A}, bytes(4)))
    same = read_header(write_raw(tmp_path / "2", {"a": A}, b"data"))
    renamed = read_header(write_raw(tmp_path / "3", {"b": A}, bytes(4)))
    assert one.digest == same.digest != renamed.digest


TWICE = b'{"a": %b, "a": %b}' % (json.dumps(A).encode(), json.dumps(A).encode())
DTYPE_TWICE = b'{"a": %b, "dtype": "I8"}}' % json.dumps(A).encode()[:-1]
HALF_A_PAIR = b'{"\\ud800": %b}' % json.dumps(A).encode()

# what is wrong: (header, bytes of data, words that the message must hold)
WRONG = {
    "gap": ({"a": A, "b": entry("U8", [4], 6, 10)}, 10, ["'b'", "gap"]),
    "gap at the start": ({"b": entry("U8", [4], 4, 8)}, 8, ["'b'", "gap"]),
    "overlap": ({"a": A, "b": entry("U8", [4], 2, 6)}, 6, ["'b'", "overlaps"]),
    "the same bytes twice": ({"a": A, "b": A}, 4, ["'b'", "overlaps"]),
    "data cut off": ({"a": A}, 3, ["'a'", "truncated", "ends at byte"]),
    "data left over": ({"a": A}, 5, ["end at byte"]),
    "data of no tensor": ({}, 1, ["end at byte"]),
    "dtype misspelt": ({"a": entry("F8", [4], 0, 4)}, 4, ["'a'", "unknown dtype", "'F8'"]),
    "dtype of half bytes": ({"a": entry("F4", [8], 0, 4)}, 4, ["'a'", "unknown dtype", "'F4'"]),
    "dtype no string": ({"a": {**A, "dtype": 3}}, 4, ["'a'", "unknown dtype"]),
    "shape too large": ({"a": entry("U8", [5], 0, 4)}, 4, ["'a'", "U8 [5] needs 5 bytes", "4"]),
    "shape negative": ({"a": entry("U8", [-4], 0, 4)}, 4, ["'a'", "not a list of sizes"]),
    "shape of floats": ({"a": entry("U8", [4.0], 0, 4)}, 4, ["'a'", "not a list of sizes"]),
    "shape of booleans": ({"a": entry("U8", [True], 0, 1)}, 1, ["'a'", "not a list of sizes"]),
    "shape no list": ({"a": {**A, "shape": 4}}, 4, ["'a'", "not a list of sizes"]),
    "shape overflows": ({"a": entry("U8", [1 << 62] * 64, 0, 4)}, 4, ["'a'", "more than 2**64"]),
    "too many axes": ({"a": entry("U8", [1] * 65, 0, 1)}, 1, ["'a'", "65 axes"]),
    "name too long": ({"a" * 4097: A}, 4, ["4,097 characters", "'aaa"]),
    "name that moves the cursor": ({"a\x1b[2J": A}, 4, [r"'a\x1b[2J'", "unprintable characters"]),
    "name of two lines": ({"a\nerror: b": A}, 4, [r"'a\nerror: b'", "unprintable characters"]),
    "name that turns the line around": (
        {"a\u202eb": A},
        4,
        [r"'a\u202eb'", "unprintable characters"],
    ),
    "range backwards": ({"a": entry("U8", [4], 4, 0)}, 4, ["'a'", "not a range"]),
    "range of three": ({"a": {**A, "data_offsets": [0, 4, 8]}}, 4, ["'a'", "not a range"]),
    "range negative": ({"a": {**A, "data_offsets": [-4, 0]}}, 4, ["'a'", "not a range"]),
    "no range": ({"a": {"dtype": "U8", "shape": [4]}}, 4, ["'a'", "data_offsets"]),
    "no object": ({"a": [1, 2]}, 4, ["'a'", "data_offsets"]),
    "metadata of numbers": ({"a": A, "__metadata__": {"format": 1}}, 4, ["__metadata__"]),
    "metadata no object": ({"a": A, "__metadata__": "pt"}, 4, ["__metadata__"]),
    "header a list": ([], 0, ["JSON list"]),
    "header too deep": (b"[" * 100_000, 0, ["not valid JSON"]),
    "header cut off": (b'{"a": 1', 0, ["not valid JSON"]),
    "header not UTF-8": (b"\xff\xfe{}", 0, ["not valid JSON"]),
    "header in UTF-16": ('{"a": {}}'.encode("utf-16"), 0, ["not valid JSON"]),
    "number too long": (b'{"a": ' + b"9" * 10_000 + b"}", 0, ["not valid JSON"]),
    "name twice": (TWICE, 4, ["'a' appears twice"]),
    "dtype twice": (DTYPE_TWICE, 4, ["'dtype' appears twice"]),
    "name no text": (HALF_A_PAIR, 4, ["not valid JSON", "surrogates"]),
}


def test_metadata_of_null_is_none_as_for_the_library(tmp_path):
    file = write_raw(tmp_path / "m.safetensors", {"a": A, "__metadata__": None}, bytes(4))
    with safe_open(file, "pt") as library:
        assert not library.metadata()
    assert read_header(file).metadata == {}


@pytest.mark.parametrize("what", WRONG)
def test_a_header_that_is_wrong_is_refused_by_name(tmp_path, what):
    header, size, wanted = WRONG[what]
    message = refusal(write_raw(tmp_path / "m.safetensors", header, bytes(size)))
    for words in wanted:
        assert words in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "0 bytes"),
        (b"\x08\0\0\0", "4 bytes"),
        ((9).to_bytes(8, "little") + b"{}", "the header claims 9 bytes, the file has 10"),
        ((MAX_HEADER + 1).to_bytes(8, "little"), f"limit of {MAX_HEADER}"),
        (b"\x80\x02ctorch\nPK", f"limit of {MAX_HEADER}"),
        (b"version https://git-lfs.github.com/spec/v1\n", f"limit of {MAX_HEADER}"),
    ],
    ids=[
        "empty",
        "cut in the length",
        "cut in the header",
        "too long",
        "a pickle",
        "an LFS pointer",
    ],
)
def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path, content, wanted):
    file = tmp_path / "m.safetensors"
    file.write_bytes(content)
    assert wanted in refusal(file)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.safetensors")
    assert "is a folder, expected a file" in refusal(tmp_path)


def test_whatever_is_accepted_of_a_damaged_file_the_library_accepts_too(tmp_path):
    """Bytes of header and length are changed at random; nothing but SourceError may come out."""
    file = tmp_path / "m.safetensors"
    whole = write_raw(file, {"a": A, "b": B, "__metadata__": {"format": "pt"}}, bytes(16))
    content = whole.read_bytes()
    rng = random.Random(0)
    accepted = refused = 0
    for _ in range(2000):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 4))):
            damaged[rng.randrange(len(content) - 16)] = rng.choice(
                (rng.randrange(256), *b'0123456789"[]{},:')
            )
        with file.open("r+b") as handle:  # in place: to truncate and write anew waits for the disk
            handle.write(damaged)
        try:
            header = read_header(file)
        except SourceError:
            refused += 1
            continue
        accepted += 1
        try:
            with safe_open(file, "pt") as library:
                assert set(library.keys()) == set(header.tensors)
        except SafetensorError as error:
            pytest.fail(f"accepted {bytes(damaged)!r}, which the library refuses: {error}")
    assert accepted > 50, "the damage should not always be fatal"
    assert refused > 500, "the damage should often be fatal"
