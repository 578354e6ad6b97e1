"""Log-probabilities of given tokens in vLLM. Runs alone, in vLLM's interpreter: imports no ckptq.

    python vllm_worker.py JOB.json RESULT.json

The job: {"model": folder, "lines": [[token, ...], ...], "kv_heads": of a cache with a scale per
head, "arguments": {of vllm.LLM}}. The result: {"vllm": version, "device": "cpu" or "cuda", "ranks":
processes, "lines": [[[log-probability of the token, the most likely token], ...], ...]}, from each
line's second token on.
"""

import json
import os
import sys


def main() -> None:
    # one process, so that an error in the engine surfaces here
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # on CPUs with AMX vLLM rounds inputs of INT4 weights to INT8, which no W4A16 scheme asks for
    os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")
    job_file, result_file = sys.argv[1:]
    with open(job_file) as file:
        job = json.load(file)

    import torch
    import vllm
    from vllm.platforms import current_platform

    device = current_platform.device_type
    if device == "cpu":
        # its W4A16 kernel does not ask Linux for AMX: illegal, if no product before it has asked
        torch.cpu._init_amx()
    ranks = ranks_for(job["kv_heads"], device)
    longest = max(map(len, job["lines"]))
    engine = vllm.LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        enforce_eager=True,
        max_model_len=longest + 1,
        tensor_parallel_size=ranks,
        **job["arguments"],
    )
    wanted = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
    prompts = [{"prompt_token_ids": line} for line in job["lines"]]
    outputs = engine.generate(prompts, wanted, use_tqdm=False)
    lines = [
        [scored(line[at], output.prompt_logprobs[at]) for at in range(1, len(line))]
        for line, output in zip(job["lines"], outputs, strict=True)
    ]
    with open(result_file, "w") as file:
        said = {"vllm": vllm.__version__, "device": device, "ranks": ranks, "lines": lines}
        json.dump(said, file)
    if ranks > 1:
        # its processes outlive this one otherwise
        engine.llm_engine.engine_core.shutdown()


def ranks_for(kv_heads: int | None, device: str) -> int:
    """As many processes as a cache has scales, if there are enough CPU cores.

    vLLM's CPU backend has one scale per layer and process: with one head each, it is exact.
    """
    if device != "cpu" or kv_heads is None or kv_heads > (os.cpu_count() or 1):
        return 1
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    return kv_heads


def scored(token: int, logprobs: dict) -> tuple[float, int]:
    """The token's log-probability, and the most likely token."""
    best = max(logprobs, key=lambda each: logprobs[each].logprob)
    return logprobs[token].logprob, best


if __name__ == "__main__":
    main()
    # vLLM's threads may outlive it and hang the interpreter's shutdown
    sys.stdout.flush()
    os._exit(0)
