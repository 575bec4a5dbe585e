"""Signed results: of this image and this record, by a key of the keyring."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from tests.support.bench import rows_of, write_result
from tests.support.keys import key_pair, trust
from vllm_forge.bench.errors import ResultSignatureError
from vllm_forge.bench.results import read_arm
from vllm_forge.bench.signed import PREDICATE_TYPE, require_signed
from vllm_forge.cli import main
from vllm_forge.signing import Keyring, read, read_keyring
from vllm_forge.signing.errors import KeyRoleError, SignatureInvalidError, UnknownSignerError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return write_result(tmp_path / "a.json", rows_of(1, items=5))


@pytest.fixture
def signed(result: Path, tmp_path: Path) -> Path:
    private, public = key_pair(tmp_path / "keys")
    trust(tmp_path, public, "lab", roles='["receipts"]')
    assert main(["bench", "sign", str(result), f"--key={private}"]) == 0
    return result.with_suffix(".sigstore.json")


def test_signature_is_of_image_and_record(signed: Path, result: Path, tmp_path: Path) -> None:
    arm = read_arm(result)
    assert require_signed(arm, read_keyring(tmp_path)) == "lab"
    statement = json.loads(read(signed.read_bytes()).statement)
    assert statement["predicateType"] == PREDICATE_TYPE
    image, record = statement["subject"]
    assert f"sha256:{image['digest']['sha256']}" == arm.result.server.image
    assert record["name"] == "a.json"


def test_unsigned_result_is_refused(
    result: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    command = ["bench", "gate", "--signed", str(result), str(result)]
    assert main(command) == ResultSignatureError.exit_code
    assert "the result is unsigned" in capsys.readouterr().err


@pytest.mark.usefixtures("signed")
def test_changed_result_is_refused(result: Path, tmp_path: Path) -> None:
    write_result(result, rows_of(2, items=5))
    with pytest.raises(ResultSignatureError, match="of another result"):
        require_signed(read_arm(result), read_keyring(tmp_path))


def test_keys_that_do_not_count_are_refused(signed: Path, result: Path, tmp_path: Path) -> None:
    arm, keys = read_arm(result), read_keyring(tmp_path)
    with pytest.raises(UnknownSignerError):
        require_signed(arm, Keyring())
    table = tmp_path / "records" / "keys" / "keyring.toml"
    table.write_text(table.read_text().replace('"receipts"', '"vex"'))
    with pytest.raises(KeyRoleError):
        require_signed(arm, read_keyring(tmp_path))
    bundle = json.loads(signed.read_text())
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = "A" * 86 + "=="
    signed.write_text(json.dumps(bundle))
    with pytest.raises(SignatureInvalidError):
        require_signed(arm, keys)


def test_record_that_is_exchanged_after_it_was_read_is_refused(
    signed: Path, result: Path, tmp_path: Path
) -> None:
    """The signed file is put back before its hash is taken."""
    genuine = {path: path.read_bytes() for path in (result, result.with_suffix(".jsonl.gz"))}
    write_result(result, rows_of(2, items=5))
    forged = read_arm(result)
    for path, content in genuine.items():
        path.write_bytes(content)
    with pytest.raises(ResultSignatureError, match="changed while it was read"):
        require_signed(forged, read_keyring(tmp_path))
    assert signed.exists()


def test_fifo_in_place_of_a_signature_is_refused(
    signed: Path, result: Path, tmp_path: Path
) -> None:
    signed.unlink()
    os.mkfifo(signed)
    with pytest.raises(ResultSignatureError, match="not a plain file"):
        require_signed(read_arm(result), read_keyring(tmp_path))
