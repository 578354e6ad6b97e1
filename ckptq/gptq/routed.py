"""Moments of experts that one module holds as 3-D parameters, a few experts at a time.

While the layer runs, only the tokens and where each was routed are kept. Afterwards the experts'
inputs are made from them, for as many experts at a time as their Hessians fit `HESSIAN_BYTES`.
An expert counts the tokens that the router gave it, and no others.

Shape letters: N tokens, F features in, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptq.forward.linear_inputs import Experts, between, reads_input, real_positions
from ckptq.gptq.moments import Moments

if TYPE_CHECKING:
    from torch import Tensor

HESSIAN_BYTES = 4 << 30
"""Of Hessians at a time; at least one expert's."""

FLOAT32_BYTES = 4


@dataclass
class Routed:
    """What one module of experts was given, batch by batch."""

    module: Any
    experts: Experts
    """Expert -> its Linears that get codes."""
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(tokens [N, F], which experts each goes to [N, K]), on the CPU."""

    @property
    def linears(self) -> list[str]:
        """Of all experts."""
        return [name for names in self.experts.values() for name in names]

    def see(self, args: Sequence[Any], lengths: Sequence[int]) -> None:
        """Keep the real tokens of a call."""
        x_NF, expert_NK = _assigned(args, len(self.module.gate_up_proj), lengths)
        self.calls.append((x_NF.cpu(), expert_NK.cpu()))

    def tokens(self) -> dict[int, int]:
        """Expert -> how many tokens it got."""
        import torch

        got = torch.cat([expert_NK.flatten() for _, expert_NK in self.calls])
        counts = torch.bincount(got.long(), minlength=max(self.experts) + 1).tolist()
        return {number: counts[number] for number in self.experts}

    def portions(self) -> Iterator[list[int]]:
        """Experts in order, as many at a time as there is room for their Hessians."""
        a, b = self.module.gate_up_proj.shape[1:]
        hidden = self.calls[0][0].shape[1] if self.calls else max(a, b)
        inner = (b if a == hidden else a) // 2
        each = FLOAT32_BYTES * (hidden**2 + inner**2)
        step, numbers = max(HESSIAN_BYTES // each, 1), list(self.experts)
        for start in range(0, len(numbers), step):
            yield numbers[start : start + step]

    def moments(self, number: int, pairs: bool) -> Iterator[tuple[str, Moments]]:
        """Of each Linear of an expert, if it got tokens."""
        shared: dict[bool, Moments] = {}
        device = self.module.gate_up_proj.device
        for x_NF, expert_NK in self.calls:
            x_TF = x_NF[(expert_NK == number).any(-1)].to(device)
            if not len(x_TF):
                continue
            for outer, y_TF in ((True, x_TF), (False, between(self.module, number, x_TF))):
                if outer not in shared:
                    shared[outer] = Moments(y_TF.shape[1], device, pairs)
                shared[outer].add(y_TF)
        for name in self.experts[number] if shared else ():
            yield name, shared[reads_input(name)]


def _assigned(args: Sequence[Any], experts: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Real tokens [N, F] and their experts [N, K], from what a module of experts is called with.

    Families hand over the tokens and an index; Llama-4 all tokens once for each expert, zeroed
    where they are not routed to it. Without either every expert gets every token.
    """
    import torch

    x, index = args[0], next((a for a in args[1:] if _is_index(a)), None)
    count, S = len(lengths) * max(lengths), max(lengths)
    where = real_positions(lengths, S, x.device)
    x_NF = x.reshape(-1, count, x.shape[-1])
    x_NF = x_NF if where is None else x_NF.index_select(1, where)
    if index is not None:
        expert_NK = index.reshape(count, -1)
        return x_NF[0], expert_NK if where is None else expert_NK.index_select(0, where)
    numbers = torch.arange(experts, device=x.device)
    if len(x_NF) == experts:
        routed = x_NF.any(-1)
        return x_NF[routed], numbers[:, None].expand(routed.shape)[routed][:, None]
    return x_NF[0], numbers.expand(x_NF.shape[1], experts)


def _is_index(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64)
