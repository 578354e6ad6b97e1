"""An output head that is stored although config.json ties it to the embedding.

Engines then use the embedding and ignore the stored head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ckptq.checkpoint.header import StoredTensor
from ckptq.checkpoint.read import Files, bytes_of, read_into
from ckptq.verify.kinds import finding
from ckptq.verify.report import Finding
from ckptq.verify.roundtrip.tally import same_bytes
from ckptq.verify.subject import Subject, tied

CHUNK = 1 << 22


def check_tied_head(subject: Subject, files: Files) -> Iterator[Finding]:
    """A head that is not the embedding, unless the source is stored and declared so too."""
    source = subject.source
    if source is not None and tied(source):
        return
    ends = {
        name.rpartition(".")[0].rpartition(".")[2]: tensor
        for name, tensor in subject.ckpt.tensors.items()
        if name.endswith(".weight")
    }
    head, embedding = ends.get("lm_head"), ends.get("embed_tokens")
    if head is None or embedding is None or head.spec != embedding.spec:
        return
    if not subject.ties(head.name.removesuffix(".weight")):
        return
    if not _equal(head, embedding, files):
        found = f"differs from {embedding.name}, although tie_word_embeddings is true"
        wanted = "the embedding's weight"
        repair = "set tie_word_embeddings to false"
        yield finding("tied-head", head, found=found, wanted=wanted, repair=repair)


def _equal(a: StoredTensor, b: StoredTensor, files: Files) -> bool:
    for start in range(0, a.nbytes, CHUNK):
        count = min(CHUNK, a.nbytes - start)
        ours, theirs = torch.empty(count, dtype=torch.uint8), torch.empty(count, dtype=torch.uint8)
        read_into(files, a, start, bytes_of(ours))
        read_into(files, b, start, bytes_of(theirs))
        if not same_bytes(ours, theirs):
            return False
    return True
