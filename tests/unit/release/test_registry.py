"""References, and a repository against a registry that conforms, or fails in chosen ways."""

from __future__ import annotations

import base64
import json
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.certificates import make_certificates
from tests.support.index_server import refusing_port
from tests.support.registry_client import LOGIN, NAME, push_image, store_login
from tests.support.registry_server import RegistryServer, digest_of
from vllm_forge.errors import UsageError
from vllm_forge.images.layout import MANIFEST
from vllm_forge.release.errors import (
    ManifestMissingError,
    RegistryAuthError,
    RegistryContentError,
    RegistryUnreachableError,
)
from vllm_forge.release.registry import Descriptor, Reference, Repository
from vllm_forge.release.transport import stored_credentials
from vllm_forge.sources import index


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("registry.example/a/b", ("registry.example", "a/b", None, None)),
        ("registry.example:443/a:1.0-x", ("registry.example:443", "a", "1.0-x", None)),
        ("localhost/a__b.c:T", ("localhost", "a__b.c", "T", None)),
        ("[::1]:5000/a", ("[::1]:5000", "a", None, None)),
        (f"h.example/a@sha256:{'0' * 64}", ("h.example", "a", None, f"sha256:{'0' * 64}")),
        (f"h.example/a:t@sha256:{'0' * 64}", ("h.example", "a", "t", f"sha256:{'0' * 64}")),
    ],
)
def test_reference_is_parsed(text: str, parts: tuple[str | None, ...]) -> None:
    made = Reference.parse(text)
    assert (made.registry, made.repository, made.tag, made.digest) == parts
    assert str(made) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a@sha256:11", "a@sha256:11"), ("user:password@a.b/c@sha256:11", "a.b/c@sha256:11"),
        ("user:p@ss@a.b/c", "a.b/c"), ("a.b/c@md5:11", "md5:11"),
    ],
)  # fmt: skip
def test_invalid_reference_is_named_without_a_password(text: str, shown: str) -> None:
    with pytest.raises(UsageError, match=f"invalid image reference {shown!r}"):
        Reference.parse(text)


@pytest.mark.parametrize(
    ("host", "scheme"),
    [
        ("localhost", "http"), ("localhost:5000", "http"), ("127.0.0.1:5000", "http"),
        ("[::1]:5000", "http"), ("[::1]", "http"), ("localhost.evil.example", "https"),
        ("127.0.0.1.evil.example", "https"), ("127.0.0.10:5000", "https"), ("LOCALHOST:1", "https"),
        ("[::11]", "https"), ("registry.example:443", "https"),
    ],
)  # fmt: skip
def test_tls_is_off_for_this_host_only(host: str, scheme: str) -> None:
    made = Repository(Reference.parse(f"{host}/vllm:1"))
    assert made.session.base == f"{scheme}://{host}"


def test_docker_hub_answers_at_another_host() -> None:
    made = Repository(Reference.parse("docker.io/vllm/vllm"))
    assert made.session.base == "https://registry-1.docker.io"


def test_blob_is_uploaded_once_and_read(registry: RegistryServer, repository: Repository) -> None:
    digest = repository.put_blob(b"bytes")
    assert repository.put_blob(b"bytes") == digest == digest_of(b"bytes")
    assert repository.blob(digest, 5) == b"bytes"
    assert len(registry.asked("POST", ".*")) == 1


def test_file_is_uploaded(registry: RegistryServer, repository: Repository, tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(bytes(1 << 20))
    registry.plant("PUT", ".*", status=503)  # all of it is sent again
    digest = repository.put_blob(path)
    assert repository.blob(digest, 1 << 20) == bytes(1 << 20)


def test_manifest_is_found_by_tag_and_digest(repository: Repository) -> None:
    digest = push_image(repository, "dev")
    assert repository.resolve("dev") == digest
    assert repository.manifest(digest).media_type == MANIFEST
    assert repository.resolve("other") is None
    with pytest.raises(ManifestMissingError, match="other not found"):
        repository.manifest("other")


def test_tag_is_moved_and_read_back(registry: RegistryServer, repository: Repository) -> None:
    first, second = push_image(repository, "dev"), push_image(repository, label="second")
    repository.set_tag("dev", second)
    assert repository.resolve("dev") == second != first
    registry.plant(
        "GET", ".*/manifests/dev", before=lambda: registry.tags.update({(NAME, "dev"): first})
    )
    with pytest.raises(RegistryContentError, match=f"was set to {second} and resolves to {first}"):
        repository.set_tag("dev", second)


def test_tags_of_all_pages_are_listed(registry: RegistryServer, repository: Repository) -> None:
    registry.page = 2
    assert repository.tags() == ()
    for tag in ("a", "b", "c", "d", "e"):
        push_image(repository, tag)
    assert repository.tags() == ("a", "b", "c", "d", "e")
    registry.plant("GET", ".*last=2", status=404)
    with pytest.raises(RegistryContentError, match="is not a list of tags"):
        repository.tags()


@pytest.mark.parametrize("bearer", [False, True])
@pytest.mark.parametrize(
    "place", ["run/containers/auth.json", ".config/containers/auth.json", ".docker/config.json"]
)
def test_stored_login_is_used(place: str, bearer: bool, home: Path) -> None:
    with RegistryServer(login=LOGIN, bearer=bearer).running() as registry:
        store_login(home / place, registry.host)
        repository = Repository(Reference.parse(f"{registry.host}/{NAME}"))
        assert repository.resolve("dev") is None
        digest = push_image(repository, "dev")
        assert repository.resolve("dev") == digest


@pytest.mark.parametrize("variable", ["REGISTRY_AUTH_FILE", "DOCKER_CONFIG"])
def test_chosen_file_of_logins_is_the_only_one(
    variable: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = tmp_path / "chosen" / "config.json"
    store_login(chosen, "other.example")
    value = chosen.parent if variable == "DOCKER_CONFIG" else chosen
    with RegistryServer(login=LOGIN).running() as registry:
        store_login(home / ".docker" / "config.json", registry.host)
        monkeypatch.setenv(variable, str(value))
        repository = Repository(Reference.parse(f"{registry.host}/{NAME}"))
        with pytest.raises(RegistryAuthError, match="asks for a login, and none is stored"):
            repository.resolve("dev")
        store_login(chosen, registry.host)
        assert repository.resolve("dev") is None


def test_login_of_a_repository_goes_before_that_of_its_host(home: Path) -> None:
    with RegistryServer(login=LOGIN).running() as registry:
        file = home / ".docker" / "config.json"
        store_login(file, f"{registry.host}/forge")
        logins = json.loads(file.read_text())
        logins["auths"][registry.host] = {"auth": base64.b64encode(b"other:x").decode()}
        file.write_text(json.dumps(logins))
        assert Repository(Reference.parse(f"{registry.host}/{NAME}")).resolve("x") is None
        with pytest.raises(RegistryAuthError, match="answers 401"):
            Repository(Reference.parse(f"{registry.host}/other")).resolve("x")


@pytest.mark.parametrize("key", ["credHelpers", "credsStore"])
def test_credential_helper_is_asked(
    key: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer is an identity token, which is traded for a token of the registry."""
    secret = base64.b64encode(LOGIN[1].encode()).decode()
    with RegistryServer(login=LOGIN, bearer=True).running() as registry:
        answer = json.dumps({"ServerURL": registry.host, "Username": "<token>", "Secret": secret})
        helper = tmp_path / "bin" / "docker-credential-test"
        helper.parent.mkdir()
        helper.write_text(
            f'#!/bin/sh\nread -r host || :\ntest "$1 $host" = "get {registry.host}" || exit 9\n'
            f"echo '{answer}'\n"
        )
        helper.chmod(helper.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{helper.parent}:/usr/bin:/bin")
        (home / ".docker").mkdir()
        value = "test" if key == "credsStore" else {registry.host: "test"}
        (home / ".docker" / "config.json").write_text(json.dumps({key: value}))
        repository = Repository(Reference.parse(f"{registry.host}/{NAME}"))
        assert repository.resolve("dev") is None
        helper.write_text("#!/bin/sh\necho 'credentials not found in native keychain'; exit 1\n")
        repository = Repository(Reference.parse(f"{registry.host}/{NAME}"))
        with pytest.raises(RegistryAuthError, match="token service says 401"):
            repository.resolve("dev")
        helper.write_text("#!/bin/sh\necho 'the keychain is locked'; exit 1\n")
        with pytest.raises(RegistryAuthError, match="the keychain is locked"):
            repository.resolve("dev")


def test_stored_identity_token_is_used(home: Path) -> None:
    with RegistryServer(login=LOGIN, bearer=True).running() as registry:
        row = {"identitytoken": base64.b64encode(LOGIN[1].encode()).decode(), "auth": "cm9ib3Q6"}
        (home / ".docker").mkdir()
        logins = {"auths": {registry.host: row}}
        (home / ".docker" / "config.json").write_text(json.dumps(logins))
        assert Repository(Reference.parse(f"{registry.host}/{NAME}")).resolve("dev") is None


def test_login_of_docker_hub_goes_by_its_old_name(home: Path) -> None:
    store_login(home / "secret.json", "https://index.docker.io/v1/")
    (home / ".docker").mkdir()
    (home / ".docker" / "config.json").symlink_to(home / "secret.json")  # as Kubernetes mounts it
    stored = stored_credentials("docker.io", "vllm/vllm")
    assert stored is not None
    assert (stored.user, stored.secret) == LOGIN
    assert LOGIN[1] not in repr(stored)
    assert stored_credentials("registry.example", "vllm/vllm") is None


def test_invalid_file_of_logins_is_refused(home: Path, repository: Repository) -> None:
    file = home / ".docker" / "config.json"
    with RegistryServer(login=LOGIN).running() as registry:
        repository = Repository(Reference.parse(f"{registry.host}/{NAME}"))
        store_login(file, registry.host)
        for text in ("{", "[]", file.read_text().replace('"auth": "', '"auth": "?')):
            file.write_text(text)
            with pytest.raises(RegistryAuthError, match="invalid file of registry logins"):
                repository.resolve("dev")


def test_private_authority_is_trusted_only_where_given(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "tls")
    with RegistryServer(tls=certificates).running() as registry:
        reference = Reference.parse(f"{registry.host}/{NAME}")
        repository = Repository(reference, ca=certificates.authority)
        digest = push_image(repository, "dev")
        assert repository.resolve("dev") == digest
        other = make_certificates(tmp_path / "other")
        with pytest.raises(RegistryUnreachableError, match="certificate is not trusted"):
            Repository(reference, ca=other.authority).resolve("dev")
        with pytest.raises(UsageError, match="expected a PEM file"):
            Repository(reference, ca=tmp_path / "missing")


def test_refused_connection_is_reported() -> None:
    with refusing_port() as port:
        repository = Repository(Reference.parse(f"127.0.0.1:{port}/x"))
        with pytest.raises(RegistryUnreachableError, match="does not answer"):
            repository.resolve("dev")


@pytest.mark.parametrize("bearer", [False, True])
def test_registry_of_this_host_is_asked_without_a_proxy(
    bearer: bool, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy would read the login; skopeo goes around it, too."""
    with refusing_port() as port, RegistryServer(login=LOGIN, bearer=bearer).running() as registry:
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        store_login(home / "run" / "containers" / "auth.json", registry.host)
        repository = Repository(Reference.parse(f"{registry.host}/{NAME}"))
        place = {"Location": f"/v2/{NAME}/manifests/dev"}
        registry.plant("GET", ".*/manifests/old", status=307, headers=place)
        digest = push_image(repository, "dev")
        assert repository.resolve("old") == digest


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_registry_is_asked_again(
    status: int, registry: RegistryServer, repository: Repository
) -> None:
    registry.plant("PUT", ".*/manifests/dev", status=status, times=3)
    registry.plant("POST", ".*/blobs/uploads/", status=status, times=3)
    assert push_image(repository, "dev") == registry.tags[NAME, "dev"]
    registry.plant("GET", ".*/manifests/dev", status=status, times=-1)
    with pytest.raises(RegistryUnreachableError, match=f"answers {status} to GET"):
        repository.resolve("dev")


def test_retry_after_is_obeyed_up_to_a_bound(
    registry: RegistryServer, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    clock = SimpleNamespace(sleep=waits.append, monotonic=time.monotonic)
    monkeypatch.setattr(index, "time", clock)
    for asked in ("2", "86400"):
        registry.plant("GET", ".*/manifests/dev", status=429, headers={"Retry-After": asked})
    assert repository.resolve("dev") is None
    assert waits == [2, index.LONGEST_WAIT_S]


def test_what_the_registry_says_is_reported(
    registry: RegistryServer, repository: Repository
) -> None:
    content = json.dumps({"errors": [{"code": "TAG_INVALID", "message": "immutable"}]}).encode()
    registry.plant("PUT", ".*/manifests/dev", status=409, content=content)
    with pytest.raises(RegistryUnreachableError, match="409 to PUT: TAG_INVALID: immutable"):
        push_image(repository, "dev")
    registry.plant("PUT", ".*/manifests/dev", status=403, content=b"<html>")
    with pytest.raises(RegistryAuthError, match=r"answers 403 to PUT\n"):
        push_image(repository, "dev")


def test_cut_body_is_read_again(registry: RegistryServer, repository: Repository) -> None:
    digest = repository.put_blob(bytes(100))
    registry.plant("GET", ".*/blobs/.*", cut=50, times=2)
    assert repository.blob(digest, 100) == bytes(100)
    registry.plant("GET", ".*/blobs/.*", cut=50, times=-1)
    with pytest.raises(RegistryUnreachableError, match="does not answer"):
        repository.blob(digest, 100)


def test_blobs_are_downloaded_and_resumed(
    registry: RegistryServer, repository: Repository, tmp_path: Path
) -> None:
    content = [bytes([number]) * (3 << 20) for number in range(3)]
    rows = [
        Descriptor(mediaType="x/y", digest=repository.put_blob(blob), size=len(blob))
        for blob in content
    ]
    names = [row.digest.removeprefix("sha256:") for row in rows]
    damaged, unfinished = (tmp_path / name for name in names[:2])
    damaged.write_bytes(b"x")
    unfinished.with_name(f"{unfinished.name}.part").write_bytes(content[1][: 1 << 20])
    registry.plant("GET", f".*/blobs/{rows[2].digest}", status=500, times=2)
    repository.stream_blobs(rows, tmp_path)
    assert [path.read_bytes() for path in (damaged, unfinished)] == content[:2]
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == set(names)
