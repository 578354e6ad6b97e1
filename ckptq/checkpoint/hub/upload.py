"""An output on its way to a repository of the hub: each shard as soon as it is finished, and one
commit at the end, by which all files appear at once.

Token, endpoint and transfer (Xet or LFS) are huggingface_hub's. What the hub has already, by its
digest, is not sent again, so that a repeated run sends only what is missing.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from ckptq import __version__
from ckptq.checkpoint.hub.patience import Answer, patiently, said
from ckptq.errors import CkptqError, FoundWrong, MachineError, UsageError
from ckptq.progress import Begin, Note, untold

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.hf_api import RepoFile

WEIGHTS = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Destination:
    """A repository to upload to; it is made if there is none."""

    name: str
    private: bool = False
    """Whether it is made private; one that exists stays as it is."""


class Upload:
    """One output on its way. `begin`, then `offer` shards, then `stop`, then `finish`."""

    def __init__(
        self, to: Destination, weights: Collection[str], card: bytes, note: Note = untold
    ) -> None:
        """`weights` are the names of the output's shards and index, and of other files of weights
        beside them; `card` is its README.md."""
        self.name = to.name
        self.url: str | None = None
        """Of the commit, once it is made."""
        self._private = to.private
        self._weights = frozenset(weights)
        self._card = card
        self._note = note
        self._sent: dict[str, CommitOperationAdd] = {}
        self._offered: SimpleQueue[Path | None] = SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._send_offered, daemon=True)

    def begin(self) -> None:
        """Make the repository. UsageError where it, or writing to it, is refused, or where it holds
        other weights."""
        from huggingface_hub import CommitOperationAdd, HfApi, is_offline_mode

        if is_offline_mode():
            raise UsageError(
                f"--push {self.name}: HF_HUB_OFFLINE is set; unset it, or leave out --push"
            )
        api, private = HfApi(), self._private or None
        made = self._ask(lambda: api.create_repo(self.name, private=private, exist_ok=True))
        self.name = made.repo_id
        self._ask(lambda: _check_card(self._card))
        trial = CommitOperationAdd("README.md", self._card)  # may it be written? Nothing is sent
        self._ask(lambda: api.preupload_lfs_files(self.name, [trial]))
        self._check_weights(self._ask(lambda: api.list_repo_files(self.name)))
        self._thread.start()

    def offer(self, file: Path) -> None:
        """Send a finished shard in the background. If that fails, `finish` tries again."""
        self._offered.put(file)

    def stop(self) -> None:
        """Wait for the shard that is being sent; the others are left to `finish`."""
        self.close()
        self._thread.join()

    def close(self) -> None:
        """Let the thread end with the shard that it is sending."""
        self._stopped = True
        self._offered.put(None)

    def finish(self, out: Path, begin: Begin) -> None:
        """Send what has not been sent, make the commit, and compare what is there then.

        MachineError where the hub does not answer, UsageError where it refuses; both say what is
        left to do.
        """
        names = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
        shards = [name for name in names if name in self._weights and name.endswith(WEIGHTS[0])]
        sizes = {name: (out / name).stat().st_size for name in shards if name not in self._sent}
        try:
            report = begin("upload", sum(sizes.values()))
            for name, size in sizes.items():
                self._send(name, out / name)
                report(name, size)
            self._commit({name: self._addition(name, out / name) for name in names})
        except (MachineError, UsageError) as error:
            left = [name for name in shards if name not in self._sent]
            raise type(error)(
                f"{error}\n{out} is complete; {len(left)} of its {len(shards)} shards are not yet "
                f"uploaded, nothing is visible there; rerun the same command to go on"
            ) from error

    def _commit(self, additions: Mapping[str, CommitOperationAdd]) -> None:
        """All files in one commit; FoundWrong where the hub does not have these bytes then."""
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api, message = HfApi(), f"Upload model made by ckptq {__version__}"
        commit = self._ask(
            lambda: api.create_commit(self.name, additions.values(), commit_message=message)
        )
        listed = self._ask(
            lambda: list(api.list_repo_tree(self.name, recursive=True, revision=commit.oid))
        )
        there = {file.path: file for file in listed if isinstance(file, RepoFile)}
        for name, addition in additions.items():
            if name not in there or not _same(there[name], addition):
                held = "is not there" if name not in there else "differs"
                raise FoundWrong(
                    f"{self.name}/{name}: {held} after the upload ({commit.commit_url})"
                )
        self.url = commit.commit_url

    def _send_offered(self) -> None:
        while (file := self._offered.get()) is not None and not self._stopped:
            try:
                self._send(file.name, file)
            except CkptqError as error:
                self._note(f"{error}; it is tried again at the end")

    def _send(self, name: str, file: Path) -> None:
        from huggingface_hub import HfApi

        api, addition = HfApi(), self._addition(name, file)
        self._ask(lambda: api.preupload_lfs_files(self.name, [addition], free_memory=False), name)
        self._sent[name] = addition

    def _addition(self, name: str, file: Path) -> CommitOperationAdd:
        """The file as part of the commit; the one that was sent, from where it is now."""
        from huggingface_hub import CommitOperationAdd

        path = str(file.absolute())
        if name not in self._sent:
            return CommitOperationAdd(name, path)
        self._sent[name].path_or_fileobj = path
        return self._sent[name]

    def _check_weights(self, names: Iterable[str]) -> None:
        """UsageError for a repository with weights that this output does not replace."""
        at_top = (name for name in names if "/" not in name and name.endswith(WEIGHTS))
        others = sorted(set(at_top) - self._weights)
        if others:
            more = f" and {len(others) - 1} more" if others[1:] else ""
            raise UsageError(
                f"--push {self.name}: holds weights that this output would not replace "
                f"({others[0]}{more}); delete them there, or push to another repository"
            )

    def _ask(self, ask: Callable[[], Answer], name: str | None = None) -> Answer:
        """The hub's answer, its errors as ours."""
        what = f"{self.name}/{name}" if name else self.name
        try:
            with _without_bars():
                return patiently(what, ask, self._refused)
        except ValueError as error:  # of names, of the card, of what the hub says about a file
            raise UsageError(f"--push {what}: {' '.join(str(error).split())}") from error

    def _refused(self, error: Exception, status: int) -> UsageError:
        from huggingface_hub import get_token

        if status == 401 and get_token() is None:
            why = "there is no token; log in with `hf auth login`, or set HF_TOKEN"
        elif status == 401:
            why = "the hub does not accept the token; log in again with `hf auth login`"
        elif status == 403:
            why = f"the token does not permit to write there ({said(error)})"
        else:
            why = f"the hub refused it: {said(error)}"
        return UsageError(f"--push {self.name}: {why}")


def _check_card(card: bytes) -> None:
    """ValueError for a model card that the hub would not take: at the end it is too late."""
    from huggingface_hub import HfApi, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = f"{HfApi().endpoint}/api/validate-yaml"
    content = {"content": card.decode(), "repoType": "model"}
    answer = get_session().post(url, json=content, headers=build_hf_headers())
    if answer.status_code == 400:
        raise ValueError(f"the hub does not accept the model card: {answer.text}")
    hf_raise_for_status(answer)


def _same(file: RepoFile, addition: CommitOperationAdd) -> bool:
    """Whether the hub has these bytes."""
    if file.lfs is not None:
        return file.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as held:
        data = held.read()
    return file.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the client's own progress bars, which would be drawn over ours."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shown = not are_progress_bars_disabled()
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
