"""Keyless signatures: exact identities only, and what sigstore-python refuses."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.keys import key_pair
from tests.support.sigstore_services import IDENTITY, Sigstore, sigstore_services
from tests.support.sigstore_services import ISSUER as GITHUB
from vllm_forge.release.statements import PROVENANCE
from vllm_forge.signing import Bundle, load_private, read, sign
from vllm_forge.signing.bundle import Statement, Subject, sign_keyless, verify_keyless
from vllm_forge.signing.errors import (
    IdentityError,
    KeylessError,
    SignatureInvalidError,
    UnknownSignerError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WHO = "https://ci.example/project/release@main"
ISSUER = "https://tokens.ci.example"
STATEMENT = Statement(
    subject=(Subject(name="image", digest={"sha256": "5" * 64}),),
    predicate_type=PROVENANCE,
    predicate={},
)


@pytest.fixture
def keyless(tmp_path: Path) -> Bundle:
    """A bundle with a certificate that nobody issued."""
    data = json.loads(sign(STATEMENT.content, load_private(key_pair(tmp_path)[0])))
    certificate = {"rawBytes": base64.b64encode(b"certificate").decode()}
    data["verificationMaterial"] = {"certificate": certificate, "tlogEntries": []}
    return read(json.dumps(data).encode())


@pytest.mark.parametrize(
    ("identity", "issuer"),
    [("", ISSUER), (WHO, ""), (".*", ISSUER), (f"^{WHO}$", ISSUER), (WHO, "https://(a|b)")],
)
def test_pattern_is_not_an_identity(keyless: Bundle, identity: str, issuer: str) -> None:
    with pytest.raises(IdentityError, match="expected the exact"):
        verify_keyless(keyless, identity=identity, issuer=issuer)


def test_certificate_that_nobody_issued_is_refused(keyless: Bundle) -> None:
    with pytest.raises(SignatureInvalidError, match="keyless signature does not hold"):
        verify_keyless(keyless, identity=WHO, issuer=ISSUER)


def test_bundle_of_a_key_is_not_keyless(tmp_path: Path) -> None:
    bundle = read(sign(STATEMENT.content, load_private(key_pair(tmp_path)[0])))
    with pytest.raises(UnknownSignerError, match="not by an identity"):
        verify_keyless(bundle, identity=WHO, issuer=ISSUER)


class FakeVerifier:
    """In place of sigstore-python: keeps what it was asked, and gives one answer."""

    def __init__(self, kind: str, payload: bytes) -> None:
        self.answer = (kind, payload)
        self.policies: list[Any] = []

    def verify_dsse(self, _: object, policy: object) -> tuple[str, bytes]:
        self.policies.append(policy)
        return self.answer


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], FakeVerifier]:
    """Let sigstore-python answer with this type and payload."""

    def set_answer(kind: str, payload: bytes) -> FakeVerifier:
        verifier = FakeVerifier(kind, payload)
        monkeypatch.setattr("sigstore.verify.Verifier.production", lambda **_: verifier)
        monkeypatch.setattr("sigstore.models.Bundle.from_json", lambda content: content)
        return verifier

    return set_answer


def test_exact_identity_and_issuer_are_asked_for(
    keyless: Bundle, answer: Callable[[str, bytes], FakeVerifier]
) -> None:
    verifier = answer("application/vnd.in-toto+json", STATEMENT.content)
    verified = verify_keyless(keyless, identity=WHO, issuer=ISSUER)
    assert verified.content == STATEMENT.content
    assert (verified.signer, verified.key_id) == (f"{WHO} ({ISSUER})", "")
    (policy,) = verifier.policies
    assert (policy._identity, policy._issuer._value) == (WHO, ISSUER)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        ("application/json", STATEMENT.content),
        ("application/vnd.in-toto+json", STATEMENT.content + b" "),
    ],
)
def test_other_payload_than_the_bundle_s_is_refused(
    keyless: Bundle, answer: Callable[[str, bytes], FakeVerifier], kind: str, payload: bytes
) -> None:
    answer(kind, payload)
    with pytest.raises(SignatureInvalidError, match="another payload was signed"):
        verify_keyless(keyless, identity=WHO, issuer=ISSUER)


def test_host_without_identity_does_not_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sigstore.oidc.detect_credential", lambda: None)
    with pytest.raises(KeylessError, match="no identity to sign with"):
        sign_keyless(STATEMENT.content)


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sigstore]:
    with sigstore_services(monkeypatch) as running:
        yield running


@pytest.mark.parametrize(
    ("runner", "hosted"), [("github-hosted", True), ("self-hosted", False), (None, False)]
)
def test_statement_of_a_job_holds_and_names_its_runner(
    services: Sigstore, runner: str | None, *, hosted: bool
) -> None:
    """Signed with a token, a certificate and a log entry; verified by sigstore-python itself."""
    services.runner = runner
    bundle = read(sign_keyless(STATEMENT.content))
    verified = verify_keyless(bundle, identity=IDENTITY, issuer=GITHUB)
    assert (verified.content, verified.key_id) == (STATEMENT.content, "")
    assert verified.hosted == hosted


@pytest.mark.parametrize(
    ("identity", "issuer"), [(f"{IDENTITY}2", GITHUB), (IDENTITY, f"{GITHUB}.example")]
)
def test_statement_of_another_job_is_refused(
    services: Sigstore, identity: str, issuer: str
) -> None:
    bundle = read(sign_keyless(STATEMENT.content))
    with pytest.raises(SignatureInvalidError, match="not match"):
        verify_keyless(bundle, identity=identity, issuer=issuer)
    services.runner = "self-hosted"  # another certificate for the same identity
    other = json.loads(sign_keyless(STATEMENT.content))
    mixed = json.loads(bundle.content)
    mixed["verificationMaterial"]["certificate"] = other["verificationMaterial"]["certificate"]
    with pytest.raises(SignatureInvalidError):
        verify_keyless(read(json.dumps(mixed).encode()), identity=IDENTITY, issuer=GITHUB)


@pytest.mark.parametrize("path", ["/signingCert", "/log/entries"])
def test_failing_service_gives_no_signature(services: Sigstore, path: str) -> None:
    services.status[path] = 500
    with pytest.raises(KeylessError, match=r"cannot sign as this host's identity: \S"):
        sign_keyless(STATEMENT.content)


def test_service_of_another_trust_root_is_refused(services: Sigstore) -> None:
    bundle = read(sign_keyless(STATEMENT.content))
    services.rekor = Sigstore().rekor
    with pytest.raises(SignatureInvalidError, match="invalid log entry"):
        verify_keyless(bundle, identity=IDENTITY, issuer=GITHUB)
