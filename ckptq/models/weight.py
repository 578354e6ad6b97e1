"""Where a Linear's weight comes from: stored as it is, or stored quantized.

The two look alike to a plan and to the pipeline: `spec` [R, C], `quantum` (rows may be read from
multiples of it on), `streams` (whether they are runs of bytes), `stored` (what messages name).
"""

from __future__ import annotations

from ckptq.checkpoint.view import View
from ckptq.models.encoded import Encoded

Weight = View | Encoded
