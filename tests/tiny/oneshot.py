"""What llm-compressor's `oneshot` is given to calibrate on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def calibration(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """These rows of token ids, in their order, all of one length."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1}, unk_token="<pad>"))
    data = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    return {
        "dataset": Dataset.from_dict(data),
        "processor": PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>"),
        "max_seq_length": len(rows[0]),
        "num_calibration_samples": len(rows),
        "shuffle_calibration_samples": False,
    }
