"""Ask transformers the same: jobs and results are those of `vllm_worker.py`.

    transformers_worker.py < jobs > results

A key that the model wants and the checkpoint lacks, or the other way round, is an error. The model
class is taken from config.json, so that no processor is needed for a multimodal model.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from typing import Any

import torch
import transformers
from torch import Tensor


def main() -> None:
    for line in filter(str.strip, sys.stdin):
        job = json.loads(line)
        print("RESULT " + json.dumps(attempt(job)), flush=True)


def attempt(job: dict[str, Any]) -> dict[str, Any]:
    named = {"checkpoint": job["checkpoint"]}
    try:
        return {**named, **answers(load(job["checkpoint"]), job)}
    # whatever it was, it is the cell's result
    except Exception as error:
        return {**named, "error": f"{type(error).__name__}: {error}"[:2000]}


def load(folder: str) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    model, report = model_class.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa", output_loading_info=True
    )
    wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    wrong.pop("error_msgs", None)
    if wrong:
        raise ValueError(f"keys: {wrong}")
    return model.eval()


@torch.no_grad()
def answers(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    order = sorted(range(len(job["prompts"])), key=lambda i: len(job["prompts"][i]))
    top: list[Any] = [None] * len(order)
    greedy: list[Any] = [None] * len(order)
    for _, group in groupby(order, key=lambda i: len(job["prompts"][i])):
        batch = list(group)
        ids_BS = torch.tensor([job["prompts"][i] for i in batch])
        for step in range(job["max_tokens"]):
            logits_BV: Tensor = model(input_ids=ids_BS, use_cache=False).logits[:, -1].float()
            if step == 0:
                values_BT, indices_BT = logits_BV.log_softmax(-1).topk(job["top"])
            ids_BS = torch.cat((ids_BS, logits_BV.argmax(-1, keepdim=True)), dim=1)
        for row, i in enumerate(batch):
            top[i] = list(zip(indices_BT[row].tolist(), values_BT[row].tolist(), strict=True))
            greedy[i] = ids_BS[row, len(job["prompts"][i]) :].tolist()
    return {"top": top, "greedy": greedy}


if __name__ == "__main__":
    main()
