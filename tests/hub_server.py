"""A small hub on loopback: the endpoints that huggingface_hub uses to fetch a snapshot or a file, and its errors."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """Repositories: id to revision (commits first, then names of commits) to path to content."""

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    truncated: dict[str, int] = field(default_factory=dict)
    """Paths of which so many downloads end half way, though the full length is declared."""
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def add(self, repo: str, files: dict[str, bytes], *, branch: str = "main") -> str:
        """Add a commit and move the branch to it; returns the commit."""
        commit = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = files
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def add_folder(self, repo: str, folder: Path) -> str:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.add(repo, files)

    def commit(self, repo: str, revision: str) -> str | None:
        revision = self.branches[repo].get(revision, revision)
        return revision if revision in self.commits[repo] else None


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self, hub)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            hub.requests.append(f"{self.command} {self.path}")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(request: BaseHTTPRequestHandler, hub: Hub) -> None:
    parts = [unquote(part) for part in urlsplit(request.path).path.strip("/").split("/")]
    api = parts[:2] == ["api", "models"]
    user, name, kind, revision, *rest = (parts[2:] if api else parts) + [""] * 4
    repo = f"{user}/{name}"
    if repo not in hub.commits:
        return send(request, 404 if not api else 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"})
    commit = hub.commit(repo, revision)
    if commit is None:
        return send(request, 404, {"X-Error-Code": "RevisionNotFound"})
    files = hub.commits[repo][commit]
    if api and kind == "revision":
        siblings = [{"rfilename": path} for path in files]
        return send(request, 200, {}, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())
    if api and kind == "tree":
        tree = [{"type": "file", "oid": etag(data), "size": len(data), "path": path} for path, data in files.items()]
        return send(request, 200, {}, json.dumps(tree).encode())
    path = "/".join(part for part in rest if part)
    if repo in hub.gated:
        return send(request, 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "access is restricted"})
    if kind != "resolve" or path not in files:
        return send(request, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
    broken = request.command == "GET" and hub.truncated.get(path, 0) > 0
    if broken:
        hub.truncated[path] -= 1
    return send_file(request, files[path], commit, broken)


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def send_file(request: BaseHTTPRequestHandler, data: bytes, commit: str, truncated: bool) -> None:
    headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    start = 0
    if asked := request.headers.get("Range"):
        start = int(asked.removeprefix("bytes=").split("-")[0])
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
    body = data[start:]
    send(request, 206 if asked else 200, headers, body[: len(body) // 2] if truncated else body, length=len(body))
    request.close_connection = truncated


def send(
    request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes = b"", length: int | None = None
) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body) if length is None else length))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
