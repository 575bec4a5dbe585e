"""Requests to one registry: TLS, login, redirects and repetitions.

Logins are read where ``skopeo login`` and ``docker login`` leave them, in the files that skopeo
reads and in its order, so that both use the same one (containers-auth.json(5);
docs.docker.com/reference/cli/docker/login).

A login goes to the registry itself, and to the token service that the registry names: who can name
it there could as well ask for the password. It goes nowhere without TLS, except to this host, and
never along with a redirect: registries keep blobs at other hosts.
"""

import base64
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from requests.utils import parse_dict_header, resolve_proxies

from vllm_forge.errors import UsageError
from vllm_forge.host import parse_json, read_data, which
from vllm_forge.release.errors import RegistryAuthError, RegistryContentError
from vllm_forge.sources.fetch import SLOWEST
from vllm_forge.sources.index import PatientSession, blocks

MOST_REDIRECTS = 5
TOKEN_BYTES = 1 << 20
PATIENCE_S = 120  # for an answer, beside what its bytes may take
LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}
DOCKER_HUB = "https://index.docker.io/v1/"  # what docker calls docker.io in its files
HELPER = re.compile(r"[A-Za-z0-9._-]+")
HELPER_S = 60
NOT_STORED = "credentials not found"  # how helpers begin their answer for an unknown server
TOKEN_USER = "<token>"  # noqa: S105 - in a helper's answer: the secret is an identity token
LOGIN = "run: skopeo login HOST   or: docker login HOST"


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """A login; without a ``user``, the secret is an identity token (OAuth2's refresh token)."""

    user: str
    secret: str = field(repr=False)

    @property
    def basic(self) -> str:
        """The value of a header ``Authorization``."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.secret}".encode()).decode()


def stored_credentials(registry: str, repository: str) -> Credentials | None:
    """The login for a repository, of the first file that has one."""
    for path in filter(Path.exists, _files()):
        found = read_data(
            path.resolve(),  # Kubernetes mounts such files as links
            lambda config: _login(config, registry, repository),
            RegistryAuthError,
            what="file of registry logins",
            remedy=f"repair or delete it, then {LOGIN}",
        )
        if found is not None:
            return found
    return None


def _files() -> Iterator[Path]:
    if chosen := os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(chosen)
        return
    if chosen := os.environ.get("DOCKER_CONFIG"):
        yield Path(chosen) / "config.json"
        return
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/containers/{os.getuid()}"
    yield Path(runtime) / "containers" / "auth.json"
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    yield Path(config) / "containers" / "auth.json"
    yield Path.home() / ".docker" / "config.json"


def _login(config: dict[str, Any], registry: str, repository: str) -> Credentials | None:
    parts = [registry, *repository.split("/")]
    names = ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]  # the longest wins
    server = DOCKER_HUB if registry == "docker.io" else registry
    for name in [*names, f"https://{registry}", server]:
        if helper := config.get("credHelpers", {}).get(name):
            return _ask(helper, server)
        row = config.get("auths", {}).get(name, {})
        if token := row.get("identitytoken"):
            return Credentials(user="", secret=token)
        if packed := row.get("auth"):
            user, _, secret = base64.b64decode(packed, validate=True).decode().partition(":")
            return Credentials(user=user, secret=secret.strip("\0"))
    if helper := config.get("credsStore"):
        return _ask(helper, server)
    return None


def _ask(helper: str, server: str) -> Credentials | None:
    """Ask a credential helper; None where it knows no login for the server."""
    program = which(f"docker-credential-{helper}") if HELPER.fullmatch(helper) else None
    if program is None:
        raise ValueError(f"credential helper docker-credential-{helper} not found")
    try:
        done = subprocess.run(
            [program, "get"], input=server, capture_output=True, text=True, check=False,
            timeout=HELPER_S, start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ValueError(f"{program} does not answer within {HELPER_S} s") from None
    if done.returncode != 0:
        if done.stdout.startswith(NOT_STORED):
            return None
        raise ValueError(f"{program} exited with {done.returncode}: {done.stdout[:200].strip()}")
    answer = parse_json(done.stdout)
    user = answer["Username"]
    return Credentials(user="" if user == TOKEN_USER else user, secret=answer["Secret"])


class RegistrySession(PatientSession):
    """A session for one repository. ``ca``: a PEM file of further certificate authorities.

    Without one, exactly localhost, 127.0.0.1 and [::1] are spoken to without TLS.
    """

    repeated = (429, 500, 502, 503, 504)
    broken_reads = None

    def __init__(self, registry: str, repository: str, ca: Path | None) -> None:
        super().__init__()
        if ca is not None and not ca.is_file():
            raise UsageError(f"invalid --ca {str(ca)!r}: expected a PEM file")
        host = "registry-1.docker.io" if registry == "docker.io" else registry
        self.base = f"{'http' if ca is None and is_loopback(registry) else 'https'}://{host}"
        self._repository = (registry, repository)
        self._ca = ca
        self._authorization = ""

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send, answer one challenge, follow the redirects of GET and HEAD.

        Raises RegistryAuthError, RegistryContentError and what ``requests`` raises.
        """
        options["allow_redirects"] = False
        if self._ca is not None:
            options["verify"] = str(self._ca)
        for _ in range(MOST_REDIRECTS):
            answer = self._send(request, options)
            if answer.status_code == requests.codes.unauthorized and self.is_own(request.url):
                challenge = answer.headers.get("WWW-Authenticate", "")
                answer.close()
                self._authorization = self._answer(challenge, options)
                answer = self._send(request, options)
            if not answer.is_redirect or request.method not in {"GET", "HEAD"}:
                return answer
            answer.close()
            request = request.copy()
            request.prepare_url(self.follow(answer.url, answer.headers["Location"]), None)
        raise requests.TooManyRedirects(f"more than {MOST_REDIRECTS}")

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None: ``send`` follows; requests would read the body of the redirect, however long."""
        del resp

    def follow(self, place: str, location: str) -> str:
        """The absolute URL of a Location or Link; RegistryContentError if it gives up TLS."""
        try:
            url = urljoin(place, location)
            scheme = urlsplit(url).scheme
        except ValueError as error:  # e.g. of half an IPv6 address
            what, remedy = f"the registry names an invalid address: {error}", "do not use it"
            raise RegistryContentError(what, where=self.base, remedy=remedy) from None
        if scheme not in {"https", urlsplit(self.base).scheme}:
            what = "the registry redirects to an address without TLS"
            remedy = "do not use it; behind a proxy it must be set up with its own external address"
            raise RegistryContentError(what, where=self.base, remedy=remedy)
        return url

    def is_own(self, url: str | None) -> bool:
        """Whether a URL is of the registry itself."""
        return urlsplit(url or "")[:2] == urlsplit(self.base)[:2]

    def _send(
        self, request: requests.PreparedRequest, options: dict[str, Any]
    ) -> requests.Response:
        request.headers.pop("Authorization", None)  # also that of a .netrc
        if self._authorization and self.is_own(request.url):
            request.headers["Authorization"] = self._authorization
        return self._transmit(request, options)

    def _transmit(
        self, request: requests.PreparedRequest, options: dict[str, Any]
    ) -> requests.Response:
        """Send through the environment's proxy, but to this host: the proxy has another one."""
        own = is_loopback(urlsplit(str(request.url)).netloc)
        proxies = {} if own else resolve_proxies(request, None)
        return super().send(request, **options | {"proxies": proxies})

    def _answer(self, challenge: str, options: dict[str, Any]) -> str:
        """The header that a challenge asks for (RFC 9110 §11; distribution's token spec)."""
        scheme, _, rest = challenge.partition(" ")
        stored = stored_credentials(*self._repository)
        if scheme.lower() == "bearer":
            return "Bearer " + self._token(rest, stored, options)
        if scheme.lower() != "basic":
            raise self._refused(f"asks for an unknown kind of login: {scheme[:40]!r}")
        if stored is None:
            raise self._refused("asks for a login, and none is stored")
        return stored.basic

    def _token(self, rest: str, stored: Credentials | None, options: dict[str, Any]) -> str:
        challenge = parse_dict_header(rest)  # type: ignore[no-untyped-call]
        try:
            realm = self.follow("", str(challenge.get("realm")))
        except RegistryContentError:
            raise self._refused("names a token service without TLS") from None
        fields: dict[str, str] = {
            key: str(challenge[key]) for key in ("service", "scope") if key in challenge
        }
        if stored and not stored.user:
            fields |= {"grant_type": "refresh_token", "client_id": "vllm-forge"}
            fields |= {"refresh_token": stored.secret}
            asked = requests.Request("POST", realm, data=fields)
        else:
            headers = {"Authorization": stored.basic} if stored else {}
            asked = requests.Request("GET", realm, params=fields, headers=headers)
        with self._transmit(asked.prepare(), options) as answer:
            if answer.status_code != requests.codes.ok:
                raise self._refused(f"gives no token: its token service says {answer.status_code}")
            content = b"".join(body(answer, TOKEN_BYTES))
        try:
            document = parse_json(content)
            token = document.get("token") or document["access_token"]
            if not (isinstance(token, str) and token.isascii() and token.isprintable()):
                raise ValueError("token")  # noqa: TRY301
        except (ValueError, LookupError, AttributeError):
            raise self._refused("gives no token: its token service sends something else") from None
        return token

    def _refused(self, what: str) -> RegistryAuthError:
        return RegistryAuthError(f"the registry {what}", where=self.base, remedy=LOGIN)


def is_loopback(registry: str) -> bool:
    """Whether ``HOST[:PORT]`` is exactly this host."""
    host, _, port = registry.rpartition(":")
    return (host if port.isdecimal() else registry) in LOOPBACK


def body(answer: requests.Response, limit: int) -> Iterator[bytes]:
    """An answer's bytes as they come, at most ``limit`` and within a time.

    Raises RegistryContentError: there are more; urllib3's HTTPError: it ends too early.
    """
    deadline, have = time.monotonic() + PATIENCE_S + limit / SLOWEST, 0
    for block in blocks(answer, deadline):
        have += len(block)
        if have > limit:
            what = f"the registry sends more than {limit} bytes"
            remedy = "do not use what it sends: it is not what was asked for"
            raise RegistryContentError(what, where=answer.url.partition("?")[0], remedy=remedy)
        yield block
