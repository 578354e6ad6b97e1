"""What llm-compressor's `oneshot` makes of a cell: it runs the model, and so knows what names and
shapes alone do not say."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import transformers
from matrix_cells import sample_rows
from tiny.oneshot import calibration

from ckptq.recipes.load import built_in

IGNORE = "ignore: ['re:.*lm_head', 're:.*router', 're:.*vision_model.*', 're:.*projector.*']"


def oneshot_folder(source: Path, format: str, out: Path) -> Path:
    """What oneshot and save_pretrained write by the built-in recipe, on the same samples."""
    pytest.importorskip("llmcompressor")
    from llmcompressor import oneshot
    from llmcompressor.utils import helpers

    config = json.loads((source / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model = model_class.from_pretrained(source, dtype="auto")
    recipe = built_in()[format].read_text().replace("ignore: [lm_head]", IGNORE)
    with pytest.MonkeyPatch.context() as patch:
        # 0.14.0.1 calibrates with eager attention, whose outputs differ from SDPA's in a last bit
        patch.setattr(helpers, "use_eager_attention", lambda model: nullcontext())
        oneshot(
            model=model,
            recipe=recipe,
            **(calibration(sample_rows()) if format == "fp8-static" else {}),
        )
        model.save_pretrained(out)
    return out
