#!/usr/bin/env bash
# What a CI job does with a new checkpoint: convert it, prove that it is right, measure what it costs.
#
#   run.sh MODEL OUT [SCHEME]
#
# MODEL holds `calibration.txt` and `task.jsonl`, as examples/make_checkpoint.py writes them; give
# DATA and TASK for your own. With VLLM_PYTHON (a Python that has vLLM) the checkpoint is run there
# as well. Ends with exit code 1 where a check or a threshold says no; OUT/report holds why.
set -euo pipefail

model=$1 out=$2 scheme=${3:-fp8-per-head}
data=${DATA:-$model/calibration.txt} task=${TASK:-$model/task.jsonl}
checkpoint=$out/$scheme report=$out/report
mkdir -p "$report"

ckptq quantize "$model" --scheme "$scheme" --output "$checkpoint" --data "$data" \
    --seq-len "${SEQ_LEN:-512}"

ckptq verify "$checkpoint" --source "$model" --json > "$report/verify.json"

ckptq evaluate "$checkpoint" --source "$model" --data "$data" --task "$task" \
    --seq-len "${SEQ_LEN:-512}" --batch-size "${BATCH_SIZE:-8}" \
    --max-kl "${MAX_KL:-0.1}" --min-agreement "${MIN_AGREEMENT:-0.9}" \
    --max-ppl-ratio "${MAX_PPL_RATIO:-1.1}" --min-accuracy "${MIN_ACCURACY:-0.95}" \
    ${VLLM_PYTHON:+--vllm-python "$VLLM_PYTHON"} \
    --report "$report/evaluate.html"
