"""Bundles: what is signed is read back, and by whom; nothing else is."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.keys import key_pair, trust
from vllm_forge.release.statements import PROVENANCE
from vllm_forge.signing import (
    Keyring,
    Verified,
    load_private,
    read,
    read_keyring,
    read_public,
    sign,
    verify,
)
from vllm_forge.signing.bundle import Statement, Subject
from vllm_forge.signing.errors import BundleError, KeyRoleError, UnknownSignerError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
STATEMENT = Statement(
    subject=(Subject(name="image", digest={"sha256": "5" * 64}),),
    predicate_type=PROVENANCE,
    predicate={"builder": "ä"},
)


def check(content: bytes, keys: Keyring) -> Verified:
    return verify(read(content), keys, role="release", now=NOW)


@pytest.mark.parametrize("kind", ["ed25519", "p256"])
def test_signed_statement_is_read_back(tmp_path: Path, kind: str) -> None:
    private, public = key_pair(tmp_path, kind)
    content = sign(STATEMENT.content, load_private(private))
    verified = check(content, Keyring(keys=(read_public(public),)))
    assert verified.content == STATEMENT.content
    assert verified.statement.predicate_type == PROVENANCE
    assert verified.statement == STATEMENT
    assert (verified.signer, len(verified.key_id)) == ("public.pem", 64)
    assert content == sign(STATEMENT.content, load_private(private))


def test_bundle_has_the_form_of_sigstore(tmp_path: Path) -> None:
    key = load_private(key_pair(tmp_path)[0])
    document = json.loads(sign(STATEMENT.content, key))
    assert document["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    assert document["verificationMaterial"]["publicKey"] == {"hint": key.public.hint}
    envelope = document["dsseEnvelope"]
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    assert base64.b64decode(envelope["payload"]) == STATEMENT.content


def test_key_needs_the_role(tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    trust(tmp_path, public, roles='["receipts"]')
    content = sign(STATEMENT.content, load_private(private))
    with pytest.raises(KeyRoleError):
        check(content, read_keyring(tmp_path))


def test_empty_keyring_verifies_nothing(tmp_path: Path) -> None:
    content = sign(STATEMENT.content, load_private(key_pair(tmp_path)[0]))
    with pytest.raises(UnknownSignerError, match="signed by the key with hint"):
        check(content, Keyring())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.update(mediaType="application/json"), "mediaType"),
        (lambda data: data.update(more=1), "more"),
        (lambda data: data["dsseEnvelope"].update(payloadType="text/plain"), "payloadType"),
        (lambda data: data["dsseEnvelope"].update(signatures=[]), "signatures"),
        (lambda data: data["dsseEnvelope"]["signatures"].append({"sig": "AA=="}), "signatures"),
        (lambda data: data["dsseEnvelope"].update(payload="e30"), "padding"),
        (lambda data: data["dsseEnvelope"].update(payload="e31="), "base64 of another form"),
        (lambda data: data["verificationMaterial"].pop("publicKey"), "expected either"),
        (
            lambda data: data["verificationMaterial"].update(certificate={"rawBytes": "AA=="}),
            "expected either",
        ),
    ],
)
def test_other_form_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    data = json.loads(sign(STATEMENT.content, load_private(key_pair(tmp_path)[0])))
    change(data)
    with pytest.raises(BundleError, match=said):
        read(json.dumps(data).encode())


@pytest.mark.parametrize(
    "payload",
    [
        b"not json",
        b"[]",
        b"{}",
        STATEMENT.content.replace(b"Statement/v1", b"Statement/v0.1"),
        STATEMENT.content.replace(b'"predicate":', b'"predicates":'),
    ],
)
def test_signed_payload_must_be_a_statement(tmp_path: Path, payload: bytes) -> None:
    private, public = key_pair(tmp_path)
    content = sign(payload, load_private(private))
    with pytest.raises(BundleError, match="statement"):
        check(content, Keyring(keys=(read_public(public),)))


def test_message_names_the_file() -> None:
    with pytest.raises(BundleError) as caught:
        read(b"{}", "dist/image.attest/sbom.sigstore.json")
    assert caught.value.where == "dist/image.attest/sbom.sigstore.json"
