"""A hub on the loopback: what huggingface_hub's client asks for, from memory, with the faults a network has.

Large files (LFS) are redirected to another address, as the hub does; ranges are served, so downloads can resume.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"
LARGE = (".bin", ".safetensors", ".zst", ".parquet")


@dataclass
class Hub:
    """``repositories``: ``models/NAME`` or ``datasets/NAME`` to its files. ``gated``: names that answer 401.
    ``cuts``: a file's name to the byte at which its connection ends, and how many times more that happens.
    ``requests``: method, path, range.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cuts: dict[str, tuple[int, int]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    address: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.split("/")
        if not path:
            self.end(200, b"")
        elif parts[0] == "cdn":
            self.content("/".join(parts[1:4]), "/".join(parts[4:]))
        elif parts[0] == "api":
            self.about("/".join(parts[1:4]), parts[4:])
        else:
            kind = parts.pop(0) if parts[0] == "datasets" else "models"
            assert parts[2] == "resolve", path
            self.resolve("/".join([kind, *parts[:2]]), "/".join(parts[4:]))

    def refused(self, name: str) -> bool:
        if name in self.hub.gated:
            self.end(401, b"{}", {"X-Error-Code": "GatedRepo"})
        elif name not in self.hub.repositories:
            self.end(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            return False
        return True

    def about(self, name: str, rest: list[str]) -> None:
        """``revision``: the commit; ``tree``: the files."""
        if self.refused(name):
            return
        files = self.hub.repositories[name]
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                | ({"lfs": {"oid": digest(content), "size": len(content), "pointerSize": 134}} if large(file) else {})
                for file, content in files.items()
            ]
            self.end(200, json.dumps(entries).encode())
        else:
            siblings = [{"rfilename": file} for file in files]
            about = {"_id": "0", "id": name.split("/", 1)[1], "sha": COMMIT, "siblings": siblings, "private": False}
            self.end(200, json.dumps(about | {"tags": [], "downloads": 0, "likes": 0}).encode())

    def resolve(self, name: str, file: str) -> None:
        if self.refused(name):
            return
        content = self.hub.repositories[name].get(file)
        if content is None:
            self.end(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif large(file):
            linked = {"X-Linked-Etag": f'"{digest(content)}"', "X-Linked-Size": str(len(content))}
            place = {"Location": f"{self.hub.address}/cdn/{name}/{file}", "X-Repo-Commit": COMMIT}
            self.end(302, b"", linked | place)
        else:
            self.content(name, file)

    def content(self, name: str, file: str) -> None:
        """A file, or the rest of it, or less where it is to be cut."""
        content = self.hub.repositories[name][file]
        headers = {"ETag": f'"{digest(content) if large(file) else hashlib.sha1(content).hexdigest()}"'}
        headers |= {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        end, times = self.hub.cuts.get(file, (0, 0))
        cut = times > 0 and self.command == "GET"
        sent = content[start:end] if cut else content[start:]
        self.end(206 if start else 200, sent, headers | {"Content-Length": str(len(content) - start)})
        if cut:
            self.hub.cuts[file] = end, times - 1
            self.close_connection = True

    def end(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing on stderr."""


def large(file: str) -> bool:
    return file.endswith(LARGE)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
