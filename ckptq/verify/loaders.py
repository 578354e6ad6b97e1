"""What each engine's loader does to a checkpoint, as data.

vllm: 0.32, `Llama4ForCausalLM.permute_qk_weight_for_rotary`, and the KV-cache method of its
compressed-tensors code.
transformers: 5.x, which computes with interleaved RoPE and permutes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptq.engines.vllm import PERMUTED
from ckptq.errors import UsageError
from ckptq.spec import TensorSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """One engine's loader."""

    name: str
    permutes: tuple[str, ...] = ()
    """Local names of the q/k tensors whose rows it moves, where RoPE is interleaved on disk."""
    merges_tensor_scales: bool = False
    """Requantizes q/k/v and gate/up to the largest of their scales, where each has only one."""
    reduces_queries: bool = False
    """Takes the largest q scale of each group of heads that share a k/v head."""
    needs_attention_group: bool = False
    """Whether q scales are used only if a config group for attention is declared."""

    def moves(self, local: str, spec: TensorSpec) -> bool:
        """Whether it permutes this tensor: scales only if there is more than one."""
        return local in self.permutes and (not local.endswith("scale") or spec.numel > 1)


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            name="vllm",
            permutes=PERMUTED,
            merges_tensor_scales=True,
            reduces_queries=True,
        ),
        Engine(name="transformers", needs_attention_group=True),
    )
}


def find_engine(name: str) -> Engine:
    """UsageError for an unknown engine."""
    if name not in ENGINES:
        raise UsageError(f"--engine {name!r}: expected {', '.join(ENGINES)}")
    return ENGINES[name]
