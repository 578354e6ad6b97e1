"""Ask vLLM about checkpoints: run by the interpreter that has vLLM, which need not have ckptq.

    vllm_worker.py [--stand-ins FILE] [--gpu] < jobs > results

A job is a line {"checkpoint": folder, "prompts": [[token id, ...], ...], "max_tokens": n, "top":
k}. Its result is a line that starts with "RESULT " (vLLM prints too), {"checkpoint", "top",
"greedy"} with [[id, log probability], ...] of the k likeliest first tokens, and [id, ...], for each
prompt, or an "error" with the line where it arose.

vLLM is imported once (seconds), and each checkpoint is loaded in a fork: none sees what another
left behind, and a crash costs one job. Loading is strict: a parameter that no tensor filled is an
error. `--stand-ins` names a Python file whose `install()` replaces kernels that the machine lacks;
with it, only names, shapes, loaders and permutations are vLLM's own, not the last matrix product.
With `--gpu` it runs on one, and takes so little of it that a dozen workers can share it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # errors surface here
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
SHARED_GPU = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 28}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stand-ins", type=Path)
    parser.add_argument("--gpu", action="store_true")
    chosen = parser.parse_args()
    jobs = [json.loads(line) for line in sys.stdin if line.strip()]
    import vllm  # noqa: F401

    for job in jobs:
        print("RESULT " + json.dumps(in_a_fork(job, chosen)), flush=True)


def in_a_fork(job: dict[str, Any], chosen: argparse.Namespace) -> dict[str, Any]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        result = attempt(job, chosen)
        with os.fdopen(writer, "w") as pipe:
            pipe.write(json.dumps(result))
        os._exit(0)  # the engine's own shutdown would take seconds
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {**named(job), "error": f"ended with status {status}"}


def named(job: dict[str, Any]) -> dict[str, Any]:
    return {"checkpoint": job["checkpoint"]}


def attempt(job: dict[str, Any], chosen: argparse.Namespace) -> dict[str, Any]:
    try:
        if chosen.stand_ins is not None:
            install(chosen.stand_ins)
        return {**named(job), **answers(job, SHARED_GPU if chosen.gpu else {})}
    # whatever it was, it is the cell's result
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return {**named(job), "error": f"{type(error).__name__}: {error}"[:2000], "where": where}


def install(file: Path) -> None:
    spec = importlib.util.spec_from_file_location("stand_ins", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()


def answers(job: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    config = json.loads((Path(job["checkpoint"]) / "config.json").read_text())
    llm = LLM(
        model=job["checkpoint"],
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=128,
        max_num_seqs=16,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        # a text model: no image ever comes, and the vision tower's weights are read all the same
        limit_mm_per_prompt={"image": 0} if "vision_config" in config else {},
        model_loader_extra_config={"enable_weights_track": True},
        max_logprobs=job["top"],
        **limits,
    )
    wanted = SamplingParams(
        temperature=0,
        max_tokens=job["max_tokens"],
        logprobs=job["top"],
        ignore_eos=True,
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    outputs = [request.outputs[0] for request in llm.generate(prompts, wanted, use_tqdm=False)]
    return {
        "top": [[[t, p.logprob] for t, p in o.logprobs[0].items()] for o in outputs],
        "greedy": [list(o.token_ids) for o in outputs],
    }


if __name__ == "__main__":
    main()
