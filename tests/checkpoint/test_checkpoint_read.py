"""Reading: whole tensors, rows, and windows on fused tensors, against torch's own indexing."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from safetensors.torch import save_file
from tiny.tensors import raw

from ckptq.checkpoint.header import read_header
from ckptq.checkpoint.read import Files, Memory, bytes_of, read_range, read_tensor, read_tensors
from ckptq.checkpoint.view import View, read_rows, read_slab, window
from ckptq.errors import SourceError

DTYPES = (torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn, torch.bool)


@pytest.fixture
def stored(tmp_path):
    """Stored tensors, and the same in memory."""
    torch.manual_seed(0)
    tensors = {str(d): (torch.randn(5, 7) * 4).to(d) for d in DTYPES}
    tensors |= {"3d": torch.randn(3, 8, 6).bfloat16(), "bias": torch.randn(3, 6)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "m.safetensors")
    return read_header(tmp_path / "m.safetensors").tensors, tensors


def test_whole_tensors_and_rows(stored):
    places, tensors = stored
    assert all(torch.equal(raw(t), raw(tensors[n])) for n, t in read_tensors(places).items())
    with Files() as files:
        for name in ("torch.bfloat16", "3d"):
            got = read_range(files, places[name], 1, 3)
            assert torch.equal(got, tensors[name][1:3])
    assert torch.equal(read_tensor(places["scalar"]), torch.tensor(2.5))
    assert read_tensor(places["empty"]).shape == (0, 4)


VIEWS = {
    "matrix": (lambda s: View(s["torch.float32"]), lambda t: t["torch.float32"]),
    "rows of one expert": (
        lambda s: View(s["3d"], index=2, rows=range(4, 8)),
        lambda t: t["3d"][2, 4:8],
    ),
    "transposed expert": (
        lambda s: View(s["3d"], index=1, transposed=True),
        lambda t: t["3d"][1].t(),
    ),
    "half of the columns": (
        lambda s: View(s["3d"], index=1, columns=range(3, 6), transposed=True),
        lambda t: t["3d"][1][:, 3:].t(),
    ),
    "every second column": (
        lambda s: View(s["3d"], index=0, columns=range(1, 6, 2), transposed=True),
        lambda t: t["3d"][0][:, 1::2].t(),
    ),
    "every second row": (
        lambda s: View(s["3d"], index=0, rows=range(1, 8, 2)),
        lambda t: t["3d"][0][1::2],
    ),
    "an expert's bias": (
        lambda s: View(s["bias"], rows=range(2, 3), columns=range(0, 6, 2)),
        lambda t: t["bias"][2:3, 0::2],
    ),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_the_window_that_torch_indexes(stored, name):
    places, tensors = stored
    make, index = VIEWS[name]
    view, wanted = make(places), index(tensors)
    assert view.spec.shape == tuple(wanted.shape)
    with Files() as files:
        if view.streams:
            assert view.slab_bytes == 0
            assert torch.equal(read_rows(files, view, 1, 4), wanted[1:4])
            return
        slab = read_slab(files, view)
        assert slab.nbytes == view.slab_bytes
        assert torch.equal(window(slab, view), wanted)
        (piece,) = view.slab_pieces
        assert torch.equal(read_tensor(piece, files), slab)


def test_gate_and_up_share_a_slab_and_biases_do_not_hold_the_whole(stored):
    places, _ = stored
    gate, up = (View(places["3d"], index=1, columns=half) for half in (range(3), range(3, 6)))
    other = View(places["3d"], index=2, columns=range(3))
    assert gate.slab == up.slab != other.slab
    assert gate.slab_bytes == 8 * 6 * 2
    assert View(places["bias"], rows=range(1, 2), columns=range(3)).slab_bytes == 6 * 4


def test_memory_is_used_again_by_its_thread_alone(stored):
    places, tensors = stored
    memory = Memory()
    with Files() as files:
        first = read_range(files, places["3d"], 0, 2, memory)
        assert torch.equal(first, tensors["3d"][:2])
        second = read_range(files, places["3d"], 2, 3, memory)
        assert second.data_ptr() == first.data_ptr()
        assert torch.equal(second, tensors["3d"][2:])
        kept = second.clone()
        elsewhere = threading.Thread(
            target=lambda: read_range(files, places["torch.float32"], 0, 5, memory).fill_(7)
        )
        elsewhere.start()
        elsewhere.join()
        assert torch.equal(second, kept)


def test_a_source_that_shrinks_while_it_is_read_is_named(stored):
    places, _ = stored
    place = places["3d"]
    with Files() as files:
        with files.reading(place):
            pass
        os.truncate(place.file, place.offset + 10)
        with pytest.raises(SourceError, match=r"'3d'.*it changed while it was read"):
            read_range(files, place, 0, 3)


def test_a_source_that_vanished_is_named(stored):
    places, _ = stored
    places["3d"].file.unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        read_tensor(places["3d"])


def test_bytes_of_a_strided_tensor_are_refused():
    with pytest.raises(AssertionError, match="dense"):
        bytes_of(torch.zeros(4, 4).t()[:2])
