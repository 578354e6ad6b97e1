"""Quantize, verify and evaluate from Python: what the three commands do.

    python examples/python_api.py MODEL OUT

MODEL is a folder that examples/make_checkpoint.py has made.
"""

import sys
from pathlib import Path

from ckptq.calibrate.request import CalibrationRequest
from ckptq.convert.quantize import QuantizeRequest, quantize
from ckptq.evaluate.request import EvaluationRequest, evaluate_request
from ckptq.evaluate.result import Thresholds
from ckptq.recipes.load import load_scheme
from ckptq.verify.run import verify

model, out = map(Path, sys.argv[1:])
text = CalibrationRequest(data=str(model / "calibration.txt"), seq_len=64)
recipe = load_scheme("fp8-per-head")
made = quantize(QuantizeRequest(model=model, recipe=recipe, out=out, calibration=text))
proof = verify(out, model)
limits = Thresholds(max_kl=0.1, min_accuracy=0.95)
asked = EvaluationRequest(source=str(model), task=model / "task.jsonl", thresholds=limits)
found = evaluate_request(str(out), asked)
print(f"{made.output_bytes / made.source_bytes:.0%} of the bytes; {len(proof.findings)} faults")
print(f"KL {found.rows[0].measures.kl:.5f}, {found.rows[0].measures.accuracy:.1%} right")
sys.exit(0 if proof.ok and found.ok else 1)
