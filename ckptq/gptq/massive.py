"""Tokens with massive activations, which would rule a Hessian alone.

Some layers of a trained model blow up the first token of a text, or a delimiter, to hundreds of
times the size of all others (Sun et al., "Massive Activations in Large Language Models", 2024). The
Hessian sums squares: in SmolLM2's layer 11 one token of 512 outweighs the others by a factor of
500, and GPTQ spends every other token's accuracy on it. So it is left out. Without such tokens
nothing is, and Hessians are llm-compressor's.

Shape letters: T tokens, F features in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TIMES_MEDIAN = 30.0
"""A token is massive if its norm is larger than the median of its batch by this factor. SmolLM2's
are 54 times the median in its layer 28, and 600 times in its layer 11."""

FEWEST = 16
"""Of fewer tokens the median says too little."""


def ordinary(x_TF: Tensor) -> Tensor:
    """The tokens without massive ones: the same tensor where there are none."""
    if len(x_TF) < FEWEST:
        return x_TF
    norm_T = x_TF.float().norm(dim=1)
    massive_T = norm_T > TIMES_MEDIAN * norm_T.median()
    return x_TF[~massive_T] if massive_T.any() else x_TF
