"""Random damage: a report or a clear error, never anything else (`fuzz.py` does more of it)."""

import random
import signal

import pytest
from fuzz import alarmed, run_case
from verify_checkpoints import copy_of

from ckptq.verify.run import verify


@pytest.fixture(autouse=True)
def no_hang():
    before = signal.signal(signal.SIGALRM, alarmed)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("family", ["llama", "llama4"])
@pytest.mark.parametrize("chunk", range(4))
def test_damage_never_ends_in_a_traceback(good, tmp_path, family, chunk):
    folder, source = good(family, "fp8-channel", True)
    ended = {
        run_case(folder, source, tmp_path / "case", seed)
        for seed in range(30 * chunk, 30 * (chunk + 1))
    }
    assert {"found", "SourceError"} <= ended


def test_a_flipped_byte_of_a_weight_is_always_found(good, tmp_path):
    """The twin of the test above: damage to data is not only survived, it is seen."""
    folder, source = good("llama", "int8")
    for seed in range(12):
        rng = random.Random(seed)
        editor = copy_of(folder, tmp_path / str(seed))
        name = rng.choice(sorted(n for n in editor.tensors if n.endswith("proj.weight")))
        codes = editor.tensors[name].flatten()
        codes[rng.randrange(codes.numel())] ^= 1 << rng.randrange(8)
        editor.tensors[name] = codes.view(editor.tensors[name].shape)
        found = verify(editor.save(), source).findings
        assert [(f.code, f.tensor) for f in found] == [("codes-corrupt", name)]
