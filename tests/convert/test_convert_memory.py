"""Peak memory of a whole run: the same for any depth, and never a whole tensor of experts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ckptq.checkpoint.write import lay_out
from ckptq.convert.preflight import BASE_BYTES, WORKER_BYTES
from ckptq.spec import TensorSpec

MEASURED = """
import sys
from ckptq.__main__ import main
try:
    main()
finally:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
    print(int(peak.split()[1]) * 1024, file=sys.stderr)
"""
"""VmHWM, because the peak that a parent asks for includes the parent's own (Linux, over fork)."""


def sparse(folder: Path, config: dict, shapes: dict[str, tuple[int, ...]]) -> int:
    """A checkpoint of zeros that takes no disk; its bytes."""
    folder.mkdir()
    specs = {name: TensorSpec("BF16", shape) for name, shape in shapes.items()}
    head, _ = lay_out(specs, {})
    nbytes = sum(spec.nbytes for spec in specs.values())
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + nbytes)
    (folder / "config.json").write_text(json.dumps(config))
    return nbytes


def peak(source: Path, *more: str) -> int:
    """Bytes that `ckptq quantize` had in memory at most."""
    out = source.with_name(source.name + "-out")
    command = ["quantize", str(source), "-o", str(out), "-s", "fp8-dynamic", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command, *more], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert out.exists()
    return int(done.stderr.splitlines()[-1])


def test_depth_costs_no_memory(tmp_path):
    found = {}
    for layers in (2, 12):
        source = tmp_path / str(layers)
        shapes = {f"model.layers.{i}.mlp.down_proj.weight": (1024, 8192) for i in range(layers)}
        nbytes = sparse(source, {"model_type": "llama", "num_hidden_layers": layers}, shapes)
        found[nbytes] = peak(source)
    small, large = found
    assert large - small > 160_000_000
    assert found[large] - found[small] < 40_000_000
    assert max(found.values()) < 1_000_000_000


def test_a_whole_tensor_of_experts_is_never_in_memory(tmp_path):
    """Llama-4's layout, experts of 21 MB in one tensor of 0.67 GB that is transposed on its way."""
    experts, hidden, intermediate = 32, 640, 8192
    whole = sparse(
        tmp_path / "source",
        {
            "model_type": "llama4_text",
            "num_hidden_layers": 1,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_local_experts": experts,
        },
        {"model.layers.0.feed_forward.experts.gate_up_proj": (experts, hidden, 2 * intermediate)},
    )
    program = BASE_BYTES + 2 * WORKER_BYTES
    ceiling = program + 3 * whole // experts
    found = peak(tmp_path / "source", "--max-ram", str(ceiling))
    assert found < ceiling
    assert found < whole
    assert found < 1_000_000_000 + 3 * whole // experts
