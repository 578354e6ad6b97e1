"""Peak memory of calibration is that of one layer, for any number of layers."""

import json
import subprocess
import sys

import pytest
import torch
from calibrate_models import llama

SCRIPT = """
import json, sys
from pathlib import Path
from ckptq.calibrate.run import calibrate
from ckptq.text.samples import Samples
from ckptq.forward.loader import Loader
from ckptq.checkpoint.open import open_checkpoint

def peak(folder):
    rows = tuple(tuple(range(3, 19)) for _ in range(4))
    calibrate(open_checkpoint(Path(folder)), Samples(rows, "test", 16, 0), batch_size=2)
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024

shallow, deep = sys.argv[1:]
peaks = {"shallow": peak(shallow), "deep": peak(deep)}
Loader.unload = lambda *_, **__: None
print(json.dumps({**peaks, "kept": peak(deep)}))
"""
"""Peaks only grow, so the order is from the small to the large. VmHWM, because ru_maxrss would
begin at the peak of the process that starts this one."""

SHALLOW, DEEP = 2, 8
WIDE = {"hidden_size": 512, "intermediate_size": 4096, "head_dim": 128, "num_key_value_heads": 4}
LAYER_BYTES = 2 * (4 * 512 * 512 + 3 * 512 * 4096)
"""14.7 MB: the bf16 weights of one decoder layer."""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Peak bytes of a shallow model, a deep one, and the deep one with weights never dropped."""
    root = tmp_path_factory.mktemp("depths")
    for depth in (SHALLOW, DEEP):
        model = llama(**WIDE, num_hidden_layers=depth).to(torch.bfloat16)
        model.save_pretrained(root / str(depth))
    command = [sys.executable, "-c", SCRIPT, str(root / str(SHALLOW)), str(root / str(DEEP))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_peak_does_not_grow_with_depth(peaks):
    more = peaks["deep"] - peaks["shallow"]
    assert more < 2 * LAYER_BYTES, f"{DEEP - SHALLOW} more layers took {more:,} bytes more"


def test_kept_weights_would_show(peaks):
    """The test above can fail: with weights that are never dropped, it would."""
    assert peaks["kept"] - peaks["shallow"] > (DEEP - SHALLOW - 2) * LAYER_BYTES, peaks
