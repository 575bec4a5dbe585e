"""Receipts as files: a DSSE envelope around the statement, signed where there is a key.

With a signature by a key of ``records/receipts/keys``, any change to the payload is detected.
Without one, ``payloadSha256`` detects an accident, not a forger, who would write both: an unsigned
receipt is as trustworthy as the commit that added it, and is shown as "unsigned" everywhere.
The payload is canonical JSON (keys sorted, no spaces), so that one statement has one form.

Source: github.com/secure-systems-lab/dsse, envelope.md; other readers ignore the field that it does
not define.
"""

import base64
import copy
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, Key, SSlibKey

from vllm_forge.host import atomic_path, read_plain
from vllm_forge.receipts import FOLDER, KEYS
from vllm_forge.receipts.errors import ReceiptEditedError, ReceiptKeyError, ReceiptUnreadableError
from vllm_forge.receipts.statement import Statement

PAYLOAD_TYPE = "application/vnd.in-toto+json"
DIGEST = "payloadSha256"
LARGEST = 16 << 20  # a receipt of 347 tests has 300 KB


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A receipt as read; ``signed_by`` has the ids of trusted keys, none if it is unsigned."""

    path: Path
    statement: Statement
    signed_by: tuple[str, ...]


def canonical(statement: Statement) -> bytes:
    data = statement.model_dump(mode="json", by_alias=True)
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def write_receipt(folder: Path, statement: Statement, key: Path | None = None) -> Path:
    """Write ``folder/<digest>/<sku>--<line>--<tier>.json``, signed if there is a private key."""
    envelope = Envelope(canonical(statement), PAYLOAD_TYPE, {})
    if key is not None:
        envelope.sign(CryptoSigner(_load_key(key, public=False)))
    data = envelope.to_dict() | {DIGEST: hashlib.sha256(envelope.payload).hexdigest()}
    path = folder / statement.sha256 / statement.file_name
    with atomic_path(path) as aside:
        aside.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def read_receipt(path: Path, keys: Sequence[Key]) -> Receipt:
    """Read a receipt; its payload must be the one that was written, or signed.

    Raises:
        ReceiptUnreadableError: not a DSSE envelope of a receipt.
        ReceiptEditedError: the payload does not match its digest or a signature.
        ReceiptKeyError: signed by another key than ``keys``, the trusted ones.
    """
    try:
        text = read_plain(path, LARGEST)
        data: dict[str, Any] = json.loads(text, object_pairs_hook=_once)
        payload, kind = base64.b64decode(data["payload"], validate=True), data["payloadType"]
        stated, envelope = data[DIGEST], Envelope.from_dict(copy.deepcopy(data))
        written = envelope.to_dict() | {DIGEST: stated}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from None
    if written != data:
        raise _unreadable(path, "unknown fields, or base64 of another form")
    if kind != PAYLOAD_TYPE:
        raise _unreadable(path, f"unknown payload type {kind!r}")
    if hashlib.sha256(payload).hexdigest() != stated:
        raise _edited(path, "the payload does not match its digest")
    known = {key.keyid: key for key in keys}
    for keyid in envelope.signatures:
        if keyid not in known:
            raise ReceiptKeyError(
                f"signed by key {keyid}, which is not among the trusted ones",
                where=str(path),
                remedy=f"if you trust the signer, add the public key to {FOLDER}/{KEYS}",
            )
        try:
            envelope.verify([known[keyid]], 1)
        except VerificationError as error:
            raise _edited(path, f"invalid signature of key {keyid}: {error}") from None
    try:
        statement = Statement.model_validate_json(payload)
    except ValidationError as error:
        first = error.errors()[0]
        raise _unreadable(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if canonical(statement) != payload:
        raise _edited(path, "the payload is not in canonical form")
    return Receipt(path=path, statement=statement, signed_by=tuple(sorted(envelope.signatures)))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate names: of two, readers take different ones."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError(f"duplicate name among {', '.join(name for name, _ in pairs)}")
    return dict(pairs)


def read_keys(folder: Path) -> list[Key]:
    """Public keys, ``folder/*.pem``; ReceiptKeyError if there is anything else."""
    if not os.path.lexists(folder):
        return []
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise _key_folder(folder, str(error)) from None
    if folder.is_symlink():
        raise _key_folder(folder, "it is a link")
    if others := [path.name for path in paths if path.suffix != ".pem"]:
        raise _key_folder(folder, f"{others[0]} is not named NAME.pem")
    return [SSlibKey.from_crypto(_load_key(path, public=True)) for path in paths]


def _key_folder(folder: Path, why: str) -> ReceiptKeyError:
    return ReceiptKeyError(
        f"cannot read the folder of trusted keys: {why}",
        where=str(folder),
        remedy="make it a folder with a NAME.pem for each signer and nothing else, or delete it",
    )


def _load_key(path: Path, *, public: bool) -> Any:
    # Only needed where there are keys.
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415

    try:
        if public:
            key: Any = serialization.load_pem_public_key(read_plain(path, LARGEST))
        else:
            key = serialization.load_pem_private_key(path.read_bytes(), None)
        why = f"it is a {type(key).__name__}"
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        key, why = None, str(error)
    if not isinstance(key, ed25519.Ed25519PublicKey if public else ed25519.Ed25519PrivateKey):
        raise ReceiptKeyError(
            f"not an Ed25519 key: {why}",
            where=str(path),
            remedy="make one with: openssl genpkey -algorithm ed25519 -out key.pem; its public "
            "half with: openssl pkey -in key.pem -pubout",
        )
    return key


def _unreadable(path: Path, why: str) -> ReceiptUnreadableError:
    return ReceiptUnreadableError(
        f"not a receipt: {why}",
        where=str(path),
        remedy="remove it, if neither `gpu test` nor `gpu receipts` wrote it",
    )


def _edited(path: Path, why: str) -> ReceiptEditedError:
    return ReceiptEditedError(
        f"the receipt was edited: {why}",
        where=str(path),
        remedy="delete it, and run the suite again",
    )
