"""What multi-head latent attention caches, seen while transformers runs it.

Engines cache one row a token for all heads: the normed latent, of which `kv_b_proj` computes keys
and values, and the part of the key that RoPE turns, which all heads share. transformers computes k
and v of all heads before it calls attention. So the latent is taken where it goes into `kv_b_proj`
(after LongCat's factor, which vLLM folds into the norm), the rest from the end of the keys.

Shape letters: B batch, H heads, S positions, L size of the latent, P of the part with positions, D
size of a key, R = L + P.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

INTO, OUT_OF = "kv_a_proj_with_mqa", "kv_b_proj"
"""The Linears that make the latent, and keys and values of it."""

Change = Callable[[str, "Tensor"], "Tensor"]
"""Gets (attention module, a part of its rows [..., L] or [..., P]), gives what its cache returns.
"""


class Latents:
    """The latent attentions inside one layer, and the latents of the batch that runs."""

    def __init__(self, root: nn.Module, name: str) -> None:
        """Finds them in `root`, which is called `name`."""
        self._modules = {
            path: module
            for path, module in root.named_modules(prefix=name)
            if hasattr(module, INTO) and hasattr(module, OUT_OF)
        }
        self._held: dict[str, Tensor] = {}

    def __contains__(self, module: str) -> bool:
        return module in self._modules

    def __len__(self) -> int:
        return len(self._modules)

    @contextmanager
    def watched(self, change: Change | None = None) -> Iterator[None]:
        """In the block, latents are held for `row`, and replaced by what `change` makes of them."""
        with ExitStack() as stack:
            for path, module in self._modules.items():
                hook = self._hook(path, change)
                handle = getattr(module, OUT_OF).register_forward_pre_hook(hook)
                stack.callback(handle.remove)
            try:
                yield
            finally:
                self._held.clear()

    def _hook(self, path: str, change: Change | None) -> Callable[..., Any]:
        def hold(_: nn.Module, given: tuple[Any, ...]) -> Any:
            self._held[path] = given[0]
            return None if change is None else (change(path, given[0]), *given[1:])

        return hold

    def positions(self, module: str, k_BHSD: Tensor) -> Tensor:
        """The part of the keys that has positions, [B, H, S, P], of which all heads are equal."""
        latent, key = getattr(self._modules[module], OUT_OF), getattr(self._modules[module], INTO)
        P = key.weight.shape[0] - latent.weight.shape[1]
        return k_BHSD[..., k_BHSD.shape[-1] - P :]

    def cached(self, module: str, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """What has a cache scale, by letter: q, k and v; of latent attention its row as k and v."""
        if module in self:
            return dict.fromkeys("kv", self.row(module, k))
        return {"q": q, "k": k, "v": v}

    def row(self, module: str, k_BHSD: Tensor) -> Tensor:
        """The row that is cached for each position, [B, 1, S, R]."""
        positions_B1SP = self.positions(module, k_BHSD)[:, :1]
        B, _, S, _ = positions_B1SP.shape
        return torch.cat([self._held[module].reshape(B, 1, S, -1), positions_B1SP], -1)
