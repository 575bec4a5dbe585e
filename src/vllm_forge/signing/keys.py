"""Private keys that sign, and the keyring of public ones that are trusted, each for its roles.

ECDSA on P-256 and Ed25519. A key's id is securesystemslib's; its hint is what Sigstore bundles name
it by: base64 of the SHA-256 of its SubjectPublicKeyInfo in DER (sigstore-go, pkg/sign/keys.go).

No signature here has a trusted time. So a key is judged at the time of verification, not at that
of signing, and a revoked key counts for nothing, also for what it signed before.
"""

import base64
import hashlib
import os
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from pydantic import Field, model_validator
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import Key, Signature, SSlibKey

from vllm_forge.host import open_plain, printable, read_data, read_plain
from vllm_forge.matrix import FrozenModel
from vllm_forge.signing import errors

FOLDER = "records/keys"
TABLE = "keyring.toml"
MOST_BYTES = 1 << 16
Role = Literal["release", "builder", "receipts", "vex"]

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=64)]
# Shown on pages and in terminals: no control characters, nothing that Markdown or HTML reads.
Line = Annotated[str, Field(pattern=r"^[\w .,:;@()/+-]+$", max_length=200)]

MAKE = (
    "make a key with: openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem; "
    "its public half with: openssl pkey -in key.pem -pubout -out NAME.pem"
)


class Revocation(FrozenModel):
    date: date
    reason: Line


class KeyRow(FrozenModel):
    """``[key.NAME]`` of the keyring; both days included, in UTC."""

    owner: Line
    roles: tuple[Role, ...] = Field(min_length=1)
    valid_from: date
    valid_until: date
    revoked: Revocation | None = None

    @model_validator(mode="after")
    def _in_order(self) -> "KeyRow":
        if self.valid_from > self.valid_until:
            raise ValueError("valid_until is before valid_from")
        return self


class KeyTable(FrozenModel):
    key: dict[Name, KeyRow] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrustedKey:
    """A public key; without a row it is trusted for everything, in one call, as ``--key`` is."""

    name: str
    public: Key
    spki: bytes = field(repr=False)  # DER
    row: KeyRow | None = None

    @property
    def id(self) -> str:
        return str(self.public.keyid)

    @property
    def valid_from(self) -> datetime:
        first = date.min if self.row is None else self.row.valid_from
        return datetime.combine(first, time.min, UTC)

    @cached_property
    def hint(self) -> str:
        return base64.b64encode(hashlib.sha256(self.spki).digest()).decode()

    def verify(self, signature: bytes, data: bytes, where: str) -> None:
        """SignatureInvalidError unless it is this key's signature of ``data``."""
        try:
            self.public.verify_signature(Signature(self.id, signature.hex()), data)
        except (UnverifiedSignatureError, VerificationError) as error:
            what = f"invalid signature of key {self.name}: {printable(str(error))}"
            remedy = "get the file again; if it is the same, it was edited after it was signed"
            raise errors.SignatureInvalidError(what, where=where, remedy=remedy) from None

    def require(self, role: Role | None, now: datetime, where: str) -> None:
        """Raise unless this key may sign for ``role`` (None: for any) and is valid ``now``."""
        if (row := self.row) is None:
            return
        if row.revoked is not None:
            what = f"key {self.name} was revoked on {row.revoked.date}: {row.revoked.reason}"
            remedy = "have the statement signed with a key that is valid"
            raise errors.KeyRevokedError(what, where=where, remedy=remedy)
        if role is not None and role not in row.roles:
            what = f"key {self.name} may sign {', '.join(row.roles)}, not {role}"
            remedy = f"have the statement signed with a key that has role {role}"
            raise errors.KeyRoleError(what, where=where, remedy=remedy)
        today = now.astimezone(UTC).date()
        if not row.valid_from <= today <= row.valid_until:
            valid = f"from {row.valid_from} to {row.valid_until}"
            what = f"key {self.name} is valid {valid}, and today is {today}"
            remedy = "check this host's clock; or have the statement signed with a valid key"
            raise errors.KeyExpiredError(what, where=where, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class Keyring:
    """Trusted keys; an empty one is usual: nothing that is signed is trusted then."""

    keys: tuple[TrustedKey, ...] = ()

    def find(self, *, hint: str | None = None, keyid: str | None = None) -> TrustedKey | None:
        """The key of this hint, or of this id."""
        return next((key for key in self.keys if key.hint == hint or key.id == keyid), None)

    def has(self, role: Role) -> bool:
        """Whether signatures for ``role`` are expected: also by expired and revoked keys."""
        return any(key.row is None or role in key.row.roles for key in self.keys)

    def including(self, path: Path) -> "Keyring":
        """With the public key of a file, trusted for everything unless it is revoked here."""
        key = read_public(path)
        own = self.find(keyid=key.id)
        if own and own.row and own.row.revoked:
            return self
        return Keyring(keys=(key, *(other for other in self.keys if other is not own)))


@dataclass(frozen=True, kw_only=True)
class PrivateKey:
    """A key that signs; its repr shows the public half."""

    public: TrustedKey
    private: Any = field(repr=False)

    def sign(self, data: bytes) -> bytes:
        """The signature, in DER for ECDSA: the same bytes each time (RFC 6979)."""
        if isinstance(self.private, ec.EllipticCurvePrivateKey):
            algorithm = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
            return self.private.sign(data, algorithm)
        signature: bytes = self.private.sign(data)
        return signature


def load_private(path: Path) -> PrivateKey:
    """Read an unencrypted private key in PEM that only its owner may read; else KeyFileError."""
    try:
        # A link is usual where a secret is mounted; what it leads to must be a plain file.
        with open_plain(path.resolve(strict=True)) as file:
            mode, content = os.fstat(file.fileno()).st_mode, file.read(MOST_BYTES)
        private: Any = load_pem_private_key(content, None)
    except TypeError:
        remedy = "decrypt it into a file of mode 600: openssl pkey -in key.pem -out plain.pem"
        raise _key_file(path, "the private key is encrypted", remedy) from None
    except (OSError, ValueError, RuntimeError, UnsupportedAlgorithm) as error:
        raise _key_file(path, f"not a private key: {_reason(error)}") from None
    if mode & 0o077:
        raise _key_file(
            path,
            f"other users may read or write the private key (mode {mode & 0o777:o})",
            "make another key, for this one may have been read; keep it with: chmod 600",
        )
    return PrivateKey(public=_trusted(path, private.public_key()), private=private)


def read_public(path: Path, name: str = "", row: KeyRow | None = None) -> TrustedKey:
    """Read a public key in PEM; KeyFileError."""
    try:
        public = load_pem_public_key(read_plain(path, MOST_BYTES))
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise _key_file(path, f"not a public key: {_reason(error)}") from None
    return _trusted(path, public, name, row)


def read_keyring(root: Path) -> Keyring:
    """Read ``records/keys``: its table, and a NAME.pem for each row and nothing else.

    Raises:
        KeyringError: the table is invalid, or does not match the files.
        KeyFileError: a file is not a key that can be trusted.
    """
    folder = root / FOLDER
    if not os.path.lexists(folder):
        return Keyring()
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise _keyring(folder, f"cannot read it: {error}") from None
    if link := next((path for path in (folder, folder.parent) if path.is_symlink()), None):
        raise _keyring(link, "it is a link")
    remedy = f"write {FOLDER}/{TABLE} as docs/develop/keys.md shows"
    table = read_data(
        folder / TABLE, KeyTable.model_validate, errors.KeyringError,
        what="table of trusted keys", remedy=remedy,
    )  # fmt: skip
    expected = {TABLE, *(f"{name}.pem" for name in table.key)}
    if differing := sorted(names ^ expected):
        missing = differing[0] in expected
        raise _keyring(folder / differing[0], "the file is missing" if missing else "unknown file")
    keys = tuple(read_public(folder / f"{n}.pem", n, row) for n, row in table.key.items())
    if len({key.id for key in keys}) != len(keys):
        raise _keyring(folder, "two of its keys are the same")
    return Keyring(keys=keys)


def _trusted(path: Path, public: Any, name: str = "", row: KeyRow | None = None) -> TrustedKey:
    curve = getattr(public, "curve", None)
    if not isinstance(public, ed25519.Ed25519PublicKey) and not isinstance(curve, ec.SECP256R1):
        kind = curve.name if curve else type(public).__name__.removesuffix("PublicKey")
        raise _key_file(path, f"not an Ed25519 or P-256 key: it is a {kind} key")
    return TrustedKey(
        name=name or path.name,
        public=SSlibKey.from_crypto(public),
        spki=public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        row=row,
    )


def _reason(error: Exception) -> str:
    """What a library says of a file; cryptography's own messages go on over several lines."""
    return printable(str(error).partition("\n")[0].partition(". ")[0]) or type(error).__name__


def _key_file(path: Path, what: str, remedy: str = MAKE) -> errors.KeyFileError:
    return errors.KeyFileError(what, where=path, remedy=remedy)


def _keyring(path: Path, why: str) -> errors.KeyringError:
    remedy = f"keep {TABLE} and a NAME.pem for each of its rows there, and nothing else"
    return errors.KeyringError(f"invalid keyring: {why}", where=path, remedy=remedy)
