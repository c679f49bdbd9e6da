"""A local server that speaks both hubs' protocols, and can be told to misbehave."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    files: dict[str, bytes]
    """The repository OWNER/NAME."""
    cut_after: list[int] = field(default_factory=list)
    """For each of the next answers with a body: break off after so many bytes; -1 is whole."""
    wrong: set[str] = field(default_factory=set)
    """Files that are sent with other content of the same length."""
    status: dict[str, list[int]] = field(default_factory=dict)
    """Statuses to answer with for a file, before it is sent."""
    ranges: bool = True
    etag: str = '"one"'
    extra: dict[str, int] = field(default_factory=dict)
    """Names that are listed, but not there."""
    token: str = ""
    """Needed, if set."""
    seen: list[tuple[str, str]] = field(default_factory=list)
    """(path, Range header) of every request."""
    url: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            hub.seen.append((self.path, self.headers.get("Range", "")))
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._answer(401, b"{}")
            elif url.path in ("/api/models/OWNER/NAME/revision/main", "/api/models/OWNER/NAME/revision/v1"):
                self._answer(200, json.dumps({"sha": COMMIT, "siblings": self._siblings()}).encode())
            elif url.path.startswith(f"/OWNER/NAME/resolve/{COMMIT}/"):
                self._file(unquote(url.path.removeprefix(f"/OWNER/NAME/resolve/{COMMIT}/")))
            elif url.path == "/api/v1/models/OWNER/NAME/repo/files":
                listed = [
                    {"Path": name, "Size": len(data), "Type": "blob", "Sha256": hashlib.sha256(data).hexdigest()}
                    for name, data in hub.files.items()
                ]
                self._answer(
                    200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": [{"Path": "d", "Type": "tree"}, *listed]}}).encode()
                )
            elif url.path == "/api/v1/models/OWNER/NAME/repo":
                self._file(query["FilePath"])
            else:
                self._answer(404, b'{"error": "not found"}')

        def _siblings(self) -> list[dict[str, object]]:
            found: list[dict[str, object]] = [{"rfilename": name, "size": size, "blobId": "0" * 40} for name, size in hub.extra.items()]
            for name, data in hub.files.items():
                if name.endswith((".bin", ".gguf", ".safetensors")):
                    large = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
                    found.append({"rfilename": name, "size": len(data), "lfs": large})
                else:
                    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                    found.append({"rfilename": name, "size": len(data), "blobId": blob})
            return found

        def _file(self, name: str) -> None:
            if hub.status.get(name):
                self._answer(hub.status[name].pop(0), b"")
                return
            if name not in hub.files:
                self._answer(404, b"")
                return
            data = hub.files[name]
            if name in hub.wrong:
                data = bytes(byte ^ 1 for byte in data)
            start = 0
            asked = self.headers.get("Range", "")
            if hub.ranges and asked and self.headers.get("If-Range", hub.etag) == hub.etag:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= len(data):
                    self._answer(416, b"")
                    return
            headers = {"ETag": hub.etag}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._answer(206 if start else 200, data[start:], headers)

        def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            cut = hub.cut_after.pop(0) if headers and hub.cut_after else -1
            self.wfile.write(body if cut < 0 else body[:cut])
            if 0 <= cut < len(body):
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
