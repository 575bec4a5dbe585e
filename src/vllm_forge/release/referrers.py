"""What is attached to an image in a registry: manifests that name it as their subject.

A registry with the referrers API lists them (distribution-spec v1.1, "Listing Referrers"). One
without it has an index under the tag ``sha256-<hex>``, which clients maintain by reading and
writing it: of two at once, one overwrites the other's entry, as registries ignore If-Match. So here
each manifest also gets a tag of its own, ``sha256-<hex>.<hex of its digest>``, before its entry is
written, and a writer goes on until it has read an index with an entry for every such tag. Whoever
wrote last also read after that, so no entry stays lost; and a registry does not collect tagged
manifests as garbage.
"""

import re
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError

from vllm_forge.host import canonical, parse_json
from vllm_forge.images.layout import MANIFEST
from vllm_forge.release.errors import RegistryContentError, RegistryUnreachableError
from vllm_forge.release.registry import (
    DIGEST,
    INDEX,
    Blobs,
    Descriptor,
    Manifest,
    Repository,
    digest_of,
)
from vllm_forge.signing.bundle import LARGEST, MEDIA_TYPE

EMPTY = "application/vnd.oci.empty.v1+json"
CONTENT = "dev.sigstore.bundle.content"
PREDICATE = "dev.sigstore.bundle.predicateType"
MOST, MOST_BYTES = 1000, 512 << 20  # that are attached to one image, and are kept in memory
TRIES = 20
NO_API = (400, 404, 406)
OWN_TAG_HEX = 32  # of a manifest's digest, in its own tag


class Artifact(Blobs):
    """A manifest with a subject."""

    artifactType: str = ""
    subject: Descriptor
    annotations: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Referrer:
    """A manifest that is attached to an image; type and annotations are its own."""

    manifest: Manifest
    artifact: Artifact

    @property
    def artifact_type(self) -> str:
        return self.artifact.artifactType or self.artifact.config.mediaType

    @property
    def size(self) -> int:
        """Bytes of the manifest, and of a bundle that may be read."""
        layers = self.artifact.layers if self.artifact_type == MEDIA_TYPE else ()
        blobs = sum(layer.size for layer in layers if layer.size <= LARGEST)
        return len(self.manifest.content) + blobs

    def bundle(self, repository: Repository) -> bytes:
        """The Sigstore bundle; RegistryContentError if the manifest has not exactly one layer."""
        if len(layers := self.artifact.layers) != 1 or layers[0].size > LARGEST:
            what = (
                f"{self.manifest.digest} is not a bundle: expected one layer of at most {LARGEST} B"
            )
            remedy = "see who attached it"
            raise RegistryContentError(what, where=repository.reference, remedy=remedy)
        return repository.blob(layers[0].digest, layers[0].size)


def referrers(repository: Repository, digest: str) -> tuple[Referrer, ...]:
    """What is attached to a manifest, in the registry's order.

    Each is read itself: an index may have a wrong type, or an entry for another subject. An entry
    without a manifest of this subject is passed over, so that it hides no other. Also found is
    what a writer was killed over, which only its own tag names.
    """
    rows = (listed := _api(repository, digest) or []) + _fallback(repository, digest)
    rows += [] if listed else _missing(repository, digest, rows)
    names = list(filter(None, dict.fromkeys(map(_digest, rows))))
    excess, found, size = f"{MOST} manifests" if len(names) > MOST else "", [], 0
    for row in (_referrer(repository, name, digest) for name in names if not excess):
        if row is not None:
            found.append(row)
            size += row.size
            excess = f"{MOST_BYTES} bytes" if size > MOST_BYTES else ""
    if excess:
        what = f"more than {excess} are attached to {digest}"
        remedy = "see who attaches them, and delete what is not needed"
        raise RegistryContentError(what, where=repository.reference, remedy=remedy)
    return tuple(found)


def attach(repository: Repository, subject: Manifest, bundle: bytes, predicate_type: str) -> str:
    """Attach a Sigstore bundle to a manifest of the repository; returns the referrer's digest.

    The same bundle gives the same manifest, so attaching it again changes nothing. The form is
    that of cosign 3 (github.com/sigstore/cosign, specs/BUNDLE_SPEC.md), without its time.
    """
    layer = _descriptor(MEDIA_TYPE, bundle)
    title = f"{layer['digest'].replace(':', '-')}.sigstore.json"
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": MEDIA_TYPE,
        "config": _descriptor(EMPTY, b"{}"),
        "layers": [layer | {"annotations": {"org.opencontainers.image.title": title}}],
        "subject": _descriptor(subject.media_type, subject.content),
        "annotations": {CONTENT: "dsse-envelope", PREDICATE: predicate_type},
    }
    for blob in (bundle, b"{}"):
        repository.put_blob(blob)
    return put_referrer(repository, canonical(document))


def put_referrer(repository: Repository, content: bytes) -> str:
    """Store a manifest whose blobs are there, and have it listed; returns its digest.

    Raises RegistryUnreachableError: others wrote the index each time we did.
    """
    manifest = Manifest(media_type=MANIFEST, content=content)
    subject = parse_json(content)["subject"]["digest"]
    if _api(repository, subject) is not None:
        repository.put_manifest(content, MANIFEST)
        if manifest.digest in map(_digest, _api(repository, subject) or []):
            return manifest.digest
    tag = _tag(subject)
    repository.put_manifest(content, MANIFEST, f"{tag}.{_short(manifest.digest)}")
    for _ in range(TRIES):
        rows = _fallback(repository, subject)
        missing = _missing(repository, subject, rows)
        if not missing and manifest.digest in map(_digest, rows):
            return manifest.digest
        # Registries refuse an index with an entry whose manifest they collected as garbage.
        kept = [row for row in rows if not _digest(row) or repository.find(_digest(row))]
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": kept + missing}
        repository.put_manifest(canonical(index), INDEX, tag)
    raise RegistryUnreachableError(
        f"the list of what is attached to {subject} was changed {TRIES} times while it was written",
        where=f"{repository.reference}:{tag}",
        remedy="wait until other releases are done, and run the same command again",
    )


def _api(repository: Repository, digest: str) -> list[Any] | None:
    """The entries that the registry lists; None where it has no referrers API, as cosign sees it.

    Source: github.com/google/go-containerregistry, pkg/v1/remote/referrers.go.
    """
    return repository.pages(f"referrers/{digest}", "manifests", NO_API, INDEX)


def _fallback(repository: Repository, digest: str) -> list[Any]:
    """The entries of the index that clients maintain."""
    tag = _tag(digest)
    if (manifest := repository.find(tag)) is None:
        return []
    rows = parse_json(manifest.content).get("manifests")
    if not isinstance(rows, list):
        what = f"tag {tag} is not a list of what is attached to {digest}"
        remedy = (
            "see who wrote it, and delete it; what is listed nowhere else must be attached again"
        )
        raise RegistryContentError(what, where=repository.reference, remedy=remedy)
    return rows


def _referrer(repository: Repository, name: str, subject: str) -> Referrer | None:
    """A manifest by digest or tag; None if it is missing or not of this subject."""
    if (manifest := repository.find(name)) is None:
        return None
    try:
        artifact = Artifact.model_validate(parse_json(manifest.content))
    except ValidationError:
        return None
    if manifest.media_type != MANIFEST or artifact.subject.digest != subject:
        return None
    return Referrer(manifest=manifest, artifact=artifact)


def _digest(row: Any) -> str:
    """The digest of an index's entry; "" if it has none."""
    digest = row.get("digest") if isinstance(row, dict) else None
    return digest if isinstance(digest, str) and DIGEST.fullmatch(digest) else ""


def _missing(repository: Repository, subject: str, rows: list[Any]) -> list[dict[str, Any]]:
    """Entries of an index for manifests with a tag of their own that are not among its rows."""
    listed = {_short(_digest(row)) for row in rows}
    own = re.compile(re.escape(_tag(subject)) + rf"\.([0-9a-f]{{{OWN_TAG_HEX}}})")
    names = [match[0] for match in map(own.fullmatch, repository.tags()) if match]
    found = [
        _referrer(repository, name, subject) for name in names if name[-OWN_TAG_HEX:] not in listed
    ]
    return [
        _descriptor(MANIFEST, row.manifest.content)
        | {"artifactType": row.artifact_type, "annotations": row.artifact.annotations}
        for row in found
        if row and _short(row.manifest.digest) not in listed
    ]


def _descriptor(media_type: str, content: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(content), "size": len(content)}


def _tag(digest: str) -> str:
    return digest.replace(":", "-")


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:OWN_TAG_HEX]
