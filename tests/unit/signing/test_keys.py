"""Keys: which are taken, and what the keyring says of them."""

from __future__ import annotations

import base64
import subprocess
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from tests.support.keys import REVOKED, key_pair, trust
from vllm_forge.signing import FOLDER, Keyring, load_private, read_keyring, read_public
from vllm_forge.signing.errors import (
    KeyExpiredError,
    KeyFileError,
    KeyRevokedError,
    KeyringError,
    KeyRoleError,
    SignatureInvalidError,
)

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
# A public key on a curve that OpenSSL has and the library does not.
SM2 = """\
-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoEcz1UBgi0DQgAE76DgD3ZabJEZSene5u9oGx+6CfEf
hlFenQZMloMBk5c1/+N6SmlbDTIQWkEXK+405wSWiYDc0EfOcGw5PG8N0g==
-----END PUBLIC KEY-----
"""


@pytest.mark.parametrize("kind", ["ed25519", "p256"])
def test_signature_verifies_and_is_the_same_each_time(tmp_path: Path, kind: str) -> None:
    private, public = key_pair(tmp_path, kind)
    key, trusted = load_private(private), read_public(public)
    assert key.public.id == trusted.id
    signature = key.sign(b"data")
    assert signature == key.sign(b"data")
    trusted.verify(signature, b"data", "here")
    with pytest.raises(SignatureInvalidError, match=r"invalid signature of key public\.pem"):
        trusted.verify(signature, b"date", "here")
    with pytest.raises(SignatureInvalidError):
        trusted.verify(b"", b"data", "here")


def test_hint_is_the_hash_of_the_public_key(tmp_path: Path) -> None:
    _, public = key_pair(tmp_path, "p256")
    der = ["openssl", "pkey", "-pubin", "-in", str(public), "-outform", "DER"]
    spki = subprocess.run(der, check=True, capture_output=True).stdout
    digest = ["openssl", "dgst", "-sha256", "-binary"]
    expected = subprocess.run(digest, input=spki, check=True, capture_output=True).stdout
    assert base64.b64decode(read_public(public).hint) == expected


def test_private_key_is_not_shown(tmp_path: Path) -> None:
    private, _ = key_pair(tmp_path)
    assert "PrivateKey object" not in repr(load_private(private))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o602], ids=oct)
def test_private_key_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    private, _ = key_pair(tmp_path)
    private.chmod(mode)
    with pytest.raises(KeyFileError, match=rf"other users may .*\(mode {mode:o}\)"):
        load_private(private)


@pytest.mark.parametrize("kind", ["rsa", "p384"])
def test_key_of_another_kind_is_refused(tmp_path: Path, kind: str) -> None:
    private, public = key_pair(tmp_path, kind)
    for read, path in ((load_private, private), (read_public, public)):
        with pytest.raises(
            KeyFileError, match=r"not an Ed25519 or P-256 key: it is a (RSA|secp384)"
        ):
            read(path)


@pytest.mark.parametrize("cipher", [["-aes256"], ["-traditional", "-aes256"]])
def test_encrypted_key_is_refused(tmp_path: Path, cipher: list[str]) -> None:
    private, _ = key_pair(tmp_path, "p256")
    encrypted = tmp_path / "encrypted.pem"
    argv = ["openssl", "pkey", "-in", private, *cipher, "-passout", "pass:x", "-out", encrypted]
    subprocess.run([str(part) for part in argv], check=True, capture_output=True)
    with pytest.raises(KeyFileError, match="encrypted") as caught:
        load_private(encrypted)
    assert "decrypt" in caught.value.remedy


def test_file_that_is_not_a_key_is_refused(tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    (tmp_path / "empty").touch(mode=0o600)
    for path in (public, tmp_path / "empty", tmp_path / "missing", tmp_path):
        if path == public:
            public.chmod(0o600)
        with pytest.raises(KeyFileError, match="not a private key"):
            load_private(path)
    for content in (private.read_text(), SM2, ""):
        (tmp_path / "empty").write_text(content)
        with pytest.raises(KeyFileError, match="not a public key"):
            read_public(tmp_path / "empty")


def test_private_key_behind_a_link_is_read(tmp_path: Path) -> None:
    """As secrets are mounted."""
    private, _ = key_pair(tmp_path)
    (tmp_path / "link").symlink_to(private)
    assert load_private(tmp_path / "link").public.id == load_private(private).public.id


def test_missing_keyring_trusts_nothing(tmp_path: Path) -> None:
    assert read_keyring(tmp_path) == Keyring()


def test_keyring_knows_names_owners_and_roles(tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    trust(tmp_path, public, "gpu-lab", roles='["receipts"]')
    ring = read_keyring(tmp_path)
    key = ring.find(hint=load_private(private).public.hint)
    assert key is not None
    assert (key.name, key.row and key.row.owner) == ("gpu-lab", "A Tester (tester@localhost)")
    assert ring.find(keyid=key.id) is key
    assert ring.find(hint="other") is None
    assert ring.has("receipts")
    assert not ring.has("release")


@pytest.mark.parametrize(
    ("row", "error", "said"),
    [
        ({"roles": '["vex"]'}, KeyRoleError, "may sign vex, not release"),
        ({"valid_until": "2026-11-29"}, KeyExpiredError, "to 2026-11-29, and today is 2026-11-30"),
        ({"valid_from": "2026-12-01"}, KeyExpiredError, "valid from 2026-12-01"),
        (REVOKED, KeyRevokedError, "revoked on 2026-02-03: stolen laptop"),
    ],
)
def test_key_counts_for_its_roles_and_days(
    tmp_path: Path, row: dict[str, str], error: type[Exception], said: str
) -> None:
    trust(tmp_path, key_pair(tmp_path)[1], **row)
    (key,) = read_keyring(tmp_path).keys
    with pytest.raises(error, match=said):
        key.require("release", NOW, "here")


def test_first_and_last_day_count(tmp_path: Path) -> None:
    trust(tmp_path, key_pair(tmp_path)[1], valid_from="2026-11-30", valid_until="2026-11-30")
    (key,) = read_keyring(tmp_path).keys
    key.require("vex", NOW, "here")


def test_key_given_for_one_call_is_trusted_for_everything(tmp_path: Path) -> None:
    public = key_pair(tmp_path)[1]
    trust(tmp_path, public, roles='["vex"]')
    (key,) = read_keyring(tmp_path).including(public).keys
    key.require("release", NOW, "here")


def test_key_given_for_one_call_stays_revoked(tmp_path: Path) -> None:
    public = key_pair(tmp_path)[1]
    trust(tmp_path, public, **REVOKED)
    (key,) = read_keyring(tmp_path).including(public).keys
    with pytest.raises(KeyRevokedError):
        key.require("release", NOW, "here")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"roles": '["admin"]'}, r"key\.release\.roles"),
        ({"roles": "[]"}, r"key\.release\.roles"),
        ({"valid_until": "2001-01-01"}, "valid_until is before valid_from"),
        ({"valid_from": '"yesterday"'}, r"key\.release\.valid_from"),
        ({"revoked": "true"}, r"key\.release\.revoked"),
        ({"owner": '"a\\u001b[31m"'}, r"key\.release\.owner"),
        ({"note": '"x"'}, r"key\.release\.note"),
    ],
)
def test_invalid_row_is_refused(tmp_path: Path, row: dict[str, str], said: str) -> None:
    trust(tmp_path, key_pair(tmp_path)[1], **row)
    with pytest.raises(KeyringError, match=said):
        read_keyring(tmp_path)


def test_key_without_a_row_is_refused(tmp_path: Path) -> None:
    public = trust(tmp_path, key_pair(tmp_path)[1])
    public.rename(public.with_name("other.pem"))
    with pytest.raises(KeyringError, match="unknown file") as caught:
        read_keyring(tmp_path)
    assert caught.value.where == str(tmp_path / FOLDER / "other.pem")


def test_row_without_a_key_is_refused(tmp_path: Path) -> None:
    trust(tmp_path, key_pair(tmp_path)[1]).unlink()
    with pytest.raises(KeyringError, match="the file is missing"):
        read_keyring(tmp_path)


def test_key_under_two_names_is_refused(tmp_path: Path) -> None:
    """Else the revocation of one would leave the other."""
    public = key_pair(tmp_path)[1]
    trust(tmp_path, public)
    trust(tmp_path, public, "again")
    with pytest.raises(KeyringError, match="two of its keys are the same"):
        read_keyring(tmp_path)


@pytest.mark.parametrize("what", ["folder", "records"])
def test_keyring_behind_a_link_is_refused(tmp_path: Path, what: str) -> None:
    trust(tmp_path / "elsewhere", key_pair(tmp_path)[1])
    if what == "folder":
        (tmp_path / "records").mkdir()
        (tmp_path / FOLDER).symlink_to(tmp_path / "elsewhere" / FOLDER)
    else:
        (tmp_path / "records").symlink_to(tmp_path / "elsewhere/records")
    with pytest.raises(KeyringError, match="it is a link"):
        read_keyring(tmp_path)


def test_file_in_place_of_the_keyring_is_refused(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / FOLDER).touch()
    with pytest.raises(KeyringError, match="cannot read it"):
        read_keyring(tmp_path)
