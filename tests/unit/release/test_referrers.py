"""Attached bundles: listed by the registry, or in an index that its writers share."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import pytest

from tests.support.registry_client import NAME, push_image
from tests.support.registry_server import INDEX, RegistryServer, digest_of
from vllm_forge.images.layout import MANIFEST
from vllm_forge.release import referrers as module
from vllm_forge.release.errors import (
    RegistryAuthError,
    RegistryContentError,
    RegistryUnreachableError,
)
from vllm_forge.release.referrers import attach, referrers
from vllm_forge.release.registry import Manifest, Reference, Repository
from vllm_forge.signing.bundle import MEDIA_TYPE

PROVENANCE, SBOM = "https://slsa.dev/provenance/v1", "https://cyclonedx.org/bom"


@pytest.fixture(params=[True, False], ids=["api", "index"])
def registry(request: pytest.FixtureRequest) -> Iterator[RegistryServer]:
    """A registry with the referrers API, and one without."""
    with RegistryServer(referrers_api=request.param).running() as running:
        yield running


@pytest.fixture
def plain() -> Iterator[RegistryServer]:
    """A registry without the referrers API."""
    with RegistryServer(referrers_api=False).running() as running:
        yield running


def open_repository(registry: RegistryServer) -> Repository:
    return Repository(Reference.parse(f"{registry.host}/{NAME}"))


def subject_of(repository: Repository) -> Manifest:
    return repository.manifest(push_image(repository, "dev"))


def index_of(registry: RegistryServer, subject: Manifest) -> list[dict[str, object]]:
    digest = registry.tags[NAME, subject.digest.replace(":", "-")]
    rows: list[dict[str, object]] = json.loads(registry.manifests[NAME, digest][1])["manifests"]
    return rows


def write_index(registry: RegistryServer, subject: Manifest, rows: list[dict[str, object]]) -> None:
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": rows}
    tag = subject.digest.replace(":", "-")
    registry.put(NAME, json.dumps(index).encode(), INDEX, tag)


def test_bundles_are_attached_and_listed(registry: RegistryServer, repository: Repository) -> None:
    subject = subject_of(repository)
    assert referrers(repository, subject.digest) == ()
    first = attach(repository, subject, b"{1}", PROVENANCE)
    second = attach(repository, subject, b"{2}", SBOM)
    found = referrers(repository, subject.digest)
    assert [row.manifest.digest for row in found] == [first, second]
    assert [row.bundle(repository) for row in found] == [b"{1}", b"{2}"]
    assert {row.artifact_type for row in found} == {MEDIA_TYPE}
    assert found[0].artifact.annotations["dev.sigstore.bundle.predicateType"] == PROVENANCE
    assert found[0].artifact.subject.digest == subject.digest
    assert not [tag for _, tag in registry.tags if tag != "dev" and registry.referrers_api]


def test_one_connection_serves_all_requests(
    registry: RegistryServer, repository: Repository
) -> None:
    """A TLS handshake for each would take most of the time."""
    subject = subject_of(repository)
    attach(repository, subject, b"{1}", PROVENANCE)
    repository.set_tag("1.0", subject.digest)
    assert len(referrers(repository, subject.digest)) == 1
    assert registry.connections == 1


def test_attaching_again_changes_nothing(registry: RegistryServer, repository: Repository) -> None:
    subject = subject_of(repository)
    first = attach(repository, subject, b"{1}", PROVENANCE)
    held = set(registry.manifests), dict(registry.tags), set(registry.blobs)
    assert attach(repository, subject, b"{1}", PROVENANCE) == first
    assert held == (set(registry.manifests), dict(registry.tags), set(registry.blobs))


def test_listing_of_many_pages_is_read(repository: Repository, registry: RegistryServer) -> None:
    registry.page = 2
    subject = subject_of(repository)
    made = [attach(repository, subject, b"{%d}" % number, SBOM) for number in range(5)]
    assert [row.manifest.digest for row in referrers(repository, subject.digest)] == made


def test_index_has_what_readers_filter_by(plain: RegistryServer) -> None:
    repository = open_repository(plain)
    subject = subject_of(repository)
    digest = attach(repository, subject, b"{1}", PROVENANCE)
    (row,) = index_of(plain, subject)
    assert (row["digest"], row["mediaType"], row["artifactType"]) == (digest, MANIFEST, MEDIA_TYPE)
    assert row["size"] == len(plain.manifests[NAME, digest][1])
    assert row["annotations"] == {
        "dev.sigstore.bundle.content": "dsse-envelope",
        "dev.sigstore.bundle.predicateType": PROVENANCE,
    }


def test_entries_of_others_are_kept_in_the_index(plain: RegistryServer) -> None:
    repository = open_repository(plain)
    subject = subject_of(repository)
    stored = plain.put(NAME, b"{}", "x/y")
    other = {"mediaType": "x/y", "digest": stored, "size": 2, "odd": [1]}
    write_index(plain, subject, [other])
    digest = attach(repository, subject, b"{1}", PROVENANCE)
    rows = index_of(plain, subject)
    assert rows[0] == other
    assert rows[1]["digest"] == digest


def test_writer_that_overwrites_an_entry_restores_it(plain: RegistryServer) -> None:
    """The other writer reads, writes and checks while this one is between reading and writing."""
    mine, theirs = open_repository(plain), open_repository(plain)
    subject = subject_of(mine)
    tag = subject.digest.replace(":", "-")
    plain.plant(
        "PUT", f".*/manifests/{tag}", before=lambda: attach(theirs, subject, b"{their}", SBOM)
    )
    attach(mine, subject, b"{mine}", SBOM)
    assert len(index_of(plain, subject)) == 2
    assert {row.bundle(mine) for row in referrers(mine, subject.digest)} == {b"{mine}", b"{their}"}


def test_many_writers_at_once_lose_nothing(plain: RegistryServer) -> None:
    subject, count = subject_of(open_repository(plain)), 8
    barrier = threading.Barrier(count)

    def work(number: int) -> None:
        repository = open_repository(plain)
        barrier.wait()
        for round_ in range(3):
            attach(repository, subject, b"{%d.%d}" % (number, round_), SBOM)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(index_of(plain, subject)) == 3 * count


def test_entry_of_which_a_killed_writer_robbed_others_is_found(plain: RegistryServer) -> None:
    repository = open_repository(plain)
    subject = subject_of(repository)
    lost = attach(repository, subject, b"{1}", PROVENANCE)
    write_index(plain, subject, [])
    assert [row.manifest.digest for row in referrers(repository, subject.digest)] == [lost]
    second = attach(repository, subject, b"{2}", SBOM)
    assert {row["digest"] for row in index_of(plain, subject)} == {lost, second}


def test_index_that_never_keeps_the_entry_is_reported(
    plain: RegistryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TRIES", 3)
    repository = open_repository(plain)
    subject = subject_of(repository)
    tag = subject.digest.replace(":", "-")
    plain.plant("GET", f".*/manifests/{tag}", times=-1, status=404)
    with pytest.raises(RegistryUnreachableError, match="was changed 3 times"):
        attach(repository, subject, b"{1}", PROVENANCE)


def test_registry_that_lists_nothing_gets_an_index(
    registry: RegistryServer, repository: Repository
) -> None:
    """Of a proxy: it answers the API with an empty list."""
    empty = json.dumps({"schemaVersion": 2, "manifests": None}).encode()
    headers = {"Content-Type": INDEX}
    registry.plant("GET", ".*/referrers/.*", times=-1, status=200, content=empty, headers=headers)
    subject = subject_of(repository)
    digest = attach(repository, subject, b"{1}", PROVENANCE)
    assert [row["digest"] for row in index_of(registry, subject)] == [digest]
    assert [row.manifest.digest for row in referrers(repository, subject.digest)] == [digest]


@pytest.mark.parametrize(
    ("status", "kind", "content"),
    [(400, "text/plain", b"bad request"), (406, "application/json", b"{}"),
     (200, "text/html", b"<html>"), (200, "application/json", b"{}")],
)  # fmt: skip
def test_other_answer_than_an_index_is_of_no_api(
    plain: RegistryServer, status: int, kind: str, content: bytes
) -> None:
    headers = {"Content-Type": kind}
    plain.plant("GET", ".*/referrers/.*", times=-1, status=status, content=content, headers=headers)
    repository = open_repository(plain)
    subject = subject_of(repository)
    digest = attach(repository, subject, b"{1}", PROVENANCE)
    assert [row["digest"] for row in index_of(plain, subject)] == [digest]
    assert [row.manifest.digest for row in referrers(repository, subject.digest)] == [digest]


@pytest.mark.parametrize("status", [401, 403, 500])
def test_failing_listing_is_not_taken_for_an_empty_one(plain: RegistryServer, status: int) -> None:
    plain.plant("GET", ".*/referrers/.*", times=-1, status=status)
    repository = open_repository(plain)
    subject = subject_of(repository)
    with pytest.raises((RegistryUnreachableError, RegistryAuthError)):
        referrers(repository, subject.digest)


def test_entries_that_are_not_referrers_hide_no_other(plain: RegistryServer) -> None:
    repository = open_repository(plain)
    subject = subject_of(repository)
    digest = attach(repository, subject, b"{1}", PROVENANCE)
    other = repository.manifest(push_image(repository, label="other"))
    foreign = attach(repository, other, b"{2}", PROVENANCE)
    rows: list[object] = [
        {"digest": f"sha256:{'7' * 64}"}, {"digest": other.digest}, {"digest": foreign},
        {"digest": "../../x"}, {"digest": 7}, {}, 7, None,
    ]  # fmt: skip
    write_index(plain, subject, [*rows, *index_of(plain, subject)])  # type: ignore[list-item]
    assert [row.manifest.digest for row in referrers(repository, subject.digest)] == [digest]


def test_type_of_an_entry_is_read_from_the_manifest(plain: RegistryServer) -> None:
    """A registry may list another type in its index."""
    repository = open_repository(plain)
    subject = subject_of(repository)
    digest = attach(repository, subject, b"{1}", PROVENANCE)
    write_index(plain, subject, [{"digest": digest, "artifactType": "x/y", "annotations": {}}])
    (row,) = referrers(repository, subject.digest)
    assert row.artifact_type == MEDIA_TYPE
    assert row.artifact.annotations["dev.sigstore.bundle.predicateType"] == PROVENANCE


def test_entry_whose_manifest_is_gone_is_dropped(plain: RegistryServer) -> None:
    repository = open_repository(plain)
    subject = subject_of(repository)
    gone = attach(repository, subject, b"{1}", PROVENANCE)
    del plain.manifests[NAME, gone]
    digest = attach(repository, subject, b"{2}", SBOM)
    assert [row["digest"] for row in index_of(plain, subject)] == [digest]
    assert attach(repository, subject, b"{1}", PROVENANCE) == gone
    assert [row["digest"] for row in index_of(plain, subject)] == [digest, gone]


def test_misnamed_tag_keeps_no_writer_busy(plain: RegistryServer) -> None:
    """Whoever may push may set a tag that looks like that of a manifest which the index lacks."""
    repository = open_repository(plain)
    subject = subject_of(repository)
    first = attach(repository, subject, b"{1}", PROVENANCE)
    tag = subject.digest.replace(":", "-")
    plain.tags |= {(NAME, f"{tag}.{'0' * 32}"): first, (NAME, f"{tag}.{'1' * 32}"): subject.digest}
    second = attach(repository, subject, b"{2}", SBOM)
    assert [row["digest"] for row in index_of(plain, subject)] == [first, second]


def test_number_of_referrers_has_a_bound(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of(repository)
    for content in (b"{1}", b"{2}"):
        attach(repository, subject, content, SBOM)
    monkeypatch.setattr(module, "MOST", 1)
    with pytest.raises(RegistryContentError, match="more than 1 manifests are attached"):
        referrers(repository, subject.digest)


def test_size_of_what_is_attached_has_a_bound(
    repository: Repository, registry: RegistryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is kept in memory, and whoever may push can attach any number of bundles."""
    subject = subject_of(repository)
    for content in (b"1" * 5000, b"2" * 5000):
        attach(repository, subject, content, SBOM)
    monkeypatch.setattr(module, "MOST_BYTES", 9000)
    with pytest.raises(RegistryContentError, match="more than 9000 bytes are attached"):
        referrers(repository, subject.digest)
    assert not registry.asked("GET", ".*/blobs/.*")


def test_tag_that_is_not_a_list_is_refused(plain: RegistryServer) -> None:
    repository = open_repository(plain)
    subject = subject_of(repository)
    tag = subject.digest.replace(":", "-")
    repository.put_manifest(subject.content, MANIFEST, tag)
    with pytest.raises(RegistryContentError, match="is not a list of what is attached"):
        attach(repository, subject, b"{1}", PROVENANCE)
    assert plain.tags[NAME, tag] == subject.digest


def test_manifest_without_one_layer_is_not_a_bundle(
    repository: Repository, registry: RegistryServer
) -> None:
    subject = subject_of(repository)
    digest = attach(repository, subject, b"{1}", PROVENANCE)
    document = json.loads(registry.manifests[NAME, digest][1])
    document["layers"] *= 2
    content = json.dumps(document).encode()
    module.put_referrer(repository, content)
    row = referrers(repository, subject.digest)[1]
    assert row.manifest.digest == digest_of(content)
    with pytest.raises(RegistryContentError, match="expected one layer"):
        row.bundle(repository)
