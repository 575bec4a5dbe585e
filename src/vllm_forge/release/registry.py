"""A repository of an OCI registry: manifests, blobs and tags, each checked against its digest.

Follows distribution-spec v1.1 (github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md).
What a registry says of its content is compared, never believed: a digest is computed of the bytes.
"""

import hashlib
import io
import itertools
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

import requests
from pydantic import ConfigDict, Field
from urllib3.exceptions import HTTPError

from vllm_forge.errors import ForgeError, UsageError
from vllm_forge.host import parse_json
from vllm_forge.images.layout import MANIFEST
from vllm_forge.matrix import FrozenModel
from vllm_forge.release.errors import (
    ManifestMissingError,
    RegistryAuthError,
    RegistryContentError,
    RegistryUnreachableError,
)
from vllm_forge.release.transport import LOGIN, PATIENCE_S, RegistrySession, body
from vllm_forge.sources import Download, download_all
from vllm_forge.sources import errors as sources_errors
from vllm_forge.sources.index import TIMEOUT_S, blocks

INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER = "application/vnd.docker.distribution.manifest"
ACCEPTED = f"{MANIFEST}, {INDEX}, {DOCKER}.v2+json, {DOCKER}.list.v2+json"
MANIFEST_BYTES = 4 << 20  # the spec's bound
MOST_PAGES, MOST_ROWS = 200, 200_000
MISSING = (404,)
READ_TRIES = 3
SHOWN = 300  # characters of a reference, or of a registry's error
LONGEST = 512  # characters of a reference
# Of a download: the registry has other bytes; it has not sent them.
OTHER_FILE = (
    sources_errors.HashMismatchError, sources_errors.TruncatedFileError,
    sources_errors.DistributionNotFoundError,
)  # fmt: skip
NO_FILE = (sources_errors.IndexUnreachableError, sources_errors.DownloadInterruptedError)
LOGGED_IN = re.compile(r".*@(?!sha256:)", re.DOTALL)  # what a user and a password end with
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
REFERENCE = re.compile(
    r"""(?P<registry>([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*
        |\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?)
    /(?P<repository>[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*)
    (:(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?""",
    re.VERBOSE,
)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """``HOST[:PORT]/NAME[:TAG][@sha256:HEX]``: an image in a registry."""

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a reference; UsageError, without what stands before an ``@``, but of a digest.

        A user and a password are refused: every user of the host reads command lines.
        """
        match = REFERENCE.fullmatch(text) if len(text) <= LONGEST else None
        if match is not None and re.search(r"[.:]|^localhost$", match["registry"]):
            return cls(**match.groupdict())
        raise UsageError(
            f"invalid image reference {LOGGED_IN.sub('', text)[:SHOWN]!r}: "
            "expected HOST[:PORT]/NAME[:TAG][@sha256:DIGEST]",
            remedy="write the host, e.g. docker.io/NAME for Docker Hub; write the path of a folder "
            "as ./NAME; for a registry that asks for a password, run: skopeo login HOST",
        )

    def at(self, digest: str) -> Self:
        """The same repository at a digest."""
        return replace(self, tag=None, digest=digest)

    def __str__(self) -> str:
        tag, digest = self.tag and f":{self.tag}", self.digest and f"@{self.digest}"
        return f"{self.registry}/{self.repository}{tag or ''}{digest or ''}"


class Descriptor(FrozenModel):
    """What an OCI manifest says of a blob or manifest; other fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    mediaType: str
    digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    size: Annotated[int, Field(strict=True, ge=0)]


class Blobs(FrozenModel):
    """The blobs of an image's manifest; other fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest or index as its bytes; ``digest`` is computed of them."""

    media_type: str
    content: bytes

    @property
    def digest(self) -> str:
        return digest_of(self.content)

    def blobs(self) -> tuple[Descriptor, ...]:
        """Config and layers of an image, each once; ValueError for what is not one."""
        if self.media_type != MANIFEST:
            raise ValueError(f"it is of type {self.media_type}")
        blobs = Blobs.model_validate(parse_json(self.content))
        return tuple({row.digest: row for row in (blobs.config, *blobs.layers)}.values())


class Repository:
    """One repository of a registry. ``ca``: a PEM file of further certificate authorities.

    Every method raises RegistryAuthError, RegistryUnreachableError, and RegistryContentError for
    bytes that are not what was asked for.
    """

    def __init__(self, reference: Reference, *, ca: Path | None = None) -> None:
        self.reference = replace(reference, tag=None, digest=None)
        self.session = RegistrySession(reference.registry, reference.repository, ca)
        self._url = f"{self.session.base}/v2/{reference.repository}"

    def resolve(self, name: str) -> str | None:
        """The digest of what a tag names; None if there is no such tag (or digest)."""
        manifest = self.find(name)
        return None if manifest is None else manifest.digest

    def manifest(self, name: str) -> Manifest:
        """A manifest by digest or tag; ManifestMissingError."""
        if manifest := self.find(name):
            return manifest
        raise ManifestMissingError(
            f"{name} not found in the registry",
            where=self.reference,
            remedy="check name and tag; a private repository may look missing without a login: "
            + LOGIN,
        )

    def find(self, name: str) -> Manifest | None:
        """A manifest by digest or tag; None if there is none."""
        url = f"{self._url}/manifests/{name}"
        if (answer := self._read(url, MANIFEST_BYTES, {"Accept": ACCEPTED})) is None:
            return None
        content, headers = answer.content, answer.headers
        digest = digest_of(content)
        said = headers.get("Docker-Content-Digest", digest)
        if said != digest or (DIGEST.fullmatch(name) and name != digest):
            said = name if said == digest else said
            raise self._lie(f"a manifest said to be {said[:SHOWN]} is {digest}", url)
        media_type = _media_type(answer)
        try:
            document = parse_json(content)
            if document.get("mediaType", media_type) != media_type:
                raise ValueError(f"calls itself {document['mediaType']!r}")  # noqa: TRY301
            if "manifests" in document and {"layers", "config"} & document.keys():
                raise ValueError("is an index and an image at once")  # noqa: TRY301
        except (ValueError, AttributeError) as error:
            raise self._lie(f"a manifest of type {media_type!r} is invalid: {error}", url) from None
        return Manifest(media_type=media_type, content=content)

    def has_blob(self, digest: str) -> bool:
        with self._ask("HEAD", f"{self._url}/blobs/{digest}", (200, 404)) as answer:
            return bool(answer.status_code == requests.codes.ok)

    def blob(self, digest: str, limit: int) -> bytes:
        """The bytes of a blob of at most ``limit`` bytes."""
        url = f"{self._url}/blobs/{digest}"
        if (answer := self._read(url, limit)) is None:
            raise self._lie(f"blob {digest} is missing, and a manifest lists it", url)
        if (actual := digest_of(answer.content)) != digest:
            raise self._lie(f"blob {digest} is {actual}", url)
        return answer.content

    def stream_blobs(self, blobs: Sequence[Descriptor], folder: Path) -> None:
        """Download blobs to files named by the hex of their digest.

        Each appears when its hash is right; what is unfinished is resumed by the next call.
        """
        downloads = [
            Download(
                url=f"{self._url}/blobs/{blob.digest}", size=blob.size, shared=False,
                sha256=(name := blob.digest.removeprefix("sha256:")), target=folder / name,
            )
            for blob in blobs
        ]  # fmt: skip
        try:
            download_all(self.session, downloads)
        except OTHER_FILE as error:
            what = f"a blob is not what its manifest says: {error.what}"
            raise self._lie(what, error.where) from None
        except NO_FILE as error:
            what = re.sub(r"\?\S+", "", error.what)  # a redirect's address has tokens
            remedy = "check the network; run the same command again, which resumes"
            raise RegistryUnreachableError(what, where=error.where, remedy=remedy) from None

    def put_blob(self, content: bytes | Path) -> str:
        """Upload bytes or a file, unless the registry has them; returns the digest."""
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
            digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            file.seek(0)
            if self.has_blob(digest):
                return digest
            with self._ask("POST", f"{self._url}/blobs/uploads/", (202,), data=b"") as answer:
                place = self.session.follow(answer.url, answer.headers.get("Location", ""))
            url = f"{place}{'&' if '?' in place else '?'}digest={digest}"
            headers = {"Content-Type": "application/octet-stream"}
            with self._ask("PUT", url, (201,), headers, data=file):
                return digest

    def put_manifest(self, content: bytes, media_type: str, tag: str | None = None) -> str:
        """Upload a manifest under a tag, or by digest; returns the digest."""
        digest = digest_of(content)
        url = f"{self._url}/manifests/{tag or digest}"
        with self._ask("PUT", url, (201,), {"Content-Type": media_type}, data=content) as answer:
            said = answer.headers.get("Docker-Content-Digest", digest)
        if said != digest:
            raise self._lie(f"it stored {digest} as {said[:SHOWN]}", url)
        return digest

    def set_tag(self, tag: str, digest: str) -> None:
        """Let a tag name a manifest of this repository, and read it back."""
        manifest = self.manifest(digest)
        self.put_manifest(manifest.content, manifest.media_type, tag)
        if (actual := self.resolve(tag)) != digest:
            what = f"tag {tag} was set to {digest} and resolves to {actual}"
            remedy = "someone else moved it at the same time: see who, then run this again"
            raise RegistryContentError(what, where=self.reference, remedy=remedy)

    def tags(self) -> tuple[str, ...]:
        """All tags; none of a repository that does not exist. What cannot be one is left out."""
        pages = self.pages("tags/list", "tags")
        return tuple(tag for tag in pages or () if isinstance(tag, str) and TAG.fullmatch(tag))

    def pages(
        self, path: str, key: str, missing: tuple[int, ...] = MISSING, media_type: str = ""
    ) -> list[Any] | None:
        """A list of the API, all its pages; None where the registry has none.

        It has none if it answers with a status of ``missing``, or with another ``media_type``.
        """
        rows: list[Any] = []
        url = first = f"{self._url}/{path}"
        for _ in range(MOST_PAGES):
            answer = self._read(url, MANIFEST_BYTES, missing=missing)
            other = answer is None or media_type not in {"", _media_type(answer)}
            if other and url == first:
                return None
            try:
                page = parse_json(answer.content)[key] or [] if answer else {}  # null: of no rows
                if not isinstance(page, list):
                    raise TypeError(key)  # noqa: TRY301
            except (ValueError, LookupError, TypeError):
                raise self._lie(f"{path} is not a list of {key}", url) from None
            rows += page
            if len(rows) > MOST_ROWS:
                raise self._lie(f"{path} has more than {MOST_ROWS} rows", url)
            if answer is None or "next" not in answer.links:
                return rows
            url = self.session.follow(url, answer.links["next"]["url"])
            if not self.session.is_own(url):
                raise self._lie(f"{path} goes on at another host", url)
        raise self._lie(f"{path} has more than {MOST_PAGES} pages", url)

    def _read(
        self, url: str, limit: int, headers: dict[str, str] | None = None,
        missing: tuple[int, ...] = MISSING,
    ) -> requests.Response | None:  # fmt: skip
        """An answer with its body; None if it is ``missing``. A cut connection is tried again."""
        for left in reversed(range(READ_TRIES)):
            with self._ask("GET", url, (200, *missing), headers) as answer:
                if answer.status_code in missing:
                    return None
                try:
                    answer._content = b"".join(body(answer, limit))
                    return answer  # noqa: TRY300
                except (requests.RequestException, HTTPError):
                    if not left:
                        raise
        return None

    @contextmanager
    def _ask(
        self,
        method: str,
        url: str,
        expected: tuple[int, ...],
        headers: dict[str, str] | None = None,
        data: Any = None,
    ) -> Iterator[requests.Response]:
        sent = {"Accept-Encoding": "identity"} | (headers or {})
        try:
            with self.session.request(
                method, url, headers=sent, data=data, stream=True, timeout=TIMEOUT_S
            ) as answer:
                if answer.status_code not in expected:
                    raise self._unexpected(method, answer)
                yield answer
                # What is left of a short body: a connection with some of it cannot be used again.
                with suppress(requests.RequestException, HTTPError):
                    list(itertools.islice(blocks(answer, time.monotonic() + PATIENCE_S), 2))
        except requests.exceptions.SSLError:
            what = "the registry's TLS certificate is not trusted"
            remedy = "give its certificate authority with --ca FILE, or install it on this host"
            raise RegistryUnreachableError(what, where=self.session.base, remedy=remedy) from None
        except (requests.RequestException, HTTPError) as error:
            # Without the error's text, which has URLs with tokens.
            what = f"the registry does not answer: {type(error).__name__}"
            remedy = "check the network and the proxy; run the same command again, which goes on"
            raise RegistryUnreachableError(what, where=self.session.base, remedy=remedy) from None

    def _unexpected(self, method: str, answer: requests.Response) -> ForgeError:
        status, place = answer.status_code, answer.url.partition("?")[0]
        try:
            row = parse_json(next(body(answer, MANIFEST_BYTES), b"{}"))["errors"][0]
            detail = f": {row.get('code')}: {row.get('message')}"[:SHOWN]
        except (ForgeError, ValueError, LookupError, TypeError, AttributeError):
            detail = ""
        what = f"the registry answers {status} to {method}{detail}"
        if status in {requests.codes.unauthorized, requests.codes.forbidden}:
            remedy = f"check that the login may do this; to log in, {LOGIN}"
            return RegistryAuthError(what, where=place, remedy=remedy)
        remedy = "see what it says; run the same command again, which goes on where it stopped"
        return RegistryUnreachableError(what, where=place, remedy=remedy)

    def _lie(self, what: str, url: str) -> RegistryContentError:
        remedy = "do not use it: the registry, or who sits between, changed or lost it"
        return RegistryContentError(what, where=url.partition("?")[0], remedy=remedy)


def _media_type(answer: requests.Response) -> str:
    return answer.headers.get("Content-Type", "").partition(";")[0]


def digest_of(content: bytes) -> str:
    """``sha256:<hex>`` of bytes."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
