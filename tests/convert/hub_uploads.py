"""The half of a hub that takes uploads, with the faults of a real one.

POST /api/repos/create                        the repository, 409 if there is one
POST /api/validate-yaml                       the model card
POST /api/models/ORG/NAME/preupload/REV       which files go to the store (LFS)
POST /ORG/NAME.git/info/lfs/objects/batch     where: links, one for each part of a large file
PUT  /upload/OID[?part=N]                     the bytes
POST /complete/OID, /verify/OID               the parts together, their digest
POST /api/models/ORG/NAME/commit/REV          ndjson: everything at once
GET  /api/models/ORG/NAME/tree/REV            what is there
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "hf_of_this_test"
OWN = "org"
"""The organization to which the token may write."""


@dataclass
class UploadFaults:
    """What goes wrong; each can be changed while the server runs."""

    errors: int = 0
    """How many of the next requests, of any kind, are answered `status`."""
    each: int = 0
    """Every n-th request is answered `status` too."""
    status: int = 500
    cuts: int = 0
    """How many of the next files break off in the middle."""
    lost_commits: int = 0
    """How many of the next commits are made without an answer."""
    spoil: str | None = None
    """A file of which another byte is kept."""


@dataclass
class Repository:
    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    stored: set[str] = field(default_factory=set)
    """The files that lie in the store (LFS)."""
    commits: list[list[str]] = field(default_factory=list)
    """The files of each."""

    @property
    def head(self) -> str:
        return f"{len(self.commits):040x}"


@dataclass
class Uploads:
    """Repositories, and the store that they share."""

    most_bytes: int = 88_500
    """Files of more are sent in parts."""
    part_bytes: int = 30_000
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    received: Counter[str] = field(default_factory=Counter)
    """How often each object has come whole."""
    requests: int = 0
    faults: UploadFaults = field(default_factory=UploadFaults)
    lock: threading.Lock = field(default_factory=threading.Lock)
    before: Any = None
    """Called with the path of each request, before it is answered."""

    def visible(self) -> dict[str, list[str]]:
        return {name: sorted(repo.files) for name, repo in self.repositories.items()}


class TakesUploads(BaseHTTPRequestHandler):
    """Answers the requests above; its `uploads` and `origin` are the server's."""

    @property
    def uploads(self) -> Uploads:
        raise NotImplementedError

    @property
    def origin(self) -> str:
        raise NotImplementedError

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        data = self._received()
        if self._failing(path):
            return
        uploads = self.uploads
        if match := re.fullmatch(r"/(complete|verify)/(\w+)", path):
            self._completed(match[1], match[2], json.loads(data))
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._say(401, {"error": "Invalid username or password."})
        elif path == "/api/validate-yaml":
            bad = "base_model: bad" in json.loads(data)["content"]
            self._say(400 if bad else 200, {"errors": [{"message": "base_model is bad"}][:bad]})
        elif path == "/api/repos/create":
            self._create(json.loads(data))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/\w+", path):
            repository = uploads.repositories.get(match[1])
            if repository is None:
                self._say(404, {"error": "none"}, {"X-Error-Code": "RepoNotFound"})
            elif not match[1].startswith(f"{OWN}/"):
                self._say(403, {"error": "You don't have the rights to write there"})
            elif match[2] == "preupload":
                self._modes(repository, json.loads(data))
            else:
                self._commit(match[1], repository, [json.loads(s) for s in data.splitlines()])
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._links(json.loads(data)["objects"])
        else:
            self._say(404, {"error": f"nothing at {path}"})

    def do_PUT(self) -> None:
        assert "Authorization" not in self.headers, "the token leaves the hub"
        uploads, url = self.uploads, urlsplit(self.path)
        oid = url.path.removeprefix("/upload/")
        count = int(self.headers["Content-Length"])
        with uploads.lock:
            cut = uploads.faults.cuts > 0
            uploads.faults.cuts -= cut
        if cut:
            self.rfile.read(count // 2)
            self.close_connection = True
            self.connection.close()
            return
        data = self.rfile.read(count)
        if self._failing(url.path):
            return
        number = parse_qs(url.query).get("part")
        if number is None:
            self._keep(oid, data)
        else:
            with uploads.lock:
                uploads.parts.setdefault(oid, {})[int(number[0])] = data
        self._say(200, {}, {"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    def tree(self, repository: Repository) -> None:
        """The files of a repository, as `list_repo_tree` reads them."""
        found = []
        for name, data in repository.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob}
            if name in repository.stored:
                oid = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
            found.append(entry)
        self._say(200, found)

    def _create(self, asked: dict[str, Any]) -> None:
        uploads, name = self.uploads, f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != OWN:
            self._say(403, {"error": "You don't have the rights to create a model there"})
            return
        there = name in uploads.repositories
        made = Repository(
            private=asked.get("visibility") == "private" or bool(asked.get("private"))
        )
        uploads.repositories.setdefault(name, made)
        self._say(409 if there else 200, {"url": f"{self.origin}/{name}"})

    def _modes(self, repository: Repository, asked: dict[str, Any]) -> None:
        found = []
        for file in asked["files"]:
            name = file["path"]
            large = name.endswith(".safetensors")
            held = repository.files.get(name)
            digest = None
            if held is not None and large:
                digest = hashlib.sha256(held).hexdigest()
            elif held is not None:
                digest = hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()
            mode = "lfs" if large else "regular"
            found.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": digest})
        self._say(200, {"files": found})

    def _links(self, objects: list[dict[str, Any]]) -> None:
        """Nothing to do for an object that is there."""
        uploads, found = self.uploads, []
        for entry in objects:
            oid, size = entry["oid"], entry["size"]
            answer = {"oid": oid, "size": size}
            if oid not in uploads.objects:
                upload: dict[str, Any] = {"href": f"{self.origin}/upload/{oid}"}
                if size > uploads.most_bytes:
                    count = -(-size // uploads.part_bytes)
                    links = {str(n): f"{upload['href']}?part={n}" for n in range(1, count + 1)}
                    upload = {
                        "href": f"{self.origin}/complete/{oid}",
                        "header": {"chunk_size": str(uploads.part_bytes), **links},
                    }
                verify = {"href": f"{self.origin}/verify/{oid}"}
                answer["actions"] = {"upload": upload, "verify": verify}
            found.append(answer)
        self._say(200, {"transfer": "basic", "objects": found})

    def _completed(self, what: str, oid: str, asked: dict[str, Any]) -> None:
        uploads = self.uploads
        if what == "complete":
            parts = uploads.parts.pop(oid)
            self._keep(oid, b"".join(parts[part["partNumber"]] for part in asked["parts"]))
        self._say(200 if oid in uploads.objects else 422, {})

    def _keep(self, oid: str, data: bytes) -> None:
        assert hashlib.sha256(data).hexdigest() == oid
        with self.uploads.lock:
            self.uploads.objects[oid] = data
            self.uploads.received[oid] += 1

    def _commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        uploads, files = self.uploads, {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = uploads.objects[value["oid"]]
                repository.stored.add(value["path"])
            else:
                assert line["key"] == "file", line["key"]
                files[value["path"]] = base64.b64decode(value["content"])
        if uploads.faults.spoil in files:
            files[uploads.faults.spoil] = files[uploads.faults.spoil][:-1] + b"\xff"
        repository.files |= files
        repository.commits.append(sorted(files))
        if uploads.faults.lost_commits:
            uploads.faults.lost_commits -= 1
            self.close_connection = True
            self.connection.close()
            return
        url = f"{self.origin}/{name}/commit/{repository.head}"
        self._say(200, {"success": True, "commitOid": repository.head, "commitUrl": url})

    def _received(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while count := int(self.rfile.readline(), 16):
            data += self.rfile.read(count)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _failing(self, path: str) -> bool:
        """Whether this request fails, and is answered."""
        uploads = self.uploads
        if uploads.before is not None:
            uploads.before(path)
        with uploads.lock:
            faults = uploads.faults
            uploads.requests += 1
            failing = faults.errors > 0 or (faults.each and uploads.requests % faults.each == 0)
            faults.errors -= faults.errors > 0
        if failing:
            self._say(uploads.faults.status, {"error": "not now"})
        return bool(failing)

    def _say(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        if isinstance(value, dict) and "error" in value:
            self.send_header("X-Error-Message", value["error"])
        for name, text in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)
