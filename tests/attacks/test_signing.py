"""Signatures: who may write bundles, keys or the keyring is not believed.

A bundle counts if a trusted key signed exactly its statement, and may do so now.
"""

from __future__ import annotations

import base64
import copy
import json
import os
import re
import subprocess
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.keys import REVOKED, key_pair, trust
from vllm_forge.errors import ForgeError
from vllm_forge.release.statements import PROVENANCE, VSA
from vllm_forge.signing import (
    FOLDER,
    Verified,
    bundle,
    load_private,
    read,
    read_keyring,
    sign,
    verify,
)
from vllm_forge.signing.bundle import Statement, Subject
from vllm_forge.signing.errors import (
    BundleError,
    KeyExpiredError,
    KeyFileError,
    KeyRevokedError,
    KeyringError,
    KeyRoleError,
    SignatureInvalidError,
    UnknownSignerError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)


def statement(kind: str = PROVENANCE) -> bytes:
    subject = Subject(name="image", digest={"sha256": "5" * 64})
    return Statement(subject=(subject,), predicate_type=kind, predicate={"x": [1, "y"]}).content


@pytest.fixture
def signed(tmp_path: Path) -> bytes:
    """By a trusted key, ``tmp_path/ours/key.pem``."""
    private, public = key_pair(tmp_path / "ours", "p256")
    trust(tmp_path, public)
    return sign(statement(), load_private(private))


def check(root: Path, content: bytes, now: datetime = NOW) -> Verified:
    return verify(read(content), read_keyring(root), role="release", now=now)


def edited(content: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    data = json.loads(content)
    change(data)
    return json.dumps(data).encode()


def test_statement_that_was_edited_is_refused(tmp_path: Path, signed: bytes) -> None:
    payload = base64.b64encode(statement(VSA)).decode()
    content = edited(signed, lambda data: data["dsseEnvelope"].update(payload=payload))
    with pytest.raises(SignatureInvalidError):
        check(tmp_path, content)


def test_statement_that_a_stranger_signed_again_is_refused(tmp_path: Path, signed: bytes) -> None:
    stranger = load_private(key_pair(tmp_path / "theirs", "p256")[0])
    theirs = sign(statement(), stranger)
    with pytest.raises(UnknownSignerError):
        check(tmp_path, theirs)
    hint = json.loads(signed)["verificationMaterial"]["publicKey"]["hint"]
    material = {"publicKey": {"hint": hint}}
    with pytest.raises(SignatureInvalidError):
        check(tmp_path, edited(theirs, lambda data: data.update(verificationMaterial=material)))


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"valid_until": "2026-11-29"}, KeyExpiredError),
        ({"roles": '["builder", "receipts", "vex"]'}, KeyRoleError),
        (REVOKED, KeyRevokedError),
        ({"valid_until": "2026-11-29", **REVOKED}, KeyRevokedError),
    ],
)
def test_key_that_does_not_count_is_refused(
    tmp_path: Path, row: dict[str, str], error: type[ForgeError]
) -> None:
    private, public = key_pair(tmp_path / "ours")
    trust(tmp_path, public, **row)
    with pytest.raises(error):
        check(tmp_path, sign(statement(), load_private(private)))


@pytest.mark.parametrize("years", [-7, 200])
def test_clock_that_is_wrong_is_named(tmp_path: Path, signed: bytes, years: int) -> None:
    with pytest.raises(KeyExpiredError) as caught:
        check(tmp_path, signed, NOW + timedelta(days=365 * years))
    assert "clock" in caught.value.remedy


def test_payload_of_another_type_is_refused(tmp_path: Path, signed: bytes) -> None:
    """DSSE signs the type too: a signed JSON of another protocol is not a statement."""
    for kind in ("application/json", "application/vnd.in-toto+json; v=2", ""):
        document = json.loads(signed)
        document["dsseEnvelope"]["payloadType"] = kind
        with pytest.raises(BundleError, match="payloadType"):
            check(tmp_path, json.dumps(document).encode())
    key = load_private(tmp_path / "ours/key.pem")
    raw = base64.b64encode(key.sign(statement())).decode()  # without the type
    content = edited(signed, lambda data: data["dsseEnvelope"]["signatures"][0].update(sig=raw))
    with pytest.raises(SignatureInvalidError):
        check(tmp_path, content)


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.pop("_type"),
        lambda row: row.update(kind=row.pop("_type")),  # as the fields are called in Python
        lambda row: row.update(predicate_type=row.pop("predicateType")),
        lambda row: row.update(more=1),
        lambda row: row.update(subject=[]),
        lambda row: row.update(subject=[{"name": "image"}]),
        lambda row: row.update(predicate=7),
    ],
)
def test_payload_that_is_not_a_statement_is_refused(
    tmp_path: Path, signed: bytes, change: Callable[[dict[str, Any]], object]
) -> None:
    """Signed by a trusted key, and read in one way by us and in another by other programs."""
    del signed  # of which the key is used
    content = edited(statement(), change)
    with pytest.raises(BundleError, match=r"its (payload is not a|statement lacks or adds)"):
        check(tmp_path, sign(content, load_private(tmp_path / "ours/key.pem")))


def test_subject_may_have_the_other_fields_of_in_toto(tmp_path: Path, signed: bytes) -> None:
    del signed
    subject = {"digest": {"sha256": "5" * 64}, "uri": "https://registry.example/x"}
    content = edited(statement(), lambda row: row.update(subject=[subject]))
    verified = check(tmp_path, sign(content, load_private(tmp_path / "ours/key.pem")))
    assert verified.statement.has_subject(f"sha256:{'5' * 64}")
    assert verified.content == content


def test_second_signature_is_refused(tmp_path: Path, signed: bytes) -> None:
    """A bundle has one: readers that take the first, the last or any would differ."""
    stranger = load_private(key_pair(tmp_path / "theirs")[0])
    theirs = json.loads(sign(statement(), stranger))["dsseEnvelope"]["signatures"]
    ours = json.loads(signed)["dsseEnvelope"]["signatures"]
    for rows in (ours + ours, ours + theirs, theirs + ours):
        document = json.loads(signed)
        document["dsseEnvelope"]["signatures"] = rows
        with pytest.raises(BundleError, match="signatures"):
            check(tmp_path, json.dumps(document).encode())


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b"\xff\xfe{\x00}\x00",
        b'{"mediaType": "a", "mediaType": "b"}',
        b'{"mediaType": "\\ud800"}',
        b"null",
    ],
    ids=["deep", "UTF-16", "duplicate", "surrogate", "null"],
)
def test_file_that_is_not_a_bundle_is_refused(content: bytes) -> None:
    with pytest.raises(BundleError):
        read(content)


def test_oversized_bundle_is_refused(signed: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "LARGEST", len(signed))
    assert read(signed)
    with pytest.raises(BundleError, match="larger than"):
        read(signed + b" ")


def test_statement_that_readers_read_differently_is_refused(tmp_path: Path, signed: bytes) -> None:
    """Also where a trusted key signed it."""
    key = load_private(tmp_path / "ours/key.pem")
    twice = statement().replace(b'"subject":', b'"subject":[],"subject":', 1)
    assert signed
    with pytest.raises(BundleError, match="duplicate key"):
        check(tmp_path, sign(twice, key))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    rows = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    if isinstance(value, dict | list):
        for key, inner in items:
            rows += places(inner, (*path, key))
    return rows


@settings(
    max_examples=300, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_edits_never_change_what_is_verified(
    data: st.DataObject, tmp_path: Path, signed: bytes
) -> None:
    """Whatever is done to a bundle: it is refused, or says what was signed."""
    document = json.loads(signed)
    path = data.draw(st.sampled_from(places(document)))
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    value = holder[path[-1]]
    kind = data.draw(st.sampled_from(["delete", "replace", "bit", "repeat"]))
    if kind == "delete":
        del holder[path[-1]]
    elif kind == "bit" and isinstance(value, str) and value:
        at = data.draw(st.integers(0, len(value) - 1))
        other = data.draw(st.sampled_from("Aa0+/=\u00e9\n"))
        holder[path[-1]] = value[:at] + other + value[at + 1 :]
    elif kind == "repeat":
        holder[path[-1]] = [copy.deepcopy(value), copy.deepcopy(value)]
    else:
        holder[path[-1]] = data.draw(st.sampled_from([None, 0, "", [], {}, [{}], "x", True]))
    try:
        verified = check(tmp_path, json.dumps(document).encode())
    except ForgeError:
        return
    assert verified.content == statement()


@pytest.mark.parametrize(
    "material",
    [
        {"publicKey": {"hint": "\x1b[2J\x1b]0;owned\x07"}},
        {"publicKey": {"hint": "x", "\x1b[2J": 1}},
        {"\x1b[2J": 1},
    ],
)
def test_control_characters_of_a_bundle_are_not_printed(
    tmp_path: Path, signed: bytes, material: dict[str, Any]
) -> None:
    with pytest.raises(ForgeError) as caught:
        check(tmp_path, edited(signed, lambda data: data.update(verificationMaterial=material)))
    assert "\x1b" not in str(caught.value)


def test_private_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    private, _ = key_pair(tmp_path)
    for mode in (0o644, 0o660, 0o606):
        private.chmod(mode)
        with pytest.raises(KeyFileError, match="other users"):
            load_private(private)
    private.chmod(0o600)
    (tmp_path / "link").symlink_to(private)
    private.chmod(0o644)
    with pytest.raises(KeyFileError, match="other users"):  # the mode of a link says nothing
        load_private(tmp_path / "link")


@pytest.mark.parametrize("kind", ["fifo", "folder", "huge"])
def test_special_file_is_not_a_private_key(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "key.pem"
    if kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind == "folder":
        path.mkdir(0o700)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
        path.chmod(0o600)
    with pytest.raises(KeyFileError, match="not a private key"):
        load_private(path)


@pytest.mark.parametrize("name", ["../other", "a/b", "A", "", ".hidden"])
def test_keyring_names_no_file_elsewhere(tmp_path: Path, name: str) -> None:
    public = key_pair(tmp_path)[1]
    trust(tmp_path, public)
    table = tmp_path / FOLDER / "keyring.toml"
    table.write_text(table.read_text().replace("[key.release]", f'[key."{name}"]'))
    with pytest.raises(KeyringError):
        read_keyring(tmp_path)


def test_revocation_cannot_be_hidden_by_a_second_name(tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    trust(tmp_path, public, "old", **REVOKED)
    trust(tmp_path, public, "new")
    with pytest.raises(KeyringError, match="two of its keys are the same"):
        check(tmp_path, sign(statement(), load_private(private)))


def test_no_private_key_is_in_the_repository(root: Path) -> None:
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    head = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE" + rb" KEY-----\s+[A-Za-z0-9+/=]{16}")
    for name in filter(None, files):
        path = root / name
        if path.is_file() and not path.is_symlink():
            assert not head.search(path.read_bytes()), name
