"""An OCI registry on 127.0.0.1 (distribution-spec v1.1), which can be made to fail in chosen ways.

Conforming: blobs are pushed in one piece or in parts, and mounted; manifests need their blobs; tags
and referrers are listed in pages. Like Debian's docker-registry, it ignores If-Match.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

from tests.support.certificates import Certificates
from tests.support.index_server import PATIENCE_S

INDEX = "application/vnd.oci.image.index.v1+json"
NAME = r"/v2/(?P<name>[a-z0-9/._-]+?)"
PIECE = 1 << 16


@dataclass(kw_only=True)
class Fault:
    """What happens to a request whose method and path match, so many times.

    Attributes:
        before: called before the request is handled.
        status: answered instead, with ``headers`` and ``content``.
        change: the body that is sent instead of the right one.
        cut: bytes of the body after which the connection is closed.
        endless: the body never ends.
    """

    method: str
    path: str
    times: int = 1
    before: Callable[[], None] | None = None
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b""
    change: Callable[[bytes], bytes] | None = None
    cut: int | None = None
    endless: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    method: str
    path: str
    authorization: str
    status: int


class RegistryServer:
    """What it holds, who may use it, its planted faults, and a log of what was asked.

    ``login``: user and password that every request needs, as basic authentication or, with
    ``bearer``, for a token of its own token service. ``page``: rows of a listing at a time.
    """

    def __init__(
        self,
        *,
        referrers_api: bool = True,
        login: tuple[str, str] | None = None,
        bearer: bool = False,
        tls: Certificates | None = None,
        page: int = 100,
    ) -> None:
        self.referrers_api, self.login, self.bearer, self.page = referrers_api, login, bearer, page
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.tags: dict[tuple[str, str], str] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.uploads: dict[str, bytes] = {}
        self.tokens: dict[str, str] = {}  # to the scope it is for
        self.sent = 0  # bytes of endless bodies
        self.connections = 0
        self.lock = threading.RLock()
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.registry = self
        self.host = f"127.0.0.1:{self._http.server_address[1]}"
        self.url = f"{'https' if tls else 'http'}://{self.host}"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls.server, tls.key)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def plant(self, method: str, path: str, **fault: Any) -> Fault:
        """Add a fault; ``path`` is a regular expression for the whole path and query."""
        planted = Fault(method=method, path=path, **fault)
        self.faults.append(planted)
        return planted

    def asked(self, method: str, path: str) -> list[Request]:
        """The requests of a method whose path matches, in order."""
        with self.lock:
            rows = list(self.requests)
        return [row for row in rows if row.method == method and re.fullmatch(path, row.path)]

    def put(self, name: str, content: bytes, media_type: str, tag: str | None = None) -> str:
        """Store a manifest as if somebody had pushed it, unchecked."""
        digest = digest_of(content)
        with self.lock:
            self.manifests[name, digest] = (media_type, content)
            if tag:
                self.tags[name, tag] = digest
        return digest

    @contextmanager
    def running(self) -> Iterator[RegistryServer]:
        self._thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    registry: RegistryServer

    def process_request(self, request: Any, client_address: Any) -> None:
        self.registry.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what many tests are about."""


class _Answer(Exception):
    def __init__(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.status, self.content = status, content
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def refused(status: int, code: str, **headers: str) -> _Answer:
    content = json.dumps({"errors": [{"code": code, "message": code.lower()}]}).encode()
    return _Answer(status, content, **headers)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE_S
    wbufsize = PIECE  # head and body in one packet: two wait for each other's acknowledgement

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing; tests read ``requests``."""

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_GET

    def _handle(self) -> None:
        self.registry = cast("_Http", self.server).registry
        sent = self._body()
        fault = self._fault()
        if fault and fault.before:
            fault.before()
        if fault and fault.status:
            answer = _Answer(fault.status, fault.content)
            answer.headers = fault.headers
        else:
            try:
                self._authorize()
                self._route(sent)
            except _Answer as made:
                answer = made
        if fault and fault.change:
            answer.content = fault.change(answer.content)
        with self.registry.lock:
            self.registry.requests.append(
                Request(
                    method=self.command,
                    path=self.path,
                    authorization=self.headers.get("Authorization", ""),
                    status=answer.status,
                )
            )
        self._send(answer, fault)

    def _fault(self) -> Fault | None:
        with self.registry.lock:
            for fault in self.registry.faults:
                if fault.method == self.command and re.fullmatch(fault.path, self.path):
                    fault.times -= 1
                    if fault.times == 0:
                        self.registry.faults.remove(fault)
                    return fault
        return None

    def _send(self, answer: _Answer, fault: Fault | None) -> None:
        content = answer.content
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if fault and fault.endless:
            self.close_connection = True
            self.end_headers()
            while True:
                self.wfile.write(bytes(PIECE))
                self.registry.sent += PIECE
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault and fault.cut is not None:
            content, self.close_connection = content[: fault.cut], True
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _authorize(self) -> None:
        registry = self.registry
        if registry.login is None or urlsplit(self.path).path == "/token":
            return
        sent = self.headers.get("Authorization", "")
        if not registry.bearer:
            if sent != _basic(registry.login):
                raise refused(401, "UNAUTHORIZED", WWW_Authenticate='Basic realm="test"')
            return
        name = re.fullmatch(rf"{NAME}/(blobs|manifests|tags|referrers)/.*", self.path)
        actions = "pull" if self.command in {"GET", "HEAD"} else "pull,push"
        scope = f"repository:{name['name']}:{actions}" if name else ""
        granted = registry.tokens.get(sent.removeprefix("Bearer "), "none")
        if granted not in {scope, f"{scope},push"} and (name or granted == "none"):
            challenge = f'Bearer realm="{registry.url}/token",service="test",scope="{scope}"'
            raise refused(401, "UNAUTHORIZED", WWW_Authenticate=challenge)

    def _route(self, sent: bytes) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path == "/token":
            self._token(sent)
        if url.path == "/v2/":
            raise _Answer(200)
        for pattern, method in (
            (rf"{NAME}/blobs/uploads/(?P<session>[^/]*)", self._upload),
            (rf"{NAME}/blobs/(?P<digest>[^/]+)", self._blob),
            (rf"{NAME}/manifests/(?P<reference>[^/]+)", self._manifest),
            (rf"{NAME}/tags/list", self._tags),
            (rf"{NAME}/referrers/(?P<digest>[^/]+)", self._referrers),
        ):
            if match := re.fullmatch(pattern, url.path):
                with self.registry.lock:
                    method(sent=sent, **match.groupdict())
        raise refused(404, "NOT_FOUND")

    def _token(self, sent: bytes) -> None:
        login = self.registry.login
        assert login is not None
        form = {key: values[0] for key, values in parse_qs(sent.decode()).items()}
        if (
            self.headers.get("Authorization") != _basic(login)
            and form.get("refresh_token") != base64.b64encode(login[1].encode()).decode()
        ):
            raise refused(401, "UNAUTHORIZED")
        token = secrets.token_urlsafe()
        self.registry.tokens[token] = (self.query | form).get("scope", "")
        raise _Answer(200, json.dumps({"access_token": token}).encode())

    def _upload(self, *, name: str, session: str, sent: bytes) -> None:
        registry = self.registry
        if self.command == "POST":
            if (mount := self.query.get("mount")) in registry.blobs and mount:
                raise _Answer(201, Docker_Content_Digest=mount)
            session = secrets.token_urlsafe()
            registry.uploads[session] = b""
            raise _Answer(202, Location=f"/v2/{name}/blobs/uploads/{session}")
        if session not in registry.uploads:
            raise refused(404, "BLOB_UPLOAD_UNKNOWN")
        registry.uploads[session] += sent
        if self.command == "PATCH":
            have = len(registry.uploads[session])
            raise _Answer(202, Location=self.path, Range=f"0-{have - 1}")
        content = registry.uploads.pop(session)
        if (digest := digest_of(content)) != self.query["digest"]:
            raise refused(400, "DIGEST_INVALID")
        registry.blobs[digest] = content
        raise _Answer(201, Docker_Content_Digest=digest, Location=f"/v2/{name}/blobs/{digest}")

    def _blob(self, *, name: str, digest: str, sent: bytes) -> None:
        del name, sent
        if (content := self.registry.blobs.get(digest)) is None:
            raise refused(404, "BLOB_UNKNOWN")
        if row := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, size = int(row[1]), len(content)
            span = f"bytes {start}-{size - 1}/{size}"
            raise _Answer(206, content[start:], Content_Range=span)
        raise _Answer(200, content, Docker_Content_Digest=digest)

    def _manifest(self, *, name: str, reference: str, sent: bytes) -> None:
        registry = self.registry
        if self.command == "PUT":
            self._put(name, reference, sent)
        digest = registry.tags.get((name, reference), reference)
        if (name, digest) not in registry.manifests:
            raise refused(404, "MANIFEST_UNKNOWN")
        media_type, content = registry.manifests[name, digest]
        raise _Answer(200, content, Docker_Content_Digest=digest, Content_Type=media_type)

    def _put(self, name: str, reference: str, sent: bytes) -> None:
        registry, digest, document = self.registry, digest_of(sent), json.loads(sent)
        if reference.startswith("sha256:") and reference != digest:
            raise refused(400, "DIGEST_INVALID")
        blobs = [*document.get("layers", ()), *filter(None, [document.get("config")])]
        children = [row["digest"] for row in document.get("manifests", ())]
        if any(row["digest"] not in registry.blobs for row in blobs) or any(
            (name, child) not in registry.manifests for child in children
        ):
            raise refused(400, "MANIFEST_BLOB_UNKNOWN")
        tag = None if reference.startswith("sha256:") else reference
        registry.put(name, sent, self.headers["Content-Type"], tag)
        answer = _Answer(201, Docker_Content_Digest=digest)
        if registry.referrers_api and "subject" in document:
            answer.headers["OCI-Subject"] = document["subject"]["digest"]
        raise answer

    def _tags(self, *, name: str, sent: bytes) -> None:
        del sent
        tags = sorted(tag for repository, tag in self.registry.tags if repository == name)
        rows, link = self._page(tags, f"/v2/{name}/tags/list")
        raise _Answer(200, json.dumps({"name": name, "tags": rows}).encode(), **link)

    def _referrers(self, *, name: str, digest: str, sent: bytes) -> None:
        del sent
        if not self.registry.referrers_api:
            raise refused(404, "NOT_FOUND")
        rows = []
        for (repository, key), (media_type, content) in self.registry.manifests.items():
            document = json.loads(content)
            if repository == name and document.get("subject", {}).get("digest") == digest:
                row = {"mediaType": media_type, "digest": key, "size": len(content)}
                row["artifactType"] = document.get("artifactType", "")
                row["annotations"] = document.get("annotations", {})
                rows.append(row)
        rows, link = self._page(rows, f"/v2/{name}/referrers/{digest}")
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": rows}
        raise _Answer(200, json.dumps(index).encode(), Content_Type=INDEX, **link)

    def _page(self, rows: list[Any], path: str) -> tuple[list[Any], dict[str, str]]:
        start = int(self.query.get("last", 0))  # opaque to clients
        end = start + self.registry.page
        link = {"Link": f'<{path}?last={end}>; rel="next"'} if end < len(rows) else {}
        return rows[start:end], link


def _basic(login: tuple[str, str]) -> str:
    return "Basic " + base64.b64encode(":".join(login).encode()).decode()
