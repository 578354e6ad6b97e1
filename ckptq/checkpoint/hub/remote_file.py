"""A file of the hub at one commit, read by ranges of bytes, and never on this disk.

Address, token, session and metadata are huggingface_hub's. A connection that breaks goes on from
the byte where it broke; a link that has expired is asked for anew. What is asked for anew must be
the same file: etag, commit and size.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ckptq.checkpoint.hub import patience
from ckptq.checkpoint.hub.chunks import CHUNK, Chunks
from ckptq.checkpoint.hub.patience import TRIES, patiently, said
from ckptq.errors import MachineError, SourceError

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

SECONDS = 30
"""In which something must arrive."""

EXPIRED = (401, 403, 404, 410)
"""How storages answer a signed link whose time is over."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RemoteFile:
    """One file of a repository. It stands where a local file's `Identity` does."""

    file: Path
    """Where it would be in the cache."""
    url: str
    commit: str
    etag: str
    size: int
    chunks: Chunks = field(repr=False)
    links: dict[str, str] = field(default_factory=dict, repr=False)
    """The signed link in use, under "now"."""

    @property
    def identity(self) -> RemoteFile:
        return self

    @staticmethod
    def find(file: Path, url: str, commit: str, chunks: Chunks) -> RemoteFile:
        """Ask the hub about it; no byte of the file is read."""
        found = _asked(file, url)
        if found.size is None or found.etag is None:
            raise SourceError(f"{file}: the hub does not say how large it is; download it instead")
        link = {"now": found.location}
        return RemoteFile(
            file=file, url=url, commit=commit, etag=found.etag, size=found.size,
            chunks=chunks, links=link,
        )  # fmt: skip

    def check_unchanged(self) -> None:
        """SourceError unless the hub still has this very file; its link is new then."""
        now = _asked(self.file, self.url)
        for what, had, has in (
            ("etag", self.etag, now.etag),
            ("commit", self.commit, now.commit_hash),
            ("size", self.size, now.size),
        ):
            if had != has:
                raise SourceError(
                    f"{self.file}: changed on the hub while it was read: its {what} was {had}, "
                    f"is {has}; run the command again with --restart"
                )
        self.links["now"] = now.location

    def read(self, start: int, count: int) -> bytes:
        """These bytes, fewer if the file ends; not kept."""
        return self._fetch(start, min(start + count, self.size))

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes from `start` on."""
        done = 0
        while done < len(buffer):
            number, skip = divmod(start + done, CHUNK)
            chunk = memoryview(self._chunk(number))[skip : skip + len(buffer) - done]
            buffer[done : done + len(chunk)] = chunk
            done += len(chunk)

    def _chunk(self, number: int) -> bytes:
        start = number * CHUNK
        stop = min(start + CHUNK, self.size)
        return self.chunks.get((self.file, number), lambda: self._fetch(start, stop))

    def _fetch(self, start: int, stop: int) -> bytes:
        """The bytes of a range. MachineError if nothing arrives TRIES times in a row."""
        from huggingface_hub.errors import HTTPError

        data = bytearray()
        tries = 0
        while start + len(data) < stop:
            had = len(data)
            seen = "the connection ended early"
            try:
                for piece in self._pieces(start + had, stop):
                    data += piece
                    self.chunks.count(len(piece))
            except (HTTPError, OSError) as error:
                seen = said(error)
            tries = 0 if len(data) > had else tries + 1
            if tries > TRIES:
                raise MachineError(
                    f"{self.file}: bytes {start + had:,} to {stop:,} did not arrive from the hub "
                    f"in {TRIES} tries: {seen}; rerun the same command to resume"
                )
            if tries:
                time.sleep(patience.WAIT * 2 ** (tries - 1))
        return bytes(data)

    def _pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """One request."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        link = self.links["now"]
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if urlsplit(link).netloc == urlsplit(self.url).netloc:
            headers = {**build_hf_headers(), **headers}
        session: Any = get_session()
        with session.stream(
            "GET", link, headers=headers, timeout=SECONDS, follow_redirects=True
        ) as answer:
            if answer.status_code in EXPIRED:
                self.check_unchanged()
            hf_raise_for_status(answer)
            self._check_range(answer.status_code, answer.headers, start, stop)
            left = stop - start
            for piece in answer.iter_raw():
                left -= len(piece)
                if left < 0:
                    raise MachineError(
                        f"{self.file}: asked for bytes {start:,} to {stop:,}, the server sent more"
                    )
                yield piece

    def _check_range(self, status: int, headers: Any, start: int, stop: int) -> None:
        """SourceError unless these bytes of a file of this size follow, as they are stored."""
        encoding = headers.get("Content-Encoding", "identity")
        if encoding != "identity":  # bytes of a compressed answer would be taken for the file's
            raise MachineError(
                f"{self.file}: asked for bytes {start:,} to {stop:,} as they are stored, the "
                f"server (or a proxy) sent them in {encoding}; download the model first"
            )
        if status == 200 and (start, stop) == (0, self.size):
            return
        said = headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", said)
        if status != 206 or found is None:
            raise MachineError(
                f"{self.file}: asked for bytes {start:,} to {stop:,}, the server answered {status} "
                f"with {said or 'no Content-Range'}; without ranges, download the model first"
            )
        if tuple(map(int, found.groups())) != (start, stop - 1, self.size):
            raise SourceError(
                f"{self.file}: changed on the hub while it was read: expected bytes "
                f"{start}-{stop - 1}/{self.size}, found {said}"
            )


def _asked(file: Path, url: str) -> HfFileMetadata:
    """What the hub says about a file."""
    from huggingface_hub import get_hf_file_metadata

    def refused(error: Exception, _: int) -> SourceError:
        return SourceError(f"{file}: the hub refused it: {said(error)}")

    return patiently(file, lambda: get_hf_file_metadata(url), refused)
