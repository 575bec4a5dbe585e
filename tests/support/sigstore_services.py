"""Sigstore's services on 127.0.0.1, small: tokens of a CI job, Fulcio, its CT log, and Rekor.

With a trusted root of their own, in the form that sigstore-python reads: what it signs with them it
verifies with its own code, certificate, timestamp of the CT log, log entry and checkpoint included.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID
from sigstore.models import ClientTrustConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

ISSUER = "https://token.actions.githubusercontent.com"
SERVER = "https://github.com"
WORKFLOW = "forge/vllm/.github/workflows/release.yml@refs/heads/main"
IDENTITY = f"{SERVER}/{WORKFLOW}"
SCT_LIST = ExtensionOID.PRECERT_SIGNED_CERTIFICATE_TIMESTAMPS
SHA256_ECDSA = bytes((4, 3))  # RFC 5246, 7.4.1.4.1
DAY = timedelta(days=1)


def fulcio_oid(number: int) -> x509.ObjectIdentifier:
    return x509.ObjectIdentifier(f"1.3.6.1.4.1.57264.1.{number}")


def encoded(value: bytes) -> str:
    return base64.b64encode(value).decode()


def tagged(tag: int, value: bytes) -> bytes:
    """DER of a string."""
    size = len(value)
    assert size < 1 << 16
    length = bytes((size,)) if size < 128 else bytes((0x82, size >> 8, size & 255))
    return bytes((tag,)) + length + value


class Key:
    """A key of P-256 that signs SHA-256."""

    def __init__(self) -> None:
        self.private = ec.generate_private_key(ec.SECP256R1())
        self.public = self.private.public_key()
        self.spki = self.public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.id = hashlib.sha256(self.spki).digest()

    def sign(self, data: bytes) -> bytes:
        return self.private.sign(data, ec.ECDSA(hashes.SHA256()))

    def log(self, url: str) -> dict[str, Any]:
        """A transparency log in a trusted root."""
        public = {
            "rawBytes": encoded(self.spki), "keyDetails": "PKIX_ECDSA_P256_SHA_256",
            "validFor": {"start": "2020-01-01T00:00:00Z"},
        }  # fmt: skip
        return {
            "baseUrl": url, "hashAlgorithm": "SHA2_256", "publicKey": public,
            "logId": {"keyId": encoded(self.id)},
        }  # fmt: skip


@dataclass
class Sigstore:
    """The services. ``runner``: environment that tokens, and so certificates, name; None: none.

    ``status``: what Fulcio and Rekor answer, by the end of the path; others answer 201.
    """

    runner: str | None = "github-hosted"
    status: dict[str, int] = field(default_factory=dict)
    authority: Key = field(default_factory=Key)
    ct: Key = field(default_factory=Key)
    rekor: Key = field(default_factory=Key)
    url: str = ""

    def __post_init__(self) -> None:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fulcio of a test")])
        usage = dict.fromkeys(
            ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
             "key_agreement", "encipher_only", "decipher_only"), False
        )  # fmt: skip
        self.root = (
            self._certificate(name, self.authority.public)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
            .sign(self.authority.private, hashes.SHA256())
        )

    def _certificate(
        self, subject: x509.Name, public: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fulcio of a test")])
        now = datetime.now(UTC)
        own = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.authority.public)
        return (
            x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(own, critical=False)
        )

    def issue(self, public: Any, token: dict[str, Any]) -> x509.Certificate:
        """A certificate for who a token is of, with a timestamp of the CT log."""
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"), False
        )  # fmt: skip
        identity = x509.UniformResourceIdentifier(f"{SERVER}/{token['job_workflow_ref']}")
        builder = (
            self._certificate(x509.Name([]), public)
            .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False
            )
            .add_extension(x509.SubjectAlternativeName([identity]), critical=True)
        )
        texts = {1: token["iss"].encode(), 8: tagged(0x0C, token["iss"].encode())}
        if "runner_environment" in token:
            texts[11] = tagged(0x0C, token["runner_environment"].encode())
        for number, value in texts.items():
            row = x509.UnrecognizedExtension(fulcio_oid(number), value)
            builder = builder.add_extension(row, critical=False)
        unlogged = builder.sign(self.authority.private, hashes.SHA256()).tbs_certificate_bytes
        stamps = x509.UnrecognizedExtension(SCT_LIST, tagged(0x04, self._timestamps(unlogged)))
        return builder.add_extension(stamps, critical=False).sign(
            self.authority.private, hashes.SHA256()
        )

    def _timestamps(self, certificate: bytes) -> bytes:
        """A list with one timestamp of the CT log (RFC 6962, 3.2 and 3.3)."""
        at = struct.pack("!Q", int(time.time() * 1000))
        entry = self.authority.id + struct.pack("!I", len(certificate))[1:] + certificate
        signature = self.ct.sign(b"\x00\x00" + at + b"\x00\x01" + entry + b"\x00\x00")
        stamp = b"\x00" + self.ct.id + at + b"\x00\x00" + SHA256_ECDSA
        stamp += struct.pack("!H", len(signature)) + signature
        stamp = struct.pack("!H", len(stamp)) + stamp
        return struct.pack("!H", len(stamp)) + stamp

    def entry(self, proposed: dict[str, Any]) -> dict[str, Any]:
        """An entry of a log with no other: its leaf is the root of the tree."""
        content = proposed["spec"]["proposedContent"]
        envelope = json.loads(content["envelope"])

        def hashed(data: bytes) -> dict[str, str]:
            return {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}

        spec = {
            "envelopeHash": hashed(content["envelope"].encode()),
            "payloadHash": hashed(base64.b64decode(envelope["payload"])),
            "signatures": [
                {"signature": envelope["signatures"][0]["sig"], "verifier": content["verifiers"][0]}
            ],
        }
        body = json.dumps({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec}).encode()
        root = hashlib.sha256(b"\x00" + body).digest()
        signed = {
            "body": encoded(body), "integratedTime": int(time.time()), "logID": self.rekor.id.hex(),
            "logIndex": 0,
        }  # fmt: skip
        promise = self.rekor.sign(json.dumps(signed, separators=(",", ":")).encode())
        note = f"log of a test\n1\n{encoded(root)}\n"
        signature = encoded(self.rekor.id[:4] + self.rekor.sign(note.encode()))
        proof = {
            "logIndex": 0, "rootHash": root.hex(), "treeSize": 1, "hashes": [],
            "checkpoint": f"{note}\n\u2014 rekor {signature}\n",
        }  # fmt: skip
        checked = {"inclusionProof": proof, "signedEntryTimestamp": encoded(promise)}
        return {"0" * 64: {**signed, "verification": checked}}

    def token(self) -> str:
        """What GitHub gives a job that may request an identity."""
        now = int(time.time())
        claims = {
            "iss": ISSUER, "sub": "repo:forge/vllm:ref:refs/heads/main", "aud": "sigstore",
            "iat": now, "exp": now + 600, "job_workflow_ref": WORKFLOW,
        }  # fmt: skip
        runner = {} if self.runner is None else {"runner_environment": self.runner}
        return jwt.encode(claims | runner, "x" * 32, algorithm="HS256")

    def config(self) -> ClientTrustConfig:
        """What sigstore-python gets from the TUF repository."""
        chain = {"certificates": [{"rawBytes": encoded(self.root.public_bytes(Encoding.DER))}]}
        valid = {"start": "2020-01-01T00:00:00Z"}
        service = [{"url": self.url, "majorApiVersion": 1, "validFor": valid, "operator": "a test"}]
        document = {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": [self.rekor.log(self.url)],
                "ctlogs": [self.ct.log(self.url)],
                "certificateAuthorities": [
                    {"subject": {"commonName": "fulcio of a test", "organization": "a test"},
                     "uri": self.url, "certChain": chain, "validFor": valid}
                ],
                "timestampAuthorities": [],
            },
            "signingConfig": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": service, "oidcUrls": service, "rekorTlogUrls": service, "tsaUrls": [],
                "rekorTlogConfig": {"selector": "ANY"}, "tsaConfig": {"selector": "ANY"},
            },
        }  # fmt: skip
        return ClientTrustConfig.from_json(json.dumps(document))

    def answer(self, path: str, authorization: str, content: bytes) -> Any:
        if path.startswith("/token"):
            return {"value": self.token()}
        document = json.loads(content)
        if not path.endswith("/signingCert"):
            return self.entry(document)
        claims = jwt.decode(
            authorization.removeprefix("Bearer "), options={"verify_signature": False}
        )
        request = x509.load_pem_x509_csr(base64.b64decode(document["certificateSigningRequest"]))
        chain = [self.issue(request.public_key(), claims), self.root]
        pems = [row.public_bytes(Encoding.PEM).decode() for row in chain]
        return {"signedCertificateEmbeddedSct": {"chain": {"certificates": pems}}}


@contextmanager
def sigstore_services(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sigstore]:
    """Let sigstore-python use services of a test, in a job of GitHub Actions."""
    services = Sigstore()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = next((n for end, n in services.status.items() if self.path.endswith(end)), 201)
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = services.answer(self.path, self.headers.get("Authorization", ""), content)
            sent = json.dumps(answer).encode()
            self.send_response(200 if self.command == "GET" else status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        services.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        for name, value in {
            "GITHUB_ACTIONS": "true", "GITHUB_SERVER_URL": SERVER, "GITHUB_WORKFLOW_REF": WORKFLOW,
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "t", "ACTIONS_ID_TOKEN_REQUEST_URL":
            f"{services.url}/token?x=1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(
            "sigstore.models.ClientTrustConfig.production", lambda **_: services.config()
        )
        try:
            yield services
        finally:
            server.shutdown()
            thread.join()
