"""A checkpoint loaded into transformers' own model, quantized or plain, by its headers alone.

The model is built on the meta device, its quantizer prepares it, and tensors without data go
through the conversion that `from_pretrained` uses. Only headers are read, nothing is allocated.
"""

from __future__ import annotations

import io
import logging as std_logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ckptq.checkpoint.open import Checkpoint
from ckptq.models.tree.transformers_model import model_class_of, read_config
from ckptq.spec import TensorSpec, dtype_name, torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Specs = Mapping[str, TensorSpec]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model after loading, and what loading it was like. Names are the model's."""

    model: PreTrainedModel
    quantizer: Any
    wanted: Specs
    """The model's parameters before loading."""
    found: Specs
    """The same parameters after loading, in the dtypes on disk."""
    missing: frozenset[str]
    """Parameters that no tensor filled, except tied ones."""
    left_over: frozenset[str]
    """Tensors without a parameter, except those that the family ignores."""
    errors: Mapping[str, str]
    """Place -> why the conversion of its tensors failed."""
    tied: frozenset[str]
    """Modules whose weight is another module's."""


def load_by_headers(ckpt: Checkpoint, plain: Callable[[Specs], Specs] | None = None) -> Loaded:
    """`plain` says, for the model's parameters, which tensors of the unquantized model are loaded:
    it is then built without a quantizer. None loads what is stored.

    Raises SourceError for a config that transformers cannot read or a class that it lacks, and
    whatever transformers raises while it builds the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    with _silence():
        model, quantizer, dtype = _build(ckpt, quantized=plain is None)
        wanted = _specs(model)
        stored = {n: t.spec for n, t in ckpt.tensors.items()} if plain is None else plain(wanted)
        tied = frozenset(name.rpartition(".")[0] for name in model.all_tied_weights_keys)
        conversions: Any = get_model_conversion_mapping(model, None, quantizer)
        _share_operations(conversions)
        loading = LoadStateDictConfig(
            device_map={"": "meta"},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            hf_quantizer=quantizer,
            weight_mapping=conversions,
        )
        info, _ = convert_and_load_state_dict_in_model(model, _headers(stored), loading)
        with _absent_places():
            model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
    # without a quantizer a tensor of another shape is put down, and not set
    unset = {n: TensorSpec(wanted[n].dtype, tuple(held)) for n, held, _ in info.mismatched_keys}
    return Loaded(
        model=model,
        quantizer=quantizer,
        wanted=wanted,
        found=_specs(model) | unset,
        missing=frozenset(info.missing_keys),
        left_over=frozenset(info.unexpected_keys),
        errors={place: _last_line(error) for place, error in info.conversion_errors.items()},
        tied=tied,
    )


def _build(ckpt: Checkpoint, *, quantized: bool) -> tuple[PreTrainedModel, Any, torch.dtype]:
    """As `from_pretrained` does until it begins to load."""
    from transformers.quantizers.auto import get_hf_quantizer
    from transformers.utils.generic import ContextManagers

    config = read_config(ckpt)
    if not quantized and hasattr(config, "quantization_config"):
        del config.quantization_config
    model_class = model_class_of(ckpt, config)
    quantizer, config, _ = get_hf_quantizer(config, None, None, True, {})
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    contexts = model_class.get_init_context(dtype, quantizer is not None, False, False)
    with ContextManagers(contexts):
        model = model_class(config)
        if quantizer is not None:
            quantizer.preprocess_model(
                model=model, dtype=dtype, device_map=None, checkpoint_files=None, use_kernels=False
            )
    return model, quantizer, dtype


class Header(torch.Tensor):
    """A tensor without data that keeps its dtype on disk: otherwise loading would silently cast a
    bf16 weight to FP8."""

    def to(self, *_: object, **__: object) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def _headers(held: Specs) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device="meta").as_subclass(
            Header
        )
        for name, spec in held.items()
    }


def _share_operations(conversions: Iterable[Any]) -> None:
    """Loading copies a conversion for every tensor on disk, its operations with the quantizer in
    them, which takes most of the time; they keep no state, and one of each is enough."""
    for conversion in conversions:
        for operation in getattr(conversion, "operations", ()):
            operation.__deepcopy__ = lambda memo, itself=operation: itself


def _specs(model: PreTrainedModel) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(dtype_name(tensor.dtype), tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }


@contextmanager
def _absent_places() -> Iterator[None]:
    """Tying fails if packing removed the parameter to tie; the missing parameters are reported
    anyway."""
    try:
        yield
    except AttributeError:
        return


@contextmanager
def _silence() -> Iterator[None]:
    """Hide progress bars and key reports; findings replace them."""
    from loguru import logger
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(std_logging.CRITICAL)
    logger.disable("compressed_tensors")
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        logger.enable("compressed_tensors")


def _last_line(error: str) -> str:
    """The reason in the text that transformers keeps of an exception: traceback, reason,
    operation."""
    lines = [line for line in error.strip().splitlines() if line.strip()]
    return lines[-2] if len(lines) > 1 and lines[-1].startswith("Error") else lines[-1]
