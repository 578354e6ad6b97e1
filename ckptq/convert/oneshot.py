"""llm-compressor's `oneshot` over a whole model in memory; its checkpoint goes into a separate
folder.

Everything that transformers might refuse is tried before calibration, because a failure after it
would waste hours.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ckptq.calibrate.request import CalibrationRequest
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.seal import seal
from ckptq.models.refusals import refusals
from ckptq.models.tree.transformers_model import model_class_of, read_config
from ckptq.recipes.scheme import Recipe
from ckptq.text.samples import read_samples


def run_oneshot(ckpt: Checkpoint, recipe: Recipe, made: Path, wanted: CalibrationRequest) -> None:
    """Run the recipe on the model and save the result, sealed when it is whole.

    SourceError where transformers cannot load or save the model, from the start, and where
    llm-compressor cannot run the recipe on it.
    """
    import llmcompressor
    from datasets import Dataset

    shutil.rmtree(made, ignore_errors=True)
    samples = read_samples(
        wanted.data, ckpt.path, samples=wanted.samples, seq_len=wanted.seq_len, seed=wanted.seed
    )
    ids = [list(row) for row in samples.token_ids]
    model, tokenizer = _load(ckpt, wanted.trust_remote_code)
    torch.manual_seed(wanted.seed)
    with refusals(f"{ckpt.path}: llm-compressor cannot run {recipe.handed_over[0]} on it"):
        llmcompressor.oneshot(
            model=model,
            dataset=Dataset.from_dict(
                {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
            ),
            recipe=recipe.text,
            max_seq_length=wanted.seq_len,
            num_calibration_samples=len(ids),
            shuffle_calibration_samples=False,
            processor=tokenizer,
        )
    with refusals(f"{ckpt.path}: transformers cannot save llm-compressor's result"):
        model.save_pretrained(made, save_compressed=True)
    seal(made)


def _load(ckpt: Checkpoint, trust_remote_code: bool) -> tuple[Any, Any]:
    """Model and tokenizer, checked to be savable."""
    from transformers import AutoTokenizer

    trusted = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    config = read_config(ckpt, trust_remote_code)
    model_class: Any = model_class_of(ckpt, config, trust_remote_code)
    with refusals(f"{ckpt.path}: transformers cannot load the model"):
        model = model_class.from_pretrained(
            ckpt.path, config=config, dtype="auto", local_files_only=True
        )
    _leave_generation_out(model)
    with refusals(f"{ckpt.path}: transformers can load the model's config but not save it"):
        _rehearse(model)
    with refusals(f"{ckpt.path}: no tokenizer that transformers can load"):
        tokenizer: Any = AutoTokenizer.from_pretrained(ckpt.path, **trusted)
    return model, tokenizer


def _leave_generation_out(model: Any) -> None:
    """Drop sampling settings: the source's files are copied, and transformers refuses to save
    contradictory settings that it has loaded."""
    from transformers import GenerationConfig

    for name in model.config._get_generation_parameters():
        delattr(model.config, name)
    if model.generation_config is not None:
        model.generation_config = GenerationConfig()


def _rehearse(model: Any) -> None:
    """Save everything but the weights."""
    with TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
