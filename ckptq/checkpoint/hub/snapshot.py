"""A model of the hub: in its cache, whole or without the files of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ckptq.checkpoint.beside import AGAIN
from ckptq.checkpoint.hub.chunks import Chunks
from ckptq.checkpoint.hub.patience import said
from ckptq.checkpoint.hub.remote_file import RemoteFile
from ckptq.errors import SourceError
from ckptq.printable import size
from ckptq.progress import Begin, Report

LEFT = [pattern for again in AGAIN.values() for pattern in again]
SHARD = ".safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """A model at one commit. Its safetensors files at the top stay where they are."""

    hub_id: str
    commit: str
    path: Path
    """The folder in the cache that has its other files."""
    names: frozenset[str]
    """Of all its files at the top."""
    chunks: Chunks = field(default_factory=Chunks)

    def remote(self, name: str) -> RemoteFile:
        """One of its files, to be read by ranges."""
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.hub_id, name, revision=self.commit)
        return RemoteFile.find(self.path / name, url, self.commit, self.chunks)

    def fetch_others(self, shards: Collection[Path]) -> None:
        """Download the safetensors files at the top that are not these."""
        theirs = {file.name for file in shards}
        others = [n for n in self.names if n.endswith(SHARD) and n not in theirs]
        if others:
            with delivering(self.hub_id, self.commit):
                _download(self.hub_id, self.commit, ignore=LEFT, allow=others)


def download(hub_id: str, revision: str | None) -> Path:
    """The folder in the cache, once everything is in it."""
    with delivering(hub_id, revision):
        return _download(hub_id, revision, ignore=LEFT)


def begin_stream(hub_id: str, revision: str | None) -> Snapshot:
    """Find the commit, and download what is small."""
    from huggingface_hub import HfApi

    with delivering(hub_id, revision):
        info = HfApi().model_info(hub_id, revision=revision)
        files = [sibling.rfilename for sibling in info.siblings or ()]
        names = frozenset(name for name in files if "/" not in name)
        tensors = [name for name in names if name.endswith(SHARD)]
        path = _download(hub_id, str(info.sha), ignore=[*LEFT, *tensors])
    return Snapshot(hub_id=hub_id, commit=str(info.sha), path=path, names=names)


def with_network(begin: Begin, chunks: Chunks) -> Begin:
    """Progress that also says how much has come over the network."""

    def beginning(task: str, total: int, unit: str = "bytes") -> Report:
        report = begin(task, total, unit)

        def told(what: str, done: int) -> None:
            report(f"{what}; {size(chunks.fetched)} from the hub", done)

        return told

    return beginning


def _download(
    hub_id: str, revision: str | None, ignore: Sequence[str], allow: Sequence[str] | None = None
) -> Path:
    from huggingface_hub import snapshot_download

    found = snapshot_download(
        hub_id,
        revision=revision,
        ignore_patterns=list(ignore),
        allow_patterns=None if allow is None else list(allow),
    )
    return Path(found)


@contextmanager
def delivering(hub_id: str, revision: str | None) -> Iterator[None]:
    """The hub's errors as a SourceError."""
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import (  # HTTPError: of its client, httpx or httpx2
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise SourceError(f"{hub_id}: no such folder, and not a hub id: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        if is_offline_mode():
            raise SourceError(
                f"{hub_id}: no such folder here; the hub's cache does not have it{at}, and "
                "HF_HUB_OFFLINE is set"
            ) from error
        raise SourceError(
            f"{hub_id}: no such folder here, and the hub did not deliver it{at}: {said(error)}"
        ) from error
