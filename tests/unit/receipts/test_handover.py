"""Receipts that others sign: a committed one by the owner of a key, a new one handed over."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.keys import REVOKED, key_pair, trust
from tests.support.receipts import FILE, IMAGE, NOW, body, edit, green_run, small_project
from vllm_forge.cli import main
from vllm_forge.errors import ForgeError
from vllm_forge.pages.status import status
from vllm_forge.project import Project
from vllm_forge.receipts import FOLDER, handover
from vllm_forge.receipts.errors import (
    ReceiptEditedError,
    ReceiptExpiredError,
    ReceiptKeyError,
    ReceiptSubjectError,
)
from vllm_forge.receipts.handover import accept_receipt, sign_receipt
from vllm_forge.receipts.receipt import VALID, make_statement, write_receipt
from vllm_forge.receipts.verification import describe, verify_all
from vllm_forge.release.statements import receipt_bundle
from vllm_forge.signing import Keyring, PrivateKey, load_private, read, read_keyring, verify
from vllm_forge.signing.errors import (
    KeyExpiredError,
    KeyRevokedError,
    KeyRoleError,
    SignatureInvalidError,
    UnknownSignerError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PLACE = f"{IMAGE}/h200--0.26--server.json"


# Rows of the keyring with which a signature does not count; None: no row.
of_untrusted_keys = pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"roles": '["release"]'}, KeyRoleError),
        ({"valid_until": "2020-01-02"}, KeyExpiredError),
        (REVOKED, KeyRevokedError),
        (None, UnknownSignerError),
    ],
)


@dataclass(frozen=True)
class Lab:
    """Whoever has the hardware: their key, and what they hand over."""

    private: PrivateKey
    public: Path
    file: Path


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Project:
    return small_project(root, tmp_path / "project")


@pytest.fixture
def lab(project: Project, tmp_path: Path) -> Lab:
    private, public = key_pair(tmp_path / "lab", "ed25519")
    key = load_private(private)
    path = write_receipt(tmp_path / "lab", make_statement(green_run(project)), key)
    return Lab(private=key, public=public, file=path.rename(tmp_path / "evidence.json"))


def commit(project: Project, **changes: Any) -> Path:
    """An unsigned receipt in its place."""
    return write_receipt(project.root / FOLDER, make_statement(green_run(project) | changes))


def accept(project: Project, lab: Lab) -> Any:
    return accept_receipt(project, lab.file, read_keyring(project.root))


class TestSign:
    def test_committed_receipt_is_signed_in_its_place(
        self, project: Project, lab: Lab, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = commit(project)
        trust(project.root, lab.public, "lab")
        assert sign_receipt(project, path, lab.private) == path
        (receipt,) = verify_all(project, signed=True)
        assert [key.name for key in receipt.signed_by] == ["lab"]
        shown = capsys.readouterr().err
        assert f"image sha256:{IMAGE}" in shown
        assert "lab signs the result of tier server, h200, line 0.26" in shown
        assert "4 tests passed" in shown

    def test_statement_stays_as_it_was(self, project: Project, lab: Lab) -> None:
        path = commit(project)
        before = json.loads(path.read_text())
        trust(project.root, lab.public)
        sign_receipt(project, path, lab.private)
        after = json.loads(path.read_text())
        assert len(after["signatures"]) == 1
        assert after | {"signatures": []} == before

    def test_signed_receipt_is_a_bundle_of_the_same_signature(
        self, project: Project, lab: Lab
    ) -> None:
        trust(project.root, lab.public, roles='["receipts"]')
        sign_receipt(project, commit(project), lab.private)
        (receipt,) = verify_all(project)
        bundle = read(receipt_bundle(receipt))
        verified = verify(bundle, read_keyring(project.root), role="receipts", now=NOW)
        assert verified.content == receipt.statement.content
        assert (
            verified.statement.predicate_type == "https://in-toto.io/attestation/test-result/v0.1"
        )
        assert bundle.signature == receipt.signatures[0][1]

    def test_unsigned_receipt_is_not_a_bundle(self, project: Project) -> None:
        commit(project)
        (receipt,) = verify_all(project)
        with pytest.raises(ReceiptKeyError, match="unsigned"):
            receipt_bundle(receipt)

    @of_untrusted_keys
    def test_key_that_would_be_refused_does_not_sign(
        self, project: Project, lab: Lab, row: dict[str, str] | None, error: type[ForgeError]
    ) -> None:
        path = commit(project)
        before = path.read_bytes()
        if row is not None:
            trust(project.root, lab.public, **row)
        with pytest.raises(error):
            sign_receipt(project, path, lab.private)
        assert path.read_bytes() == before

    def test_invalid_receipt_is_not_signed(self, project: Project, lab: Lab) -> None:
        path = commit(project, suite_sha256="0" * 64)
        trust(project.root, lab.public)
        with pytest.raises(ForgeError, match="made by suite 000000000000"):
            sign_receipt(project, path, lab.private)

    def test_expired_receipt_is_not_signed(
        self, project: Project, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = commit(project)
        trust(project.root, lab.public)
        monkeypatch.setattr(handover, "datetime", _Clock)
        with pytest.raises(ReceiptExpiredError):
            sign_receipt(project, path, lab.private)

    def test_signed_receipt_is_not_signed_again(self, project: Project, lab: Lab) -> None:
        trust(project.root, lab.public, "lab")
        path = sign_receipt(project, commit(project), lab.private)
        with pytest.raises(ReceiptKeyError, match="signed already, by lab"):
            sign_receipt(project, path, lab.private)

    def test_receipt_elsewhere_is_not_signed(
        self, project: Project, lab: Lab, tmp_path: Path
    ) -> None:
        path = commit(project).rename(tmp_path / "elsewhere.json")
        trust(project.root, lab.public)
        for elsewhere in (path, type(path)("/receipt.json")):
            with pytest.raises(ReceiptKeyError, match="not in records/receipts"):
                sign_receipt(project, elsewhere, lab.private)


class _Clock(datetime):
    """After the receipts have expired."""

    @classmethod
    def now(cls, tz: Any = None) -> _Clock:
        later = datetime.now(tz) + VALID
        return cls.fromtimestamp(later.timestamp(), UTC)


class TestAccept:
    def test_file_of_a_trusted_lab_becomes_a_record(
        self, project: Project, lab: Lab, capsys: pytest.CaptureFixture[str]
    ) -> None:
        trust(project.root, lab.public, "lab", roles='["receipts"]')
        receipt = accept(project, lab)
        assert receipt.path == project.root / FOLDER / PLACE
        assert verify_all(project, signed=True) == (receipt,)
        shown = capsys.readouterr().err
        assert "A Tester (tester@localhost) vouches for the result of tier server" in shown
        assert "not checked: that the run was honest; that this commit gives this image" in shown

    def test_pages_say_who_vouches(self, project: Project, lab: Lab) -> None:
        trust(project.root, lab.public, "lab")
        receipt = accept(project, lab)
        assert "signed by lab, A Tester (tester@localhost)" in describe([receipt])
        assert f"[image, signed by lab, A Tester (tester@localhost), {NOW.date()}]" in status(
            project
        )

    def test_accepting_again_changes_nothing(self, project: Project, lab: Lab) -> None:
        trust(project.root, lab.public)
        before = accept(project, lab).path.read_bytes()
        assert accept(project, lab).path.read_bytes() == before

    def test_unknown_lab_is_checked_and_not_accepted(self, project: Project, lab: Lab) -> None:
        """``--key`` trusts a key for one call, a record for all."""
        keys = Keyring().including(lab.public)
        with pytest.raises(ReceiptKeyError, match="every check passed, but") as caught:
            accept_receipt(project, lab.file, keys)
        assert 'roles = ["receipts"]' in caught.value.remedy
        edit(lab.file, lambda data: body(data).update(tier="soak"), consistent=True)
        with pytest.raises(SignatureInvalidError):
            accept_receipt(project, lab.file, keys)
        assert not (project.root / FOLDER).exists()

    @of_untrusted_keys
    def test_signer_who_does_not_count_is_refused(
        self, project: Project, lab: Lab, row: dict[str, str] | None, error: type[ForgeError]
    ) -> None:
        if row is not None:
            trust(project.root, lab.public, **row)
        with pytest.raises(error) as caught:
            accept(project, lab)
        assert caught.value.where == str(lab.file)
        assert not (project.root / FOLDER).exists()

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            (lambda data: data.update(signatures=[]), ReceiptKeyError),
            (lambda data: data.update(payload=data["payload"][:-8]), ReceiptEditedError),
        ],
        ids=["unsigned", "cut"],
    )
    def test_edited_file_is_refused(
        self,
        project: Project,
        lab: Lab,
        change: Callable[[dict[str, Any]], object],
        error: type[ForgeError],
    ) -> None:
        trust(project.root, lab.public)
        data = json.loads(lab.file.read_text())
        change(data)
        lab.file.write_text(json.dumps(data))
        with pytest.raises(error):
            accept(project, lab)
        assert not (project.root / FOLDER).exists()

    def test_result_that_is_not_this_suite_s_is_refused(self, project: Project, lab: Lab) -> None:
        """Also where a trusted lab signed it."""
        trust(project.root, lab.public)
        result = green_run(project)
        del result["tests"][f"{FILE}::test_two[2]"]
        write_receipt(lab.file.parent, make_statement(result), lab.private)
        shutil.move(lab.file.parent / PLACE, lab.file)
        with pytest.raises(ForgeError, match=r"test_two\[2\]") as caught:
            accept(project, lab)
        assert caught.value.where == str(lab.file)

    def test_image_that_was_not_built_here_is_refused(
        self, project: Project, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trust(project.root, lab.public)
        monkeypatch.setattr(handover, "built_digest", lambda _: "sha256:" + "0" * 64)
        with pytest.raises(ReceiptSubjectError, match="built here is sha256:0000"):
            accept(project, lab)
        monkeypatch.setattr(handover, "built_digest", lambda _: f"sha256:{IMAGE}")
        accept(project, lab)

    def test_receipt_in_its_place_is_not_replaced(self, project: Project, lab: Lab) -> None:
        trust(project.root, lab.public)
        earlier = green_run(project)
        earlier["started"] = (NOW - timedelta(minutes=9)).isoformat()
        path = write_receipt(project.root / FOLDER, make_statement(earlier), lab.private)
        before = path.read_bytes()
        with pytest.raises(ReceiptSubjectError, match="another receipt is already at"):
            accept(project, lab)
        assert path.read_bytes() == before


def test_documented_commands_make_a_key_sign_and_accept(
    root: Path, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Word for word of docs/develop/keys.md, but for its words in capitals and its dates."""
    page = (root / "docs/develop/keys.md").read_text()
    make = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)[0]
    row, revoked = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`(receipts [^`]*)`", page)]
    sign, accept = (
        next(s for s in spans if s.startswith(f"receipts {w} ")) for w in ("sign", "accept")
    )

    keys, lab = project.root / "records/keys", tmp_path / "lab"
    for folder in (keys, lab):
        folder.mkdir(parents=True)
    subprocess.run(["bash", "-euc", make], cwd=lab, check=True, capture_output=True)
    shutil.copy(lab / "NAME.pem", keys / "lab.pem")
    row = re.sub(r"= 20\d\d", "= 2020", row, count=1).replace("= 2027", "= 2199")
    (keys / "keyring.toml").write_text(row.replace("NAME", "lab"))
    handed_over = write_receipt(
        lab, make_statement(green_run(project)), load_private(lab / "key.pem")
    )
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(project.root))
    monkeypatch.chdir(lab)

    def forge(text: str, path: Path) -> int:
        return main([str(path) if word in {"RECEIPT", "FILE"} else word for word in text.split()])

    assert forge(sign, commit(project)) == 0
    (receipt,) = verify_all(project, signed=True)
    receipt.path.unlink()
    assert forge(accept, handed_over) == 0
    assert [key.name for key in verify_all(project, signed=True)[0].signed_by] == ["lab"]
    (keys / "keyring.toml").write_text(row.replace("NAME", "lab") + revoked)
    with pytest.raises(KeyRevokedError, match="stolen laptop"):
        verify_all(project, signed=True)
