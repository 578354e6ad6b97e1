"""The same for a run that calibrates first: killed in either half, it ends with the same bytes."""

from __future__ import annotations

import random
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from convert_killed import Run, convert, digests, perform

import ckptq.calibrate.journal
from ckptq.calibrate.request import ScalesSource
from ckptq.calibrate.run import calibrate
from ckptq.checkpoint.open import Checkpoint
from ckptq.checkpoint.partial import partial_of
from ckptq.recipes.load import load_scheme
from ckptq.text.samples import Samples

LAYERS = 4


def calibrated(ckpt: Checkpoint) -> ScalesSource:
    """Scales from random tokens, with the state kept after every layer."""
    ckptq.calibrate.journal.SHARE_OF_TIME = float("inf")
    rng = random.Random(0)
    ids = tuple(tuple(rng.randrange(3, 99) for _ in range(length)) for length in (9, 17, 17))
    samples = Samples(ids, source="random", seq_len=17, seed=0)
    return ScalesSource(
        arguments={"samples": 3},
        load=lambda folder: calibrate(ckpt, samples, batch_size=2, journal=folder),
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Run, int]:
    import transformers

    folder = tmp_path_factory.mktemp("calibrating")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "source")
    run = Run(
        source=folder / "source",
        out=folder / "whole",
        recipe=load_scheme("fp8-per-head"),
        scales=calibrated,
    )
    code, steps = perform(run)
    assert code == 0
    return run, steps


def test_the_result_holds_calibrated_scales(uninterrupted):
    from safetensors.torch import load_file

    run, _ = uninterrupted
    found = {n: t for f in run.out.glob("*.safetensors") for n, t in load_file(f).items()}
    k_scales = [found[f"model.layers.{i}.self_attn.k_scale"] for i in range(LAYERS)]
    assert all(scale.shape == (2, 1, 1) for scale in k_scales)
    assert len({float(scale[0]) for scale in k_scales}) == LAYERS


@pytest.mark.parametrize("case", range(6))
def test_killed_at_a_random_step(uninterrupted, case):
    run, steps = uninterrupted
    # in turn from the first and the second half of the run, which are calibration and conversion
    first = case % 2 * steps // 2
    die_at = random.Random(case).randrange(first + 1, first + steps * 2 // 5)
    by = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[case // 2]
    run = replace(run, out=run.out.with_name(f"killed-{case}"), die_at=die_at, by=by)
    assert perform(run)[0] != 0
    assert partial_of(run.out).exists()
    convert(run)
    assert digests(run.out) == digests(run.out.with_name("whole"))
    assert not partial_of(run.out).exists()
    shutil.rmtree(run.out)


def test_layers_that_were_calibrated_are_not_run_again(uninterrupted, monkeypatch):
    from ckptq.forward.layerwise import LayerwiseModel

    run, _ = uninterrupted
    run = replace(run, out=run.out.with_name("layers"), die_at=3, die_in="rename")
    assert perform(run)[0] == -signal.SIGKILL
    ran: list[int] = []
    run_layer = LayerwiseModel.run_layer
    monkeypatch.setattr(
        LayerwiseModel,
        "run_layer",
        lambda self, index, *args: (run_layer(self, index, *args), ran.append(index))[0],
    )
    convert(run)
    assert ran
    assert ran[0] > 0, "the first layers were done before the kill"
    assert digests(run.out) == digests(run.out.with_name("whole"))
