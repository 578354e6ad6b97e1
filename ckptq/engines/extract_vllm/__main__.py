"""Ask vLLM itself what it makes of a checkpoint: which modules it merges, quantizes, leaves.

    VLLM_PYTHON ckptq/engines/extract_vllm OBSERVATIONS.jsonl CHECKPOINT...

Runs in vLLM's environment, where ckptq is not installed. The checkpoints are tiny, unquantized
ones. Each is observed in a process of its own, and each gives one line of JSON; what fails is
recorded as `error`. `python -m ckptq.engines.tabulate` makes the table of it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    VLLM_NO_USAGE_STATS="1",
)

from limits import lift_limits_of_this_machine
from observe import observe

SECONDS = 300
"""For one checkpoint; a tiny one takes three."""


def main() -> None:
    out, *checkpoints = sys.argv[1:]
    import vllm.model_executor.model_loader.utils  # noqa: F401  once, before the forks

    lift_limits_of_this_machine()
    with open(out, "w") as file:
        print(json.dumps(registry()), file=file)
        for checkpoint in checkpoints:
            observed = in_a_process(Path(checkpoint))
            print(json.dumps(observed), file=file, flush=True)
            print(f"{checkpoint}: {observed.get('error') or 'ok'}", file=sys.stderr)


def registry() -> dict[str, Any]:
    """vLLM's version, and its class for each architecture that config.json may name."""
    import vllm
    from vllm.model_executor.models.registry import _VLLM_MODELS

    classes = {name: entry[1] for name, entry in sorted(_VLLM_MODELS.items())}
    return {"vllm": vllm.__version__.split("+")[0], "registry": classes}


def in_a_process(checkpoint: Path) -> dict[str, Any]:
    """Observe in a fork: vLLM's process groups are made for one model, and some classes crash."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=send_observation, args=(checkpoint, sender)
    )
    process.start()
    sender.close()
    try:
        observed = receiver.recv() if receiver.poll(SECONDS) else {"error": "takes too long"}
    except EOFError:
        process.join()
        observed = {"error": f"crashed with exit code {process.exitcode}"}
    if process.is_alive():
        process.join(5)
        process.kill()
    return {"source": checkpoint.name, **about(checkpoint), **observed}


def send_observation(checkpoint: Path, sender: Any) -> None:
    try:
        observed = observe(checkpoint)
    except Exception as error:  # vLLM raises many kinds
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        observed = {"error": f"{type(error).__name__}: {str(error)[:300]} ({place})"}
    sender.send(observed)


def about(checkpoint: Path) -> dict[str, Any]:
    config = json.loads((checkpoint / "config.json").read_text())
    return {
        "architecture": config["architectures"][0],
        "model_type": config["model_type"],
    }


if __name__ == "__main__":
    main()
