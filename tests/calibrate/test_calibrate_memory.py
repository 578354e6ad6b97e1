"""Peak memory of calibration is that of one layer, for any number of layers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calibrate_models import llama

SCRIPT = """
import sys
from pathlib import Path
from ckptq.calibrate.run import calibrate
from ckptq.calibrate.text import Samples
from ckptq.calibrate.weights import Loader
from ckptq.checkpoint.open import open_checkpoint
if sys.argv[2] == "keep":
    Loader.unload = lambda *_, **__: None
rows = tuple(tuple(range(3, 19)) for _ in range(4))
calibrate(open_checkpoint(Path(sys.argv[1])), Samples(rows, "test", 16, 0), batch_size=2)
status = Path("/proc/self/status").read_text().split()
print(int(status[status.index("VmHWM:") + 1]) * 1024)
"""

SHALLOW, DEEP = 2, 14
WIDE = {"hidden_size": 512, "intermediate_size": 4096, "head_dim": 128, "num_key_value_heads": 4}
LAYER_BYTES = 2 * (4 * 512 * 512 + 3 * 512 * 4096)
"""14.7 MB: the bf16 weights of one decoder layer."""


def peak(path: Path, weights: str) -> int:
    """Peak resident bytes of a calibration in a process of its own.

    VmHWM, because ru_maxrss would begin at the peak of the process that starts it.
    """
    command = [sys.executable, "-c", SCRIPT, str(path), weights]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Of a shallow and a deep model, and of the deep one with weights that are never dropped."""
    root = tmp_path_factory.mktemp("depths")
    for depth in (SHALLOW, DEEP):
        model = llama(**WIDE, num_hidden_layers=depth).to(torch.bfloat16)
        model.save_pretrained(root / str(depth))
    return {
        "shallow": peak(root / str(SHALLOW), "drop"),
        "deep": peak(root / str(DEEP), "drop"),
        "kept": peak(root / str(DEEP), "keep"),
    }


def test_peak_does_not_grow_with_depth(peaks):
    more = peaks["deep"] - peaks["shallow"]
    assert more < 2 * LAYER_BYTES, f"{DEEP - SHALLOW} more layers took {more:,} bytes more"


def test_kept_weights_would_show(peaks):
    """The test above can fail: with weights that are never dropped, it would."""
    assert peaks["kept"] - peaks["shallow"] > (DEEP - SHALLOW - 2) * LAYER_BYTES, peaks
