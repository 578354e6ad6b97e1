"""Where a Linear's weight comes from: stored as it is, or stored quantized.

The two look alike to a plan and to the pipeline: `spec` [R, C], `quantum` (rows may be read from
multiples of it on), `streams` (whether they are runs of bytes), `stored` (what messages name).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.view import View
from ckptq.errors import SourceError
from ckptq.models.encoded import Encoded

Weight = View | Encoded


@contextmanager
def naming(linear: str, stored: StoredTensor) -> Iterator[None]:
    """Name the file and tensor that hold a value which no scale can bring into range."""
    from ckptq.quantize.tiles import NonFinite

    try:
        yield
    except NonFinite as error:
        raise SourceError(
            f"{stored.file}: tensor {stored.name!r} (for {linear}): {error}"
        ) from error
