"""What stands under examples/ runs, and the workflow runs what is tested here."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from evaluate_models import WORDS, plain_logits, plain_model, rows_of, save_family

from ckptq.checkpoint.open import open_checkpoint
from ckptq.plan.make import make_plan
from ckptq.recipes.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model with calibration text, and questions that it answers."""
    folder = save_family("llama", tmp_path_factory.mktemp("example") / "model")
    plain, questions, text = plain_model(folder), [], []
    for row in rows_of((5, 6, 7, 8), seed=5):
        ids = [1, *row]
        for _ in range(2):
            ids.append(int(plain_logits(plain, ids)[-1].argmax()))
        words = [WORDS[i] for i in ids[1:]]
        text.append(" ".join(words))
        prompt, answer = " ".join(words[: len(row)]), " ".join(words[len(row) :])
        questions.append(json.dumps({"prompt": prompt, "answer": answer}))
    (folder / "calibration.txt").write_text("\n".join(text))
    (folder / "task.jsonl").write_text("\n".join(questions))
    return folder


def run(*words, **environment) -> subprocess.CompletedProcess[str]:
    """A command with this ckptq first in line."""
    bin_folder = Path(sys.executable).parent
    variables = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return subprocess.run(
        list(map(str, words)), env=variables, capture_output=True, text=True, check=False
    )


@pytest.fixture
def path_with_ckptq(tmp_path) -> str:
    """`ckptq` as a command, whether or not it is installed."""
    tool = tmp_path / "bin" / "ckptq"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ckptq "$@"\n')
    tool.chmod(0o755)
    return f"{tool.parent}:{os.environ['PATH']}"


@pytest.mark.slow
def test_the_ci_job_refuses_a_bad_checkpoint_for_its_numbers_alone(
    model, tmp_path, path_with_ckptq
):
    """V's heads differ by 2^16: one FP8 scale per tensor does not hold them."""
    job, loose = EXAMPLES / "ci" / "run.sh", {"MAX_KL": "0.1", "MIN_AGREEMENT": "0.1"}
    settings = {"PATH": path_with_ckptq, "SEQ_LEN": "16", "MIN_ACCURACY": "0.1", **loose}
    done = run(job, model, tmp_path, "fp8-per-tensor", MAX_PPL_RATIO="100", **settings)
    assert done.returncode == 1, done.stderr + done.stdout
    refused = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert any("accuracy is 0, expected at least 0.1" in line for line in refused)
    assert "accuracy is 0" in (tmp_path / "report/evaluate.html").read_text()
    assert '"findings": []' in (tmp_path / "report/verify.json").read_text()


def test_the_python_api_in_a_dozen_lines(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["python_api.py", str(model), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "python_api.py"))
    assert "0 faults" in capsys.readouterr().out
    assert ended.value.code in (0, 1)
    assert (tmp_path / "out" / "config.json").is_file()


def test_the_recipe_of_one_s_own_leaves_the_first_layer_alone(model):
    plan = make_plan(open_checkpoint(model), load_recipe(EXAMPLES / "own_recipe.yaml"))
    mlp, attention = set(plan.groups["mlp"]), set(plan.groups["attention"])
    assert len(mlp) == 2 * 3
    assert len(attention) == 2 * 4
    assert all(".mlp." in name for name in mlp)
    assert not any("layers.0." in name for name in mlp | attention)
    assert plan.attention is not None
    assert plan.attention.strategy == "attn_head"


def test_the_workflow_runs_the_script_and_keeps_the_report_when_it_fails():
    workflow = yaml.safe_load((EXAMPLES / "ci" / "quantize.yml").read_text())
    steps = workflow["jobs"]["quantize"]["steps"]
    (job,) = [step for step in steps if "run.sh" in step.get("run", "")]
    after = steps[steps.index(job) + 1]
    assert after["if"] == "always()"
    assert after["with"]["path"] == "out/report"
    script = (EXAMPLES / "ci" / "run.sh").read_text()
    asked = set(job["env"]) - {"SCHEME"}
    assert all(f"${{{name}:-" in script for name in asked)
