"""Sigstore bundles v0.3 around an in-toto statement: what cosign and @sigstore/verify read.

Written: a DSSE envelope signed by a key, named by its hint; no log entry and no time, for there is
no service in between. Read: those, and keyless ones: an identity's certificate and an entry in
Sigstore's log, judged by sigstore-python, offline, with the roots that it carries. Keyless ones are
signed only where the host has an ambient identity, as jobs of hosted CI have.

Sources: github.com/sigstore/protobuf-specs, protos/sigstore_bundle.proto;
github.com/secure-systems-lab/dsse, protocol.md.
"""

import base64
import hashlib
import logging
import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from pydantic import ConfigDict, Field
from securesystemslib.dsse import Envelope

from vllm_forge.errors import first_problem
from vllm_forge.host import canonical, parse_json, printable
from vllm_forge.matrix import FrozenModel
from vllm_forge.signing import errors
from vllm_forge.signing.keys import Keyring, PrivateKey, Role, TrustedKey

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE: Literal["https://in-toto.io/Statement/v1"] = "https://in-toto.io/Statement/v1"
LARGEST = 64 << 20  # the SBOM of a full image is about 3 MB
# What sigstore-python 4.5's parsers let through of damaged certificates and log entries.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError)
# As Fulcio's certificates call GitHub's own runners; others are "self-hosted"
# (github.com/sigstore/fulcio, docs/oid-info.md, 1.3.6.1.4.1.57264.1.11).
HOSTED = "github-hosted"
PATTERN = re.compile(r"[*^$|\\()\[\]{}\s]")


class Subject(FrozenModel):
    """What a statement is about: an in-toto ResourceDescriptor, of which the digest counts."""

    model_config = ConfigDict(extra="ignore")

    name: str = ""
    digest: dict[str, str] = Field(min_length=1)


class Statement(FrozenModel):
    """An in-toto statement v1; ``predicate`` is as its type has it."""

    model_config = ConfigDict(populate_by_name=True)

    kind: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type", default=STATEMENT_TYPE)
    subject: tuple[Subject, ...] = Field(min_length=1)
    predicate_type: str = Field(alias="predicateType")
    predicate: dict[str, Any]

    @property
    def content(self) -> bytes:
        """Canonical bytes, to be signed."""
        return canonical(self.model_dump(mode="json", by_alias=True))

    def has_subject(self, digest: str) -> bool:
        """Whether it is about the manifest ``sha256:<hex>``."""
        algorithm, _, value = digest.partition(":")
        return any(subject.digest.get(algorithm) == value for subject in self.subject)


class _PublicKey(FrozenModel):
    hint: str = Field(pattern=r"^[!-~]{1,200}$")  # what a message may show


class _Material(FrozenModel):
    public_key: _PublicKey | None = Field(alias="publicKey", default=None)
    certificate: dict[str, str] | None = None
    log_entries: tuple[dict[str, Any], ...] = Field(alias="tlogEntries", default=())
    timestamps: dict[str, Any] = Field(alias="timestampVerificationData", default_factory=dict)


class _Signature(FrozenModel):
    sig: str
    keyid: str = ""  # says nothing that the hint does not


class _Envelope(FrozenModel):
    payload: str
    payload_type: Literal["application/vnd.in-toto+json"] = Field(alias="payloadType")
    signatures: tuple[_Signature] = Field()


class _Document(FrozenModel):
    media_type: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"] = Field(alias="mediaType")
    material: _Material = Field(alias="verificationMaterial")
    envelope: _Envelope = Field(alias="dsseEnvelope")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle as read; nothing of it is verified. ``hint`` is None where it is keyless."""

    content: bytes = field(repr=False)
    where: str
    statement: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    hint: str | None


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A statement whose signature holds; ``signer`` is a key's name, or an identity.

    ``hosted``: by its certificate it was signed on a runner of the platform, not on one's own.
    """

    statement: Statement
    content: bytes = field(repr=False)  # the statement's bytes
    signer: str
    key_id: str = ""  # none: keyless
    hosted: bool = False

    @property
    def sha256(self) -> str:
        """Of the statement, hex: a decision names it by that."""
        return hashlib.sha256(self.content).hexdigest()


def pae(payload: bytes) -> bytes:
    """The bytes that are signed: DSSE's encoding of payload and type."""
    encoded: bytes = Envelope(payload, PAYLOAD_TYPE, {}).pae()
    return encoded


def sign(statement: bytes, key: PrivateKey) -> bytes:
    """A bundle of this statement; the same bytes each time."""
    return wrap(statement, key.sign(pae(statement)), key.public)


def wrap(statement: bytes, signature: bytes, key: TrustedKey) -> bytes:
    """A bundle of a statement that this key has signed."""
    envelope = {
        "payload": base64.b64encode(statement).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"sig": base64.b64encode(signature).decode()}],
    }
    material = {"publicKey": {"hint": key.hint}, "tlogEntries": []}
    return canonical(
        {"mediaType": MEDIA_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope}
    )


def read(content: bytes, where: str = "") -> Bundle:
    """Parse a bundle; BundleError. ``where`` is its file or address, for messages."""
    if len(content) > LARGEST:
        raise _invalid(where, f"larger than {LARGEST} bytes")
    try:
        document = _Document.model_validate(parse_json(content))
        statement = _decode(document.envelope.payload)
        signature = _decode(document.envelope.signatures[0].sig)
    except ValueError as error:
        raise _invalid(where, first_problem(error)) from None
    material = document.material
    if (material.public_key is None) == (material.certificate is None):
        raise _invalid(where, "expected either the hint of a key or a certificate")
    hint = None if material.public_key is None else material.public_key.hint
    return Bundle(content=content, where=where, statement=statement, signature=signature, hint=hint)


def verify(bundle: Bundle, keys: Keyring, *, role: Role, now: datetime) -> Verified:
    """The statement of a bundle that one of ``keys`` signed, and may sign for ``role`` now.

    Raises:
        UnknownSignerError: signed by another key, or keyless.
        SignatureInvalidError: statement or signature were changed.
        KeyRevokedError, KeyRoleError, KeyExpiredError: the key does not count.
        BundleError: signed, but not an in-toto statement.
    """
    key = None if bundle.hint is None else keys.find(hint=bundle.hint)
    if key is None:
        signer = "keyless" if bundle.hint is None else f"by the key with hint {bundle.hint}"
        raise errors.UnknownSignerError(
            f"signed {signer}, which is not trusted",
            where=bundle.where,
            remedy="if you trust the signer, give the public key with --key, or the exact "
            "--identity and --issuer of a keyless one",
        )
    key.verify(bundle.signature, pae(bundle.statement), bundle.where)
    key.require(role, now, bundle.where)
    statement, content = parse_statement(bundle), bundle.statement
    return Verified(statement=statement, content=content, signer=key.name, key_id=key.id)


def verify_keyless(bundle: Bundle, *, identity: str, issuer: str) -> Verified:
    """The statement of a bundle that exactly this identity of this issuer signed.

    Raises:
        IdentityError: identity or issuer is empty, or a pattern.
        UnknownSignerError: signed with a key.
        SignatureInvalidError: signature, certificate, log entry or identity do not hold.
    """
    # Loading these takes most of a second.
    from sigstore.errors import Error  # noqa: PLC0415
    from sigstore.models import Bundle as SigstoreBundle  # noqa: PLC0415
    from sigstore.verify import Verifier, policy  # noqa: PLC0415

    for name, value in (("identity", identity), ("issuer", issuer)):
        if not value or PATTERN.search(value):
            what = f"invalid --{name} {printable(value)!r}: expected the exact {name}"
            remedy = "give it as the certificate has it; patterns are not supported"
            raise errors.IdentityError(what, where=bundle.where, remedy=remedy)
    if bundle.hint is not None:
        what = f"signed by the key with hint {bundle.hint}, not by an identity"
        raise errors.UnknownSignerError(what, where=bundle.where, remedy="give its --key")
    # It would warn that it is offline, which is what we asked for.
    logging.getLogger("sigstore").setLevel(logging.ERROR)
    exact = policy.Identity(identity=identity, issuer=issuer)
    try:
        parsed = SigstoreBundle.from_json(bundle.content)
        kind, payload = Verifier.production(offline=True).verify_dsse(parsed, exact)
    except (Error, *MALFORMED) as error:
        raise _not_held(bundle, str(error)) from None
    if kind != PAYLOAD_TYPE or payload != bundle.statement:
        raise _not_held(bundle, f"another payload was signed, of type {kind}")
    statement = parse_statement(bundle)
    try:
        policy.OIDCRunnerEnvironment(HOSTED).verify(parsed.signing_certificate)
        hosted = True
    except (Error, *MALFORMED):
        hosted = False
    signer = f"{identity} ({issuer})"
    return Verified(statement=statement, content=payload, signer=signer, hosted=hosted)


def sign_keyless(statement: bytes) -> bytes:
    """A bundle signed as the ambient identity of this host; KeylessError where it has none."""
    # Of a service that answers 500; sigstore-python 4.5 has no public name for these.
    from sigstore._internal.fulcio.client import FulcioClientError  # noqa: PLC0415
    from sigstore._internal.rekor import RekorClientError  # noqa: PLC0415
    from sigstore.dsse import Statement  # noqa: PLC0415
    from sigstore.errors import Error  # noqa: PLC0415
    from sigstore.models import ClientTrustConfig  # noqa: PLC0415
    from sigstore.oidc import ExpiredIdentity, IdentityToken, detect_credential  # noqa: PLC0415
    from sigstore.sign import SigningContext  # noqa: PLC0415

    try:
        if (token := detect_credential()) is None:
            what = "this host has no identity to sign with"
            remedy = "sign with --key, or in a CI job that may request an identity token"
            raise errors.KeylessError(what, remedy=remedy)
        context = SigningContext.from_trust_config(ClientTrustConfig.production())
        with context.signer(IdentityToken(token)) as signer:
            return signer.sign_dsse(Statement(statement)).to_json().encode()
    except (
        Error, FulcioClientError, RekorClientError, ExpiredIdentity, OSError, *MALFORMED,
    ) as error:  # fmt: skip
        why = printable(str(error)) or type(error).__name__
        what = f"cannot sign as this host's identity: {why}"
        remedy = "see whether Sigstore's services answer, and sign again; or sign with --key"
        raise errors.KeylessError(what, remedy=remedy) from None


def _not_held(bundle: Bundle, why: str) -> errors.SignatureInvalidError:
    what = f"the keyless signature does not hold: {printable(why)}"
    remedy = "check --identity and --issuer; if they are right, get the file again"
    return errors.SignatureInvalidError(what, where=bundle.where, remedy=remedy)


def parse_statement(bundle: Bundle) -> Statement:
    """The in-toto statement v1 in a bundle whose signature was verified; BundleError."""
    try:
        document = parse_json(bundle.statement)
        statement = Statement.model_validate(document)
    except ValueError as error:
        why = f"its payload is not a statement of type {STATEMENT_TYPE}: {first_problem(error)}"
        raise _invalid(bundle.where, why) from None
    if differing := document.keys() ^ {"_type", "subject", "predicateType", "predicate"}:
        raise _invalid(bundle.where, f"its statement lacks or adds {', '.join(sorted(differing))}")
    return statement


def _decode(text: str) -> bytes:
    """Base64 in the one form that encoding gives."""
    content = base64.b64decode(text, validate=True)
    if base64.b64encode(content).decode() != text:
        raise ValueError("base64 of another form")
    return content


def _invalid(where: str, why: str) -> errors.BundleError:
    what = f"not a Sigstore bundle with one signed in-toto statement: {printable(why)}"
    remedy = "get the file again from where it was published"
    return errors.BundleError(what, where=where, remedy=remedy)
