"""A Hugging Face hub on 127.0.0.1, as much of it as uploading a model asks for."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


@dataclass
class FakeHub:
    """What came in: repositories, their files, every request with its authorization."""

    token: str
    endpoint: str = ""
    visibility: dict[str, str] = field(default_factory=dict)  # of each repository
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)  # method, path
    unauthorized: int = 0
    _objects: dict[str, bytes] = field(default_factory=dict)  # large files by sha256

    def answer(
        self, method: str, path: str, body: bytes, authorization: str | None
    ) -> tuple[int, Any]:
        path = path.partition("?")[0]
        self.requests.append((method, path))
        if path.startswith("/objects/"):  # a signed URL carries no token
            self._objects[path.rpartition("/")[2]] = body
            return 200, {}
        if path.endswith("harnesses"):  # huggingface_hub asks this once, for its user agent
            return 404, {}
        if authorization != f"Bearer {self.token}":
            self.unauthorized += 1
            return 401, {"error": "Invalid credentials"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        repo = path.removeprefix("/api/models/").removeprefix("/").partition(".git/")[0]
        repo = "/".join(repo.split("/")[:2])
        if repo not in self.visibility:
            return 404, {"error": f"no repository {repo}"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {"files": [self._mode(file["path"]) for file in files]}
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.endpoint}/objects/{one['oid']}"}}}
                for one in wanted
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if "/commit/" in path:
            return self._commit(repo, [json.loads(line) for line in body.splitlines()])
        if method == "GET":
            return 200, {"id": repo, "sha": "0" * 40, "siblings": []}
        return 404, {"error": f"{method} {path} is not part of this fake"}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.endpoint}/{name}", "name": name, "id": name}
        if name in self.visibility:
            return 409, {"error": "You already created this model repo", **url}
        self.visibility[name] = wanted.get("visibility", "public")
        self.files[name] = {}
        return 200, url

    def _validate(self, content: str) -> tuple[int, Any]:
        metadata = yaml.safe_load(content.split("---\n")[1])
        if metadata.get("license") == "no-such-license":
            return 400, {
                "errors": [{"message": '"license" must be one of [apache-2.0, mit, ...]'}],
                "warnings": [],
            }
        return 200, {"errors": [], "warnings": []}

    def _mode(self, path: str) -> dict[str, Any]:
        large = path.endswith((".safetensors", ".png", ".onnx"))
        return {
            "path": path,
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
            "oid": None,
        }

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self._objects[value["oid"]]
        commit = "1" * 40
        url = f"{self.endpoint}/{repo}/commit/{commit}"
        return 200, {"commitUrl": url, "commitOid": commit, "pullRequestUrl": None}


@contextmanager
def serve_hub(token: str) -> Iterator[FakeHub]:
    hub = FakeHub(token)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self._body()
            status, content = hub.answer(
                self.command, self.path, body, self.headers.get("Authorization")
            )
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _handle

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
