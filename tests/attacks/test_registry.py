"""Boundary: the network, a registry. It lies, stalls, and sends requests and logins elsewhere.

Content is known by digest and size; a login goes to the registry and its token service, with TLS,
except on exactly this host; no tag names what was not read back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.certificates import make_certificates
from tests.support.registry_client import LOGIN, NAME, empty_home, push_image, store_login
from tests.support.registry_server import RegistryServer, digest_of
from vllm_forge.commands import build as command
from vllm_forge.errors import ForgeError, UsageError
from vllm_forge.host import RecordingRunner
from vllm_forge.images.layout import MANIFEST
from vllm_forge.project import Project
from vllm_forge.release import registry as module
from vllm_forge.release import transport
from vllm_forge.release.errors import (
    ManifestMissingError,
    RegistryAuthError,
    RegistryContentError,
    RegistryUnreachableError,
)
from vllm_forge.release.mirror import push_layout
from vllm_forge.release.referrers import attach, referrers
from vllm_forge.release.registry import Descriptor, Reference, Repository
from vllm_forge.release.tags import choose_names

MOST = 1 << 24  # bytes that an endless answer may have sent: what the kernel's buffers hold
SBOM = "https://cyclonedx.org/bom"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_home(tmp_path / "home", monkeypatch)


@pytest.fixture
def registry() -> Iterator[RegistryServer]:
    with RegistryServer().running() as running:
        yield running


@pytest.fixture
def elsewhere() -> Iterator[RegistryServer]:
    """Another host."""
    with RegistryServer().running() as running:
        yield running


@pytest.fixture
def repository(registry: RegistryServer) -> Repository:
    return open_repository(registry)


def open_repository(registry: RegistryServer, **options: Any) -> Repository:
    return Repository(Reference.parse(f"{registry.host}/{NAME}"), **options)


def other_bytes(content: bytes) -> bytes:
    return content[:-1] + b" "


def test_manifest_that_is_not_its_digest_is_refused(
    registry: RegistryServer, repository: Repository
) -> None:
    """By tag the registry's own word is compared, by digest ours."""
    digest = push_image(repository, "dev")
    for name in ("dev", digest):
        registry.plant("GET", f".*/manifests/{name}", change=other_bytes)
        with pytest.raises(RegistryContentError, match=f"said to be {digest} is sha256:"):
            repository.resolve(name)
    other = push_image(repository, label="other")
    content = registry.manifests[NAME, other][1]
    headers = {"Docker-Content-Digest": other, "Content-Type": MANIFEST}
    registry.plant("GET", ".*/manifests/.*", status=200, headers=headers, content=content)
    with pytest.raises(RegistryContentError, match=f"said to be {digest} is {other}"):
        repository.manifest(digest)


@pytest.mark.parametrize("change", [other_bytes, lambda _: b"", lambda content: content * 2])
def test_blob_that_is_not_its_digest_is_refused(
    change: Any, registry: RegistryServer, repository: Repository, tmp_path: Path
) -> None:
    size = 1 << 10
    digest = repository.put_blob(bytes(size))
    blob = Descriptor(mediaType="x/y", digest=digest, size=size)
    for read in (
        lambda: repository.blob(digest, size),
        lambda: repository.stream_blobs([blob], tmp_path / "blobs"),
    ):
        registry.plant("GET", ".*/blobs/.*", change=change, times=10)
        with pytest.raises(RegistryContentError):
            read()
        registry.faults.clear()
    assert [path for path in (tmp_path / "blobs").iterdir() if path.suffix != ".part"] == []


def test_blob_of_another_size_than_its_manifest_says_is_refused(
    repository: Repository, tmp_path: Path
) -> None:
    digest = repository.put_blob(bytes(100))
    for size in (99, 101):
        blob = Descriptor(mediaType="x/y", digest=digest, size=size)
        with pytest.raises(RegistryContentError):
            repository.stream_blobs([blob], tmp_path)


def test_missing_blob_is_refused(repository: Repository, tmp_path: Path) -> None:
    blob = Descriptor(mediaType="x/y", digest=f"sha256:{'0' * 64}", size=3)
    for read in (
        lambda: repository.blob(blob.digest, 3),
        lambda: repository.stream_blobs([blob], tmp_path),
    ):
        with pytest.raises(RegistryContentError):
            read()


@pytest.mark.parametrize("path", ["manifests/dev", "blobs/x", "tags/list", "referrers/x"])
@pytest.mark.parametrize("status", [200, 401, 307, 404, 503])
def test_endless_answer_is_cut_off(
    status: int, path: str, registry: RegistryServer, repository: Repository
) -> None:
    headers = {"Location": "/v2/", "WWW-Authenticate": 'Basic realm="x"'}
    registry.plant("GET", f".*/{path}.*", endless=True, status=status, headers=headers, times=-1)
    kind, _, name = path.partition("/")
    reads: dict[str, Callable[[], object]] = {
        "manifests": lambda: repository.resolve(name),
        "blobs": lambda: repository.blob(name, 100),
        "tags": repository.tags,
        "referrers": lambda: referrers(repository, name),
    }
    read = reads[kind]
    # One that leads to another document is of no referrers API.
    if (status == 404 and kind != "blobs") or (status, kind) == (307, "referrers"):
        read()
    else:
        with pytest.raises(ForgeError):
            read()
    assert registry.sent < MOST


def test_endless_token_is_cut_off(registry: RegistryServer, repository: Repository) -> None:
    challenge = {"WWW-Authenticate": f'Bearer realm="{registry.url}/token"'}
    registry.plant("GET", ".*/manifests/dev", status=401, headers=challenge)
    registry.plant("GET", "/token.*", endless=True, status=200)
    with pytest.raises(RegistryContentError, match="sends more than"):
        repository.resolve("dev")


def test_dripping_answer_ends_at_a_time(
    registry: RegistryServer, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "PATIENCE_S", -1000)  # is over when the first bytes come
    push_image(repository, "dev")
    with pytest.raises(RegistryUnreachableError, match="does not answer: Timeout"):
        repository.resolve("dev")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"7", b"[" * 100_000, b'{"mediaType": "x/y"}',
        b'{"mediaType": "%b", "layers": [], "manifests": []}' % MANIFEST.encode(),
        b'{"a": 1, "a": 2}', b"\xff\xfe{}",
    ],
)  # fmt: skip
def test_manifest_that_is_not_one_is_refused(
    content: bytes, registry: RegistryServer, repository: Repository
) -> None:
    """Also what one reader takes for an index and another for an image (CVE-2021-41190)."""
    registry.put(NAME, content, MANIFEST, "dev")
    with pytest.raises(RegistryContentError, match="is invalid"):
        repository.resolve("dev")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"tags": 7}', b'{"tags": {"a": 1}}'])
def test_list_that_is_not_one_is_refused(
    content: bytes, registry: RegistryServer, repository: Repository
) -> None:
    registry.plant("GET", ".*/tags/list", status=200, content=content)
    with pytest.raises(RegistryContentError, match="is not a list of tags"):
        repository.tags()


def test_what_cannot_be_a_tag_is_left_out_of_a_list(
    registry: RegistryServer, repository: Repository, root: Path
) -> None:
    """Python reads no number of so many digits, and tags are counted."""
    cell = Project(root).cell("b300")
    number = f"{cell.line.vllm}-forge.{'9' * 5000}-{cell.sku_name}"
    names = [number, f"{number}-rc{'9' * 5000}", "a b", "a\x1b[31m", "../a", "", "\u0661", 7, "dev"]
    content = json.dumps({"tags": names}).encode()
    registry.plant("GET", ".*/tags/list", status=200, content=content)
    assert (tags := repository.tags()) == ("dev",)
    assert choose_names(cell, "release", "", tags, repository.resolve).fixed


def test_list_that_goes_on_elsewhere_is_refused(
    registry: RegistryServer, elsewhere: RegistryServer, repository: Repository
) -> None:
    link = {"Link": f'<{elsewhere.url}/v2/x/tags/list>; rel="next"'}
    registry.plant("GET", ".*/tags/list", status=200, content=b'{"tags": []}', headers=link)
    with pytest.raises(RegistryContentError, match="goes on at another host"):
        repository.tags()
    assert elsewhere.requests == []


@pytest.mark.parametrize("address", ["http://[", "https://[::1", "//[x]/"])
@pytest.mark.parametrize("place", ["manifest", "upload", "page", "token"])
def test_address_that_cannot_be_parsed_is_refused(
    place: str, address: str, registry: RegistryServer, repository: Repository
) -> None:
    challenge = f'Bearer realm="{address}"'
    faults: dict[str, tuple[str, int, dict[str, str], Callable[[], object]]] = {
        "manifest": ("GET", 307, {"Location": address}, lambda: repository.resolve("dev")),
        "upload": ("POST", 202, {"Location": address}, lambda: repository.put_blob(b"x")),
        "page": ("GET", 200, {"Link": f'<{address}>; rel="next"'}, repository.tags),
        "token": ("GET", 401, {"WWW-Authenticate": challenge}, lambda: repository.resolve("dev")),
    }
    method, status, headers, read = faults[place]
    registry.plant(method, ".*", status=status, headers=headers, content=b'{"tags": []}')
    with pytest.raises(ForgeError):
        read()


def test_list_of_too_many_rows_is_refused(
    registry: RegistryServer, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of 4 MB has a million empty rows, and there may be 200 pages."""
    monkeypatch.setattr(module, "MOST_ROWS", 3)
    registry.plant("GET", ".*/tags/list", status=200, content=b'{"tags": [[], [], [], []]}')
    with pytest.raises(RegistryContentError, match="has more than 3 rows"):
        repository.tags()


def test_list_that_never_ends_is_refused(registry: RegistryServer, repository: Repository) -> None:
    link = {"Link": '<list>; rel="next"'}
    registry.plant(
        "GET", ".*/tags/list", status=200, content=b'{"tags": []}', headers=link, times=-1
    )
    with pytest.raises(RegistryContentError, match="has more than 200 pages"):
        repository.tags()


def test_blob_is_read_elsewhere_without_the_login(
    elsewhere: RegistryServer, home: Path, tmp_path: Path
) -> None:
    digest = digest_of(b"x")
    elsewhere.blobs[digest] = b"x"
    with RegistryServer(login=LOGIN).running() as registry:
        store_login(home / ".docker" / "config.json", registry.host)
        (home / ".netrc").write_text("machine 127.0.0.1 login netrc password netrc\n")
        location = {"Location": f"{elsewhere.url}/v2/{NAME}/blobs/{digest}?signed=t0ken"}
        repository = open_repository(registry)
        assert repository.resolve("dev") is None
        registry.plant("GET", ".*/blobs/.*", status=307, headers=location, times=2)
        assert repository.blob(digest, 1) == b"x"
        repository.stream_blobs([Descriptor(mediaType="x", digest=digest, size=1)], tmp_path)
    assert {row.authorization for row in elsewhere.requests} == {""}
    assert registry.asked("GET", ".*/blobs/.*")[0].authorization


def test_upload_elsewhere_is_without_the_login(elsewhere: RegistryServer, home: Path) -> None:
    with RegistryServer(login=LOGIN).running() as registry:
        store_login(home / ".docker" / "config.json", registry.host)
        location = {"Location": f"{elsewhere.url}/v2/{NAME}/blobs/uploads/s"}
        elsewhere.uploads["s"] = b""
        registry.plant("POST", ".*", status=202, headers=location)
        repository = open_repository(registry)
        digest = repository.put_blob(b"x")
    assert elsewhere.blobs == {digest: b"x"}
    assert {row.authorization for row in elsewhere.requests} == {""}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_registry_does_not_give_up_tls(
    method: str, elsewhere: RegistryServer, tmp_path: Path
) -> None:
    certificates = make_certificates(tmp_path / "tls")
    with RegistryServer(tls=certificates).running() as registry:
        location = {"Location": f"{elsewhere.url}/v2/{NAME}/blobs/uploads/s"}
        registry.plant(method, ".*", status=202 if method == "POST" else 307, headers=location)
        repository = open_repository(registry, ca=certificates.authority)
        with pytest.raises(RegistryContentError, match="redirects to an address without TLS"):
            repository.put_blob(b"x") if method == "POST" else repository.resolve("dev")
    assert elsewhere.requests == []


def test_login_does_not_go_to_a_token_service_without_tls(
    elsewhere: RegistryServer, home: Path, tmp_path: Path
) -> None:
    certificates = make_certificates(tmp_path / "tls")
    with RegistryServer(tls=certificates).running() as registry:
        store_login(home / ".docker" / "config.json", registry.host)
        challenge = {"WWW-Authenticate": f'Bearer realm="{elsewhere.url}/token"'}
        registry.plant("GET", ".*", status=401, headers=challenge)
        with pytest.raises(RegistryAuthError, match="names a token service without TLS"):
            open_repository(registry, ca=certificates.authority).resolve("dev")
    assert elsewhere.requests == []


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"[]",
        b'{"token": 7}',
        b'{"token": "a\\r\\nX-More: b"}',
        b'{"token": "\\u00e9"}',
        b"\xff",
    ],
)
def test_token_that_is_not_one_is_refused(
    content: bytes, registry: RegistryServer, repository: Repository
) -> None:
    challenge = {"WWW-Authenticate": f'Bearer realm="{registry.url}/token"'}
    registry.plant("GET", ".*/manifests/dev", status=401, headers=challenge)
    registry.plant("GET", "/token.*", status=200, content=content)
    with pytest.raises(RegistryAuthError, match="gives no token"):
        repository.resolve("dev")


@pytest.mark.parametrize(
    "challenge", ["", "Digest realm=x", "Bearer", 'Bearer realm="file:///etc/passwd"']
)
def test_challenge_that_is_not_one_is_refused(
    challenge: str, registry: RegistryServer, repository: Repository
) -> None:
    registry.plant("GET", ".*/manifests/dev", status=401, headers={"WWW-Authenticate": challenge})
    with pytest.raises(RegistryAuthError):
        repository.resolve("dev")


def test_redirects_end(registry: RegistryServer, repository: Repository) -> None:
    registry.plant("GET", ".*", status=307, headers={"Location": "/v2/x"}, times=-1)
    with pytest.raises(RegistryUnreachableError, match="TooManyRedirects"):
        repository.resolve("dev")


def test_secrets_are_in_no_message(home: Path, tmp_path: Path) -> None:
    with RegistryServer(login=("robot", "other")).running() as registry:
        store_login(home / ".docker" / "config.json", registry.host)
        with pytest.raises(RegistryAuthError) as refused:
            open_repository(registry).resolve("dev")
        assert LOGIN[1] not in str(refused.value.as_dict())
    with RegistryServer().running() as registry:
        repository = open_repository(registry)
        location = {"Location": "http://127.0.0.1:9/blob?signed=t0ken"}
        registry.plant("GET", ".*/blobs/.*", status=307, headers=location, times=-1)
        blob = Descriptor(mediaType="x", digest=f"sha256:{'0' * 64}", size=1)
        for read in (
            lambda: repository.blob(blob.digest, 1),
            lambda: repository.stream_blobs([blob], tmp_path),
        ):
            with pytest.raises(RegistryUnreachableError) as unreachable:
                read()
            assert "t0ken" not in str(unreachable.value.as_dict())


def test_broken_registry_names_nothing(registry: RegistryServer, repository: Repository) -> None:
    """It answers 500 half-way; the same calls then go on to the same end."""
    subject = repository.manifest(push_image(repository))
    steps = [
        ("POST", ".*/blobs/uploads/"), ("PUT", ".*/blobs/uploads/.*"), ("PUT", ".*/manifests/.*"),
        ("GET", ".*/referrers/.*"),
    ]  # fmt: skip
    for method, path in steps:
        registry.plant(method, path, status=500, times=-1)
        with pytest.raises(RegistryUnreachableError, match="answers 500"):
            attach(repository, subject, b"{1}", SBOM)
            repository.set_tag("1.0", subject.digest)
        assert registry.tags == {}
        registry.faults.clear()
    attach(repository, subject, b"{1}", SBOM)
    repository.set_tag("1.0", subject.digest)
    assert len(referrers(repository, subject.digest)) == 1


def test_manifest_that_was_stored_as_another_is_reported(
    registry: RegistryServer, repository: Repository
) -> None:
    headers = {"Docker-Content-Digest": f"sha256:{'0' * 64}"}
    registry.plant("PUT", ".*/manifests/.*", status=201, headers=headers)
    with pytest.raises(RegistryContentError, match=r"it stored sha256:.* as sha256:0000"):
        push_image(repository, "dev")


class Pretender(RecordingRunner):
    """Runs no command, so it pushes nothing; acts."""

    def act(self, what: str, action: Any) -> Any:
        del what
        return action()


def test_pushed_image_is_read_back_before_it_is_named(
    registry: RegistryServer, repository: Repository, tmp_path: Path
) -> None:
    reference = Reference.parse(f"{registry.host}/{NAME}:dev")
    with pytest.raises(ManifestMissingError):
        command._push(Pretender(), tmp_path, reference, "0" * 64)
    digest = push_image(repository)
    registry.plant("GET", f".*/manifests/{digest}", change=other_bytes)
    with pytest.raises(RegistryContentError):
        command._push(Pretender(), tmp_path, reference, digest.removeprefix("sha256:"))
    assert registry.tags == {}
    command._push(Pretender(), tmp_path, reference, digest.removeprefix("sha256:"))
    assert registry.tags == {(NAME, "dev"): digest}


@pytest.mark.parametrize(
    ("host", "plain"),
    [
        ("localhost", True), ("localhost:5000", True), ("127.0.0.1:5000", True),
        ("[::1]:5000", True), ("localhost.evil.example", False), ("127.0.0.1.evil.example", False),
        ("127.0.0.10:5000", False), ("localhost-x:1", False), ("registry.example:443", False),
    ],
)  # fmt: skip
def test_push_without_tls_is_to_this_host_only(host: str, plain: bool, tmp_path: Path) -> None:
    runner = RecordingRunner()
    push_layout(runner, tmp_path, Reference.parse(f"{host}/vllm:1"), f"sha256:{'0' * 64}")
    assert ("--dest-tls-verify=false" in runner.commands[0]) == plain
    runner = RecordingRunner()
    authority = make_certificates(tmp_path / "tls").authority
    reference = Reference.parse(f"{host}/vllm:1")
    push_layout(runner, tmp_path, reference, f"sha256:{'0' * 64}", ca=authority)
    assert "--dest-tls-verify=false" not in runner.commands[0]


@pytest.mark.parametrize(
    "text",
    [
        "user:s3cret@localhost:5000/x:1", "https://registry.example/x", "-x", "", "x y", "x\n",
        "registry.example/X:1", "r.example/x:1 --all", "localhost:5000#.evil.example/x",
        "docker://x/y", "localhost:5000", "name:tag", "library/name", "h.example/x:1\n",
        "h.example/x:\x1b[2J", "h.example/../x", "h.example/x/../../y", "h.example/x@sha256:00",
        "h.example/x@md5:" + "0" * 32, "h.example/x?y", "h.example/%2e%2e/x", "h..example/x",
        "h.example:port/x", "h.example/" + "x" * 600, "-h.example/x", "h.example/x:.a",
        "h.example/x@user:s3cret@h.example/y",
    ],
)  # fmt: skip
def test_invalid_reference_is_refused_before_the_build(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        command._push_target(text)
    assert "s3cret" not in str(refused.value)
    assert len(str(refused.value)) < 800


def test_push_to_a_digest_is_refused() -> None:
    with pytest.raises(UsageError, match="invalid --push"):
        command._push_target(f"registry.example/x@sha256:{'0' * 64}")
