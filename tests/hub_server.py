"""The Hugging Face Hub in miniature, on 127.0.0.1, for its real client to talk to.

It answers what downloads and uploads of models, and the client's file system (hf://), need as the Hub does (paths,
status, headers, error codes), and breaks off where it is told to. It serves every file itself: no redirects to a
storage server, no Xet.
"""

from __future__ import annotations

import atexit
import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Collection, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


class Request(NamedTuple):
    """One request as it came in; `headers` finds names in any case."""

    method: str
    path: str
    headers: Mapping[str, str]


class _Cut(NamedTuple):
    end: int
    how: str


class Hub:
    """The server and what is on it; one address for all its life, whether it runs or not.

    Attributes:
        endpoint: its address.
        requests: every `Request` since `clear`.
        refusal: the status that every download is answered with; None: downloads are answered as they should be.
        on_get: called with the path of every GET before its body is sent.
    """

    def __init__(self) -> None:
        # Bound for as long as this process lives: nobody else gets the port while the server does not listen there.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind(("127.0.0.1", 0))
        self._address = self._reserved.getsockname()
        atexit.register(self._reserved.close)
        self.endpoint = "http://{}:{}".format(*self._address)
        self._server: ThreadingHTTPServer | None = None
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.requests: list[Request] = []
        self.refusal: int | None = None
        self.on_get: Callable[[str], object] = lambda path: None
        self._commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository, commit, file
        self._refs: dict[str, dict[str, str]] = {}  # repository, branch or tag: commit
        self._cuts: dict[tuple[str, str], list[_Cut]] = {}

    def start(self) -> None:
        """Listen; what was added stays from one start to the next."""
        if self._server is None:
            self._server = ThreadingHTTPServer(self._address, type("Handler", (_Handler,), {"hub": self}))
            self._server.daemon_threads = False  # so that `stop` waits for answers on their way
            threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """From here on connections are refused."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def add(self, repo: str, files: Mapping[str, bytes], revision: str = "main", without: Collection[str] = ()) -> str:
        """A new commit of a branch or tag: these files and those of the commit before, but for some; its hash."""
        commits, refs = self._commits.setdefault(repo, {}), self._refs.setdefault(repo, {})
        before = self.files(repo, revision) if revision in refs else {}
        commit = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits[commit] = {**{name: before[name] for name in before if name not in without}, **files}
        refs[revision] = commit
        return commit

    def has(self, repo: str) -> bool:
        """Whether there is such a repository."""
        return repo in self._commits

    def commit(self, repo: str, revision: str = "main") -> str | None:
        """The commit of a branch, tag or commit; None: no such revision."""
        return revision if revision in self._commits[repo] else self._refs[repo].get(revision)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Name to content."""
        return self._commits[repo][self.commit(repo, revision) or ""]

    def truncate(
        self, repo: str, file: str, end: int, *, times: int = 1, how: Literal["closed", "reset", "short"] = "closed"
    ) -> None:
        """End the next GETs of a file at this byte of it, wherever they start.

        The connection is closed, or reset; or Content-Length gives the short size, against what HEAD said.
        """
        self._cuts[repo, file] = [_Cut(end, how)] * times

    def next_cut(self, repo: str, file: str) -> _Cut | None:
        """What `truncate` planned for this GET."""
        cuts = self._cuts.get((repo, file))
        return cuts.pop() if cuts else None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    timeout = 30

    def do_GET(self) -> None:
        self._record()
        api = re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/([^/]+)/?(.*))?", urlsplit(self.path).path)
        return self._resolve() if api is None else self._information(*(unquote(part or "") for part in api.groups()))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self._record()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            metadata = json.loads(body)["content"].startswith("---\n")
            return self._json(200, {"errors": [], "warnings": [] if metadata else [{"message": "no metadata"}]})
        if "Authorization" not in self.headers:
            return self._error(401, None, "Invalid username or password.")
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        route = re.fullmatch(r"/api/models/(.+)/(preupload|commit|paths-info)/([^/]+)", self.path)
        if route is None or not self.hub.has(route[1]):
            return self._error(404, "RepoNotFound", "Repository not found")
        if route[2] == "paths-info":
            wanted, files = parse_qs(body.decode())["paths"], self.hub.files(route[1], unquote(route[3]))
            return self._json(200, [self._entry(name, files) for name in wanted if name in files])
        return self._preupload(json.loads(body)) if route[2] == "preupload" else self._commit(route, body)

    def log_message(self, *_: Any) -> None:
        """Nothing: tests look at `Hub.requests`."""

    def _record(self) -> None:
        self.hub.requests.append(Request(self.command, unquote(self.path), self.headers))

    def _information(self, repo: str, kind: str, revision: str, folder: str) -> None:
        """Of a repository; or the files and folders in one of its folders, in pages of two."""
        if not self.hub.has(repo):
            return self._error(404 if "Authorization" in self.headers else 401, "RepoNotFound", "Repository not found")
        commit = self.hub.commit(repo, revision or "main")
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if kind != "tree":
            return self._json(200, {"id": repo, "sha": commit, "siblings": []})
        files, start = self.hub.files(repo, commit), f"{folder}/" if folder else ""
        names = sorted({start + name[len(start) :].partition("/")[0] for name in files if name.startswith(start)})
        if folder and not names:
            return self._error(404, "EntryNotFound", f"{folder} does not exist")
        first = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        link = f'<{self.hub.endpoint}{urlsplit(self.path).path}?cursor={first + 2}>; rel="next"'
        more = {"Link": link} if first + 2 < len(names) else {}
        return self._json(200, [self._entry(name, files) for name in names[first : first + 2]], more)

    def _entry(self, name: str, files: Mapping[str, bytes]) -> dict[str, Any]:
        if name not in files:
            return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest()}
        oid = hashlib.sha1(files[name]).hexdigest()
        return {"type": "file", "path": name, "size": len(files[name]), "oid": oid}

    def _resolve(self) -> None:
        if self.hub.refusal is not None:
            return self._error(self.hub.refusal, None, "Not now.")
        route = re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", urlsplit(self.path).path)
        if route is None or not self.hub.has(route[1]):
            # The Hub doesn't tell strangers whether a repository is private, or isn't there.
            return self._error(404 if "Authorization" in self.headers else 401, "RepoNotFound", "Repository not found")
        repo, revision, file = map(unquote, route.groups())
        commit = self.hub.commit(repo, revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = self.hub.files(repo, commit).get(file)
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        return self._send_file(content, commit, self.hub.next_cut(repo, file) if self.command == "GET" else None)

    def _send_file(self, content: bytes, commit: str, cut: _Cut | None) -> None:
        etag = hashlib.sha1(content).hexdigest()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, whole = int(wanted[1]) if wanted else 0, len(content)
        if wanted and start >= whole:
            self._error(416, None, "Range not satisfiable", {"Content-Range": f"bytes */{whole}"})
            return
        content = content[: int(wanted[2]) + 1] if wanted and wanted[2] else content
        body = content[start:] if cut is None else content[start : max(start, cut.end)]
        announced = len(body) if cut and cut.how == "short" else len(content) - start
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{whole}"} if wanted else {}
        headers |= {
            "Content-Length": str(announced),
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
            "ETag": f'"{etag}"',
            "X-Repo-Commit": commit,
        }
        if self.command == "GET":
            self.hub.on_get(unquote(self.path))
        self._send(206 if wanted else 200, headers, body)
        if cut and cut.how == "reset":
            self.wfile.flush()
            # A socket that is closed with no time to linger resets its connection.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _create(self, wanted: Mapping[str, Any]) -> None:
        if not isinstance(wanted.get("private", False), bool):
            self._error(400, None, "private must be a boolean")
            return
        repo = f"{wanted['organization']}/{wanted['name']}"
        there = self.hub.has(repo)
        if not there:
            self.hub.add(repo, {".gitattributes": b""})
        self._json(409 if there else 200, {"url": f"{self.hub.endpoint}/{repo}", "name": repo})

    def _preupload(self, wanted: Mapping[str, Any]) -> None:
        files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in wanted["files"]]
        self._json(200, {"files": files})

    def _commit(self, route: re.Match[str], body: bytes) -> None:
        repo, revision = route[1], unquote(route[3])
        lines = [json.loads(line) for line in body.splitlines()]
        files = [line["value"] for line in lines if line["key"] == "file"]
        gone = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        contents = {file["path"]: base64.b64decode(file["content"]) for file in files}
        commit = self.hub.add(repo, contents, revision, gone)
        url = f"{self.hub.endpoint}/{repo}/commit/{commit}"
        self._json(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def _error(self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> None:
        codes = {} if code is None else {"X-Error-Code": code}
        self._json(status, {"error": message}, {"X-Error-Message": message, **codes, **(headers or {})})

    def _json(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        named = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self._send(status, {**named, **(headers or {})}, body)

    def _send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
