"""A hub on this machine: what huggingface_hub's client asks for, with the faults of a real one.
Uploads are in hub_uploads.py.

    GET  /api/models/ORG/NAME[/revision/REV]      the commit and the files
    HEAD /ORG/NAME/resolve/REV/FILE               etag, commit, size; shards redirect to a link
    GET  /store/FILE?until=N                      the bytes, by range; the link serves N requests

`python tests/convert/hub_server.py FOLDER` serves a folder as org/model, for trying by hand.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_uploads import TakesUploads, Uploads

MODEL = "org/model"


@dataclass
class Faults:
    """What goes wrong; each can be changed while the server runs."""

    seconds: float = 0.0
    """Before each answer."""
    errors: int = 0
    """How many of the next requests for bytes are answered 500."""
    cut_after: int = 0
    """Bytes of an answer after which the connection is closed; 0 for all."""
    cuts: int = 0
    """How many of the next answers are cut off."""
    link_lasts: int = 0
    """Requests that a signed link serves; 0 for any number."""
    ranges: bool = True
    encoded: bool = False
    """Answers say that they are compressed, as a proxy makes them."""
    surplus: bytes = b""
    """Follows each answer."""


@dataclass
class Hub:
    """A folder, served as a repository."""

    folder: Path
    commit: str = "c0ffee" + "0" * 34
    faults: Faults = field(default_factory=Faults)
    etags: dict[str, str] = field(default_factory=dict)
    """Of files, where they are not the sizes."""
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    """(file, first byte, end) of what was asked for."""
    links: int = 0
    used: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    uploads: Uploads = field(default_factory=Uploads)
    server: Any = None

    def start(self, port: int = 0) -> Hub:
        hub = self
        handler = type("Bound", (_Handler,), {"hub": hub})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *about: None
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def store(self) -> str:
        """Another host, as a content delivery network is."""
        return f"http://localhost:{self.server.server_address[1]}/store"

    def files(self) -> list[str]:
        return sorted(
            str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file()
        )

    def etag(self, name: str) -> str:
        size = (self.folder / name).stat().st_size
        return self.etags.get(name) or hashlib.sha256(f"{name} {size}".encode()).hexdigest()

    def bytes_asked(self, name: str) -> int:
        return sum(stop - start for file, start, stop in self.ranges if file == name)


KEPT = ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_CACHE", "HF_HUB_OFFLINE")
KEPT += ("HF_HUB_DISABLE_XET",)


def keep(monkeypatch: Any) -> None:
    """Undo `use` at the end of a test."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    from ckptq.checkpoint.hub import patience, remote_file

    for name in KEPT:
        monkeypatch.setattr(constants, name, getattr(constants, name))
    monkeypatch.setattr(remote_file, "CHUNK", remote_file.CHUNK)
    monkeypatch.setattr(patience, "WAIT", patience.WAIT)
    monkeypatch.setattr(_http, "time", _http.time)


def use(endpoint: str, cache: Path, chunk: int = 1 << 16) -> None:
    """Make this process ask the server, with small requests and short waits."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    from ckptq.checkpoint.hub import patience, remote_file

    constants.ENDPOINT = endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE = str(cache)
    constants.HF_HUB_OFFLINE = False  # another test's process may have begun offline
    constants.HF_HUB_DISABLE_XET = True  # whose servers are not played here
    _http.time = _Hurried()  # type: ignore[assignment]
    remote_file.CHUNK = chunk
    patience.WAIT = 0.001


class _Hurried:
    """The module time for the client's own waits between tries."""

    sleep = staticmethod(lambda seconds: time.sleep(min(seconds, 0.001)))

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class _Handler(TakesUploads):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which waits 40 ms between the head and the body of an answer

    @property
    def uploads(self) -> Uploads:
        return self.hub.uploads

    @property
    def origin(self) -> str:
        return self.hub.endpoint

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        time.sleep(self.hub.faults.seconds)
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            self._model(path)
        elif path.startswith("/store/"):
            self._bytes(path.removeprefix("/store/"), body)
        else:
            self._resolve(path, body)

    def _model(self, path: str) -> None:
        hub = self.hub
        pushed = hub.uploads.repositories.get("/".join(path.split("/")[3:5]))
        if pushed is not None:
            if path.split("/")[5:6] == ["tree"]:
                self.tree(pushed)
            else:
                self._json({"_id": "0", "id": MODEL, "sha": pushed.head, "siblings": []})
            return
        if "/".join(path.split("/")[3:5]) != MODEL:
            self._head(404, {"X-Error-Code": "RepoNotFound", "Content-Length": 0})
            return
        siblings = [{"rfilename": name} for name in hub.files()]
        if path.split("/")[5:6] == ["tree"]:
            found = [
                {"type": "file", "path": n, "size": (hub.folder / n).stat().st_size, "oid": "0"}
                for n in hub.files()
            ]
            self._json(found)
            return
        asked = path.partition("/revision/")[2]
        commit = asked if len(asked) == 40 else hub.commit
        self._json({"_id": "0", "id": MODEL, "sha": commit, "siblings": siblings})

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": len(data)})
        self.wfile.write(data)

    def _resolve(self, path: str, body: bool) -> None:
        hub = self.hub
        _, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        commit = revision if len(revision) == 40 else hub.commit
        file = hub.folder / name
        if not file.is_file():
            self._head(404, {"X-Error-Code": "EntryNotFound", "Content-Length": 0})
            return
        size = file.stat().st_size
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hub.etag(name)}"'}
        if not name.endswith(".safetensors"):
            self._head(200, headers | {"Content-Length": size})
            if body:
                self.wfile.write(file.read_bytes())
            return
        with hub.lock:
            hub.links += 1
            link = f"{hub.store}/{name}?link={hub.links}"
        linked = {"X-Linked-Etag": f'"{hub.etag(name)}"', "X-Linked-Size": size}
        self._head(302, headers | linked | {"Location": link, "Content-Length": 0})

    def _bytes(self, name: str, body: bool) -> None:
        hub, faults = self.hub, self.hub.faults
        link = parse_qs(urlsplit(self.path).query)["link"][0]
        assert "Authorization" not in self.headers, "the token leaves the hub"
        with hub.lock:
            hub.used[link] = hub.used.get(link, 0) + 1
            expired = faults.link_lasts and hub.used[link] > faults.link_lasts
            failing = faults.errors > 0
            faults.errors -= failing
        if expired or failing:
            self._head(403 if expired else 500, {"Content-Length": 0})
            return
        size = (hub.folder / name).stat().st_size
        start, stop = 0, size
        asked = self.headers.get("Range") if faults.ranges else None
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, size)
        headers: dict[str, object] = {"Content-Length": stop - start + len(faults.surplus)}
        if faults.encoded:
            headers["Content-Encoding"] = "gzip"
        if asked:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        with hub.lock:
            hub.ranges.append((name, start, stop))
            cut = faults.cuts > 0 and 0 < faults.cut_after < stop - start
            faults.cuts -= cut
        self._head(206 if asked else 200, headers)
        with (hub.folder / name).open("rb") as file:
            file.seek(start)
            left = faults.cut_after if cut else stop - start
            while left and (piece := file.read(min(left, 1 << 20))):
                self.wfile.write(piece)
                left -= len(piece)
        self.wfile.write(faults.surplus)
        if cut:
            self.close_connection = True

    def _head(self, status: int, headers: dict[str, Any]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()


if __name__ == "__main__":
    hub = Hub(Path(sys.argv[1])).start(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    sys.stdout.write(f"{hub.endpoint}\n")
    sys.stdout.flush()
    threading.Event().wait()
