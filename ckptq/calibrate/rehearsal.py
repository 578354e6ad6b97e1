"""A calibration without weights, before the work: does the model run layer by layer, and can every
attention module of the plan be observed?

A few tokens run with placeholder weights, by shapes alone unless a layer needs values before its
attention.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from ckptq.calibrate.seen import check_seen
from ckptq.checkpoint.open import Checkpoint
from ckptq.errors import PlanError, SourceError
from ckptq.forward.latent import Latents
from ckptq.forward.layerwise import LayerwiseModel, open_model
from ckptq.forward.record import LayerArguments, Moved, pass_on
from ckptq.forward.tap import Tap, tapped
from ckptq.gptq.layers import check_order
from ckptq.models.refusals import WEIGHTS_ALONE, family_code
from ckptq.plan.attention import AttentionPlan
from ckptq.plan.unit import Plan
from ckptq.spec import TensorSpec, torch_dtype
from ckptq.text.samples import Batch

TOKENS = range(3, 11)


class Placeholders:
    """Zeros of each tensor's shape that take no memory: a `WeightSource`."""

    def __init__(self, ckpt: Checkpoint, plan: Plan) -> None:
        self.label = str(ckpt.path)
        self._specs: dict[str, TensorSpec] = {n: t.spec for n, t in ckpt.tensors.items()}
        for linear in plan.layout.linears.values():
            if linear.weight.index is None:  # else its tensor is there under its own name
                self._specs[f"{linear.name}.weight"] = linear.weight.spec
        for weight in plan.layout.decoded.values():
            self._specs[weight.plain] = weight.written

    def names(self) -> Collection[str]:
        return self._specs.keys()

    def announce(self, names: Collection[str]) -> None:
        """Nothing is read."""

    def load(self, names: Collection[str]) -> dict[str, Tensor]:
        specs = {name: self._specs[name] for name in names}
        return {
            name: torch.zeros(1, dtype=torch_dtype(spec.dtype)).expand(spec.shape)
            for name, spec in specs.items()
        }


def rehearse(ckpt: Checkpoint, plan: Plan, trust_remote_code: bool = False) -> None:
    """Raise now what calibration would raise later. Reads headers only.

    Raises PlanError for a model that cannot be run layer by layer, or whose attention is not seen;
    UsageError for an order of rows that it cannot be run in;
    SourceError for one that the installed transformers does not have or cannot run.
    """
    if plan.recipe.runs_layers:
        check_order(plan)
    model = _open(ckpt, plan, trust_remote_code)
    stream = model.embed([_batch()])
    if plan.recipe.tuning is not None and not stream.resumable:
        raise PlanError(
            f"{ckpt.path}: layers of {type(model.skeleton.model).__name__} pass on more than the "
            "hidden states, so AutoRound cannot run one many times; use -refined"
        )
    if plan.attention is None:
        return
    with torch.no_grad():
        for index, layer in enumerate(model.layer_names):
            call, later = stream.arguments[0][index], stream.arguments[0][index + 1 :]
            scales = _shown(model, layer, stream.hidden_BSE[0], call, later, plan.attention)
            check_seen(model, layer, scales, plan.attention)


def _open(ckpt: Checkpoint, plan: Plan, trust_remote_code: bool) -> LayerwiseModel:
    weights = Placeholders(ckpt, plan)
    try:
        return open_model(
            ckpt,
            weights=weights,
            trust_remote_code=trust_remote_code,
            attention=plan.attention is not None,
        )
    except SourceError as error:
        if plan.layout.witnesses.tree is not None or trust_remote_code:
            raise
        own = ", or pass --trust-remote-code" if ckpt.config.get("auto_map") else ""
        raise SourceError(
            f"{error}; calibration needs transformers to run the model: {WEIGHTS_ALONE}{own}"
        ) from error


def _batch() -> Batch:
    ids_BS = torch.tensor([list(TOKENS)])
    return Batch(ids_BS, torch.ones_like(ids_BS), (len(TOKENS),))


def _shown(
    model: LayerwiseModel,
    layer: str,
    hidden_BSE: Tensor,
    call: LayerArguments,
    later: Sequence[LayerArguments],
    attention: AttentionPlan,
) -> dict[str, int]:
    """Point of attention, "MODULE.k" -> how many scales it would get.

    What the layer passes on is put into the `later` calls.
    """
    scales: dict[str, int] = {}

    def run(module: nn.Module, hidden_BSE: Tensor, call: LayerArguments) -> None:
        latents = Latents(module, layer)

        def see(path: str, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> None:
            for which, x_BHSD in latents.cached(path, q_BHSD, k_BHSD, v_BHSD).items():
                point = f"{model.loader.stored_module(path)}.{which}"
                scales[point] = x_BHSD.shape[1] if attention.strategy == "attn_head" else 1

        with latents.watched(), tapped(module, layer, Tap([len(TOKENS)], see)):
            result = module(hidden_BSE, *call[0], **call[1])
        if model.pairs:
            pass_on(torch.zeros_like(result[1], device="cpu"), later)

    root, meta = model.skeleton.layers[layer], torch.device("meta")
    try:
        run(deepcopy(root).to(meta), hidden_BSE.to(meta), Moved(meta)(call))
    except Exception:  # a family's own code may ask for values, as routers do
        inside = f"{model.loader.stored_module(layer)}."
        wanted = (m for m in attention.scales if m.startswith(inside))
        if model.pairs or any(f"{module}.k" not in scales for module in wanted):
            with model.loader.loaded(layer), family_code(model.loader.label, layer):
                run(root, hidden_BSE, call)
    return scales
