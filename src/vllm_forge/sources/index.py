"""The package index: which files a project has, with URL, size and SHA-256."""

import io
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import requests
import truststore
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError
from urllib3.util.retry import Retry

from vllm_forge.sources.errors import DistributionNotFoundError, IndexUnreachableError

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage

CHECK_INDEX = "check the network, the proxy, and UV_DEFAULT_INDEX / PIP_INDEX_URL"
CONNECTIONS = 16
CONNECT_RETRIES = 4
BACKOFF_S = 0.4
LONGEST_WAIT_S = 30  # whatever Retry-After says
TIMEOUT_S = (15, 60)  # to connect; between two reads
HEADERS_S = 60
CHUNK = 1 << 16  # a TLS record has a quarter of it; for 1 MiB, each read maps fresh pages
PAGE_BYTES = 64 << 20  # the largest known page of a project has 3 MB
PAGE_S = 120
LOGIN = (401, 403)
# Both become parts of paths in the cache.
FILENAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+!~-]*")
SHA256 = re.compile(r"[0-9a-f]{64}")
INDEX_NAME = re.compile(r"^[^:=]+=")  # uv takes NAME=URL
PIP_INDEX = re.compile(r"^global\.index-url=(?P<quote>['\"])(?P<url>.+)(?P=quote)$", re.M)


def pins(file: "DistributionPackage") -> tuple[str, int]:
    """SHA-256 in hex and size; DistributionNotFoundError where the index does not say them."""
    sha256 = file.digests.get("sha256", "")
    if not SHA256.fullmatch(sha256) or file.size is None:
        what = f"the index gives no sha256 or no size for {file.filename}"
        remedy = "use an index with the JSON simple API (PEP 691, PEP 700)"
        raise DistributionNotFoundError(what, where=file.url, remedy=remedy)
    return sha256, file.size


def index_url() -> str:
    """The index that this host is set up for: uv's variables, pip's, pip.conf, the public one."""
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"):
        if url := os.environ.get(name):
            return _named_url(url)
    # pip.conf has several places and layers; pip itself knows them. No pip, no pip.conf.
    # "config list", because "config get" reads the user's file only.
    argv = (sys.executable, "-m", "pip", "config", "list")
    asked = subprocess.run(argv, capture_output=True, text=True, check=False)
    if found := PIP_INDEX.search(asked.stdout):
        return found["url"]
    from pypi_simple import PYPI_SIMPLE_ENDPOINT  # noqa: PLC0415 - see Index.files

    return PYPI_SIMPLE_ENDPOINT


def _named_url(text: str) -> str:
    """The URL of uv's NAME=URL, with the login of UV_INDEX_NAME_USERNAME and _PASSWORD."""
    if (match := INDEX_NAME.match(text)) is None:
        return text
    url, name = text[match.end() :], re.sub(r"[^A-Z0-9]", "_", match[0][:-1].upper())
    keys = (f"UV_INDEX_{name}_{key}" for key in ("USERNAME", "PASSWORD"))
    login = [quote(os.environ.get(key, ""), safe="") for key in keys]
    return _with_login(url, ":".join(login)) if any(login) else url


def _with_login(url: str, login: str) -> str:
    """A URL with user and password, unless it has its own."""
    parts = urlsplit(url)
    return url if "@" in parts.netloc else parts._replace(netloc=f"{login}@{parts.netloc}").geturl()


def blocks(answer: requests.Response, deadline: float) -> Iterator[bytes]:
    """An answer's bytes as they come, not decompressed; requests.Timeout at the ``deadline``."""
    while block := answer.raw.read1(CHUNK, decode_content=False):
        yield block
        if time.monotonic() > deadline:
            raise requests.Timeout("it comes too slowly")


class _InTime:
    """Of a connection whose headers drip, or that says 100 Continue for ever: ends it."""

    sock: socket.socket

    def getresponse(self) -> Any:
        timer = threading.Timer(HEADERS_S, self.sock.shutdown, [socket.SHUT_RDWR])
        timer.daemon = True
        timer.start()
        try:
            return super().getresponse()  # type: ignore[misc]
        finally:
            timer.cancel()


class _Adapter(HTTPAdapter):
    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **options)
        if not issubclass(pool.ConnectionCls, _InTime):
            pool.ConnectionCls = type("Connection", (_InTime, pool.ConnectionCls), {})
        return pool


def _leave_out_others(answer: requests.Response, filename: str) -> None:
    """Shorten a page in JSON to one file: each of thousands would be parsed by patterns."""
    with suppress(ValueError, LookupError, TypeError):  # HTML, or what the parser refuses
        page = answer.json()
        page["files"] = [row for row in page["files"] if row["filename"] == filename]
        answer._content = json.dumps(page).encode()


class PatientSession(requests.Session):
    """A session that trusts what the host trusts, and repeats what fails for now.

    urllib3 would repeat too, but it reads an answer to its end before that, and waits for as long
    as Retry-After says. Requests must be made with ``stream=True``.
    """

    repeated: tuple[int, ...] = (429, 502, 503, 504)
    broken_reads: int | None = 0  # how often a request is repeated that got no answer; None: as all

    def __init__(self) -> None:
        super().__init__()
        truststore.inject_into_ssl()
        retry = Retry(
            total=CONNECT_RETRIES, read=self.broken_reads, backoff_factor=BACKOFF_S,
            allowed_methods=None, respect_retry_after_header=False,
        )  # fmt: skip
        for scheme in ("https://", "http://"):
            self.mount(scheme, _Adapter(CONNECTIONS, CONNECTIONS, retry))

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        for tried in itertools.count():
            if isinstance(request.body, io.IOBase):
                request.body.seek(0)
            answer = super().send(request, **options)
            if answer.status_code not in self.repeated or tried >= CONNECT_RETRIES:
                break
            answer.close()
            asked = answer.headers.get("Retry-After", "")[:9]
            wait = int(asked) if asked.isdecimal() else BACKOFF_S * 2**tried
            time.sleep(min(wait, LONGEST_WAIT_S))
        return answer

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """Where a redirect leads; its body is not read, which requests would do to its end."""
        if (target := super().get_redirect_target(resp)) is not None:
            resp._content = b""
            resp.close()
        return target


class Index:
    """A simple-API index (PEP 503, 691, 700), and its session."""

    def __init__(self, url: str | None = None) -> None:
        self.url = url or index_url()
        self.session = PatientSession()

    def files(self, project: str, filename: str = "") -> list["DistributionPackage"]:
        """All files of one project, or only that one.

        Raises DistributionNotFoundError, IndexUnreachableError.
        """
        # Here, since it brings a parser of HTML: a third of the time in which a command starts.
        import pypi_simple as simple  # noqa: PLC0415

        client = simple.PyPISimple(self.url, session=self.session)
        try:
            answer = self._page(client.get_project_url(project), client.accept, project)
            if filename:
                _leave_out_others(answer, filename)
            page = simple.ProjectPage.from_response(answer, project)
        except (requests.RequestException, HTTPError) as error:
            raise self._unusable(f"does not answer: {type(error).__name__}") from error
        except (ValueError, RecursionError, simple.UnsupportedRepoVersionError) as error:
            raise self._unusable(f"has no page for {project} that can be read: {error}") from error
        files = [file for file in page.packages if FILENAME.fullmatch(file.filename)]
        # As uv and pip do: a page links to its own host without the login, which is then needed.
        index = urlsplit(self.url)
        login, _, host = index.netloc.rpartition("@")
        for file in files:
            link = urlsplit(file.url)
            if login and (link.scheme, link.netloc) == (index.scheme, host):
                file.url = _with_login(file.url, login)
        return files

    def find(self, project: str, filename: str) -> "DistributionPackage":
        """One file of a project; errors as ``files``."""
        for file in self.files(project, filename):
            if file.filename == filename:
                return file
        what = f"the index does not offer {filename}"
        remedy = "it may have been yanked or your mirror may lack it: use another index, or make a "
        raise DistributionNotFoundError(what, where=self.url, remedy=f"{remedy}new lock")

    def _page(self, url: str, accept: str, project: str) -> requests.Response:
        """A project's page; it ends at a size and at a time."""
        deadline, content = time.monotonic() + PAGE_S, bytearray()
        with self.session.get(
            url,
            headers={"Accept": accept, "Accept-Encoding": "identity"},
            stream=True,
            timeout=TIMEOUT_S,
        ) as answer:
            if answer.status_code == requests.codes.not_found:
                what = f"the index has no project {project!r}"
                remedy = "check UV_DEFAULT_INDEX / PIP_INDEX_URL: a mirror may lack it"
                raise DistributionNotFoundError(what, where=self.url, remedy=remedy)
            if answer.status_code in LOGIN:
                raise self._unusable(f"refuses the login: {answer.status_code} {answer.reason}")
            answer.raise_for_status()
            if not answer.url.startswith("https:") and self.url.startswith("https:"):
                raise self._unusable("redirects to an address without TLS")
            for block in blocks(answer, deadline):
                content += block
                if len(content) > PAGE_BYTES:
                    raise self._unusable(f"sends more than {PAGE_BYTES} bytes for {project}")
            answer._content = bytes(content)
        return answer

    def _unusable(self, what: str) -> IndexUnreachableError:
        remedy = f"{CHECK_INDEX}; what was already fetched is kept"
        return IndexUnreachableError(f"the package index {what}", where=self.url, remedy=remedy)

    def files_of(self, projects: Iterable[str]) -> dict[str, list["DistributionPackage"]]:
        """The files of many projects, asked side by side."""
        names = sorted(set(projects))
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return dict(zip(names, pool.map(self.files, names), strict=True))
