"""Which tensors the kernels take, and what CUDA allows of a launch. Imports no triton."""

import os

from torch import Tensor

MOST_HEADS = 65535
"""Of all sequences of a launch together: CUDA takes no more programs along that axis."""


def on_gpu(x: Tensor) -> bool:
    """Whether a kernel takes x; where not, the reference beside it does.

    CKPTQ_EAGER=1 takes the reference on a GPU as well, to find out whether a wrong result is a
    kernel's fault.
    """
    return x.is_cuda and os.environ.get("CKPTQ_EAGER") != "1"
