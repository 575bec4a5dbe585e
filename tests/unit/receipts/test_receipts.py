"""Receipts: made of a green run only; edited, expired, foreign or partial ones are refused."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.keys import key_pair, trust
from tests.support.receipts import (
    FILE,
    NOW,
    SUITE,
    TESTS,
    body,
    edit,
    green_run,
    list_cases,
    row,
    small_project,
)
from vllm_forge.errors import ForgeError
from vllm_forge.pages.status import status
from vllm_forge.patches import read_tree_lock
from vllm_forge.project import Project
from vllm_forge.receipts import FOLDER
from vllm_forge.receipts.errors import (
    ReceiptEditedError,
    ReceiptExpiredError,
    ReceiptIncompleteError,
    ReceiptKeyError,
    ReceiptSubjectError,
    ReceiptSuiteError,
    ReceiptUnreadableError,
    ResultFileError,
    SuiteDescriptionError,
)
from vllm_forge.receipts.receipt import (
    DIGEST,
    VALID,
    Statement,
    make_statement,
    read_receipt,
    write_receipt,
)
from vllm_forge.receipts.suite import CASES as CASES_FILE
from vllm_forge.receipts.suite import LIST_CASES
from vllm_forge.receipts.verification import (
    describe,
    make_receipt,
    read_receipts,
    verify_all,
)
from vllm_forge.signing import Keyring, load_private, read_public
from vllm_forge.signing.errors import (
    KeyExpiredError,
    KeyFileError,
    KeyRoleError,
    SignatureInvalidError,
    UnknownSignerError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Project:
    """A repository with the real matrix and series, and a suite of four tests."""
    return small_project(root, tmp_path / "project")


@pytest.fixture
def result(project: Project) -> dict[str, Any]:
    """What a green run of that suite wrote."""
    return green_run(project)


@pytest.fixture
def committed(project: Project, result: dict[str, Any]) -> Path:
    """Its receipt, unsigned, in its place."""
    return place(project, make_statement(result))


def place(project: Project, statement: Statement, key: Path | None = None) -> Path:
    return write_receipt(project.root / FOLDER, statement, load_private(key) if key else None)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """An Ed25519 pair, private and public."""
    return key_pair(tmp_path)


def faster(payload: dict[str, Any]) -> None:
    payload["predicate"]["vllmForge"]["tests"][f"{FILE}::test_one"]["seconds"] = 0.1


def test_a_whole_green_receipt_holds(project: Project, committed: Path) -> None:
    (found,) = verify_all(project, NOW)
    assert found.path == committed
    assert found.statement.detail.expires - NOW == VALID
    assert "unsigned" in describe([found])


def test_the_payload_is_an_in_toto_statement(committed: Path) -> None:
    data = json.loads(committed.read_text())
    payload = json.loads(base64.b64decode(data["payload"]))
    assert data["payloadType"] == "application/vnd.in-toto+json"
    assert payload["_type"] == "https://in-toto.io/Statement/v1"
    assert payload["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    assert set(payload["subject"][0]["digest"]) == {"sha256"}
    assert set(payload["subject"][1]["digest"]) == {"gitTree"}
    assert payload["predicate"]["result"] == "PASSED"
    assert f"{FILE}::test_two[1]" in payload["predicate"]["passedTests"]


@pytest.mark.parametrize("outcome", ["failed", "not run"])
def test_a_red_run_makes_no_receipt(result: dict[str, Any], outcome: str) -> None:
    result["tests"][f"{FILE}::test_two[2]"]["outcome"] = outcome
    with pytest.raises(ReceiptIncompleteError, match="1 of 5 tests"):
        make_statement(result)


def test_a_run_that_ended_badly_makes_no_receipt(result: dict[str, Any]) -> None:
    with pytest.raises(ReceiptIncompleteError):
        make_statement(result | {"exit": 1})
    with pytest.raises(ReceiptIncompleteError):
        make_statement(result | {"tests": {}})


def test_a_slip_of_the_editor_is_seen(project: Project, committed: Path) -> None:
    edit(committed, faster, consistent=False)
    with pytest.raises(ReceiptEditedError, match="does not match its digest"):
        verify_all(project, NOW)


def test_a_forger_is_seen_by_the_signature_only(
    project: Project, result: dict[str, Any], keys: tuple[Path, Path]
) -> None:
    """What docs/develop/gpu-suite.md says of unsigned receipts, as a fact."""
    private, public = keys
    edit(place(project, make_statement(result)), faster, consistent=True)
    assert verify_all(project, NOW)[0].signed_by == ()

    trust(project.root, public)
    path = place(project, make_statement(result), private)
    assert len(verify_all(project, NOW, signed=True)[0].signed_by) == 1
    edit(path, faster, consistent=True)
    with pytest.raises(SignatureInvalidError, match="signature"):
        verify_all(project, NOW)


def test_an_unknown_signer_is_refused(
    project: Project, result: dict[str, Any], keys: tuple[Path, Path]
) -> None:
    place(project, make_statement(result), keys[0])
    with pytest.raises(UnknownSignerError, match="not among the trusted"):
        verify_all(project, NOW)


def test_unsigned_is_refused_where_signatures_are_asked_for(
    project: Project, committed: Path
) -> None:
    assert committed.is_file()
    with pytest.raises(ReceiptKeyError, match="unsigned"):
        verify_all(project, NOW, signed=True)


@pytest.mark.parametrize("kind", ["ed25519", "p256"])
def test_key_of_either_kind_signs(
    project: Project, result: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    private, public = key_pair(tmp_path, kind)
    trust(project.root, public, "hardware")
    place(project, make_statement(result), private)
    assert "signed by hardware" in describe(verify_all(project, NOW, signed=True))


def test_key_without_the_role_signs_no_receipt(
    project: Project, result: dict[str, Any], keys: tuple[Path, Path]
) -> None:
    """And an unsigned one stays valid where no key may sign receipts."""
    trust(project.root, keys[1], roles='["release"]')
    path = place(project, make_statement(result))
    assert len(verify_all(project, NOW)) == 1
    place(project, make_statement(result), keys[0])
    with pytest.raises(KeyRoleError, match="may sign release, not receipts") as caught:
        verify_all(project, NOW)
    assert caught.value.where == str(path)


def test_key_may_be_younger_than_the_run(
    project: Project, result: dict[str, Any], keys: tuple[Path, Path]
) -> None:
    """A receipt may be signed after it was committed; not with a key that had expired by then."""
    place(project, make_statement(result), keys[0])
    tomorrow = (NOW + timedelta(days=1)).date()
    trust(project.root, keys[1], valid_from=str(tomorrow))
    assert len(read_receipts(project).valid) == 1
    with pytest.raises(KeyExpiredError):
        verify_all(project, NOW)
    (project.root / "records/keys/keyring.toml").unlink()
    trust(project.root, keys[1], valid_until=str((NOW - timedelta(days=1)).date()))
    assert read_receipts(project).valid == ()


@pytest.mark.parametrize("days", [-1, 91])
def test_expired_or_of_the_future(project: Project, committed: Path, days: int) -> None:
    assert committed.is_file()
    with pytest.raises(ReceiptExpiredError):
        verify_all(project, NOW + timedelta(days=days))


def test_in_the_place_of_another_digest(project: Project, committed: Path) -> None:
    committed.parent.rename(committed.parent.with_name("f" * 64))
    with pytest.raises(ReceiptSubjectError, match="do not match its path"):
        verify_all(project, NOW)


def test_other_tree(project: Project, result: dict[str, Any]) -> None:
    result["plan"]["tree"] = "a" * 40
    place(project, make_statement(result))
    with pytest.raises(ReceiptSubjectError, match="the series now gives"):
        verify_all(project, NOW)


@pytest.mark.parametrize(
    ("field", "value"), [("compute_capability", "10.0"), ("name", "NVIDIA H100 80GB HBM3")]
)
def test_other_gpu(project: Project, result: dict[str, Any], field: str, value: str) -> None:
    result["gpus"][0][field] = value
    place(project, make_statement(result))
    with pytest.raises(ReceiptSubjectError, match="is not h200"):
        verify_all(project, NOW)


def test_tests_were_changed_since(project: Project, committed: Path) -> None:
    assert committed.is_file()
    (project.root / FILE).write_text(TESTS.replace("def test_two(k): ...", "def test_two(k): pass"))
    list_cases(project.root)
    with pytest.raises(ReceiptSuiteError, match="made by suite"):
        verify_all(project, NOW)


def test_removed_tier(project: Project, committed: Path) -> None:
    assert committed.is_file()
    (project.root / "tests/gpu/suite.toml").write_text(SUITE.replace("tier.server", "tier.other"))
    with pytest.raises(ReceiptSuiteError, match="unknown tier server"):
        verify_all(project, NOW)


@pytest.mark.parametrize("name", ["test_one", "TestGroup::test_three"])
def test_a_missing_test(project: Project, result: dict[str, Any], name: str) -> None:
    del result["tests"][f"{FILE}::{name}"]
    place(project, make_statement(result))
    with pytest.raises(ReceiptIncompleteError, match=name.rpartition("::")[2]):
        verify_all(project, NOW)


def test_passed_tests_must_be_the_verdicts(project: Project, committed: Path) -> None:
    edit(committed, lambda data: data["predicate"]["passedTests"].pop(), consistent=True)
    assert project.root.is_dir()
    with pytest.raises(ReceiptIncompleteError):
        verify_all(project, NOW)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"payload": "!", "payloadType": "x"}', b"\xff",
     b'{"payload": "e30=", "payloadType": "text/plain", "payloadSha256": "", "signatures": []}'],
)  # fmt: skip
def test_no_receipt(project: Project, committed: Path, content: bytes) -> None:
    committed.write_bytes(content)
    with pytest.raises(ReceiptUnreadableError) as caught:
        verify_all(project, NOW)
    assert str(committed) in str(caught.value)


def test_fields_that_nobody_knows(project: Project, committed: Path) -> None:
    edit(committed, lambda data: data["predicate"].update(extra=1), consistent=True)
    with pytest.raises(ReceiptUnreadableError, match="extra"):
        verify_all(project, NOW)


def test_receipt_of_an_environment_is_refused(project: Project, committed: Path) -> None:
    edit(committed, lambda data: body(data).update(kind="environment"), consistent=True)
    with pytest.raises(ReceiptUnreadableError, match="kind"):
        verify_all(project, NOW)


def test_a_form_that_is_not_canonical(project: Project, committed: Path) -> None:
    data = json.loads(committed.read_text())
    raw = json.dumps(json.loads(base64.b64decode(data["payload"])), indent=1).encode()
    data |= {"payload": base64.b64encode(raw).decode(), DIGEST: hashlib.sha256(raw).hexdigest()}
    committed.write_text(json.dumps(data))
    with pytest.raises(ReceiptEditedError, match="canonical"):
        verify_all(project, NOW)


def lose(name: str) -> Callable[[dict[str, Any]], None]:
    def change(payload: dict[str, Any]) -> None:
        del body(payload)["tests"][f"{FILE}::{name}"]
        payload["predicate"]["passedTests"].remove(f"{FILE}::{name}")

    return change


def pass_by(name: str) -> Callable[[dict[str, Any]], None]:
    def change(payload: dict[str, Any]) -> None:
        body(payload)["tests"][f"{FILE}::{name}"]["outcome"] = "other GPU"
        payload["predicate"]["passedTests"].remove(f"{FILE}::{name}")

    return change


def add(outcome: str) -> Callable[[dict[str, Any]], None]:
    def change(payload: dict[str, Any]) -> None:
        body(payload)["tests"][f"{FILE}::test_two[3]"] = row(outcome=outcome)
        if outcome == "passed":
            payload["predicate"]["passedTests"].append(f"{FILE}::test_two[3]")

    return change


def measure(measured: float, bound: float) -> Callable[[dict[str, Any]], None]:
    def change(payload: dict[str, Any]) -> None:
        margins = body(payload)["tests"][f"{FILE}::test_one"]["margins"]
        margins["drafts"] = {"measured": measured, "bound": bound}

    return change


FORGED: dict[str, tuple[Callable[[dict[str, Any]], Any], type[ForgeError], str]] = {
    "one case of two": (lose("test_two[2]"), ReceiptIncompleteError, r"test_two\[2\]"),
    "a case for this GPU": (
        pass_by("test_two[2]"), ReceiptIncompleteError, r"lacks 1: .*test_two\[2\]",
    ),
    "an unknown case that passed": (add("passed"), ReceiptIncompleteError, r"test_two\[3\]"),
    "an unknown case of another GPU": (add("other GPU"), ReceiptIncompleteError, r"test_two\[3\]"),
    "passed twice": (
        lambda data: data["predicate"]["passedTests"].insert(
            0, data["predicate"]["passedTests"][0]
        ),
        ReceiptIncompleteError,
        "each once",
    ),
    "no boot log": (
        lambda data: body(data).update(configurations={}),
        ReceiptIncompleteError,
        "lacks the boot log of 1: plain",
    ),
    "a boot log of another form": (
        lambda data: body(data).update(configurations={"plain": {"moe": 5}}),
        ReceiptUnreadableError,
        "moe",
    ),
    "above its bound": (measure(17.0, 16.0), ReceiptIncompleteError, "is 17, its bound 16"),
    "not a number": (measure(float("nan"), 16), ReceiptUnreadableError, "finite"),
    "bound of nothing": (measure(1, float("inf")), ReceiptUnreadableError, "finite"),
    "for ever": (
        lambda data: body(data).update(expires="2999-01-01T00:00:00Z"),
        ReceiptExpiredError,
        "at most",
    ),
    "no time zone": (
        lambda data: body(data).update(started="2026-01-01T00:00:00"),
        ReceiptUnreadableError,
        "timezone",
    ),
    "a table's cell": (
        lambda data: body(data)["gpus"][0].update(driver="1 | x"),
        ReceiptUnreadableError,
        "driver",
    ),
    "a digest that is a path": (
        lambda data: data["subject"][0]["digest"].update(sha256="/etc"),
        ReceiptUnreadableError,
        "sha256",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_what_the_repository_contradicts_is_refused_without_a_signature(
    project: Project, committed: Path, name: str
) -> None:
    change, kind, said = FORGED[name]
    edit(committed, change, consistent=True)
    with pytest.raises(kind, match=said) as caught:
        verify_all(project, NOW)
    assert str(committed) in str(caught.value)


def test_a_line_that_does_not_support_the_sku(project: Project, result: dict[str, Any]) -> None:
    result["plan"] |= {
        "line": "0.22",
        "tree": read_tree_lock(project.root / project.matrix.line["0.22"].series, "0.22").result,
    }
    place(project, make_statement(result))
    with pytest.raises(ReceiptSubjectError, match=r"0\.22 does not support h200"):
        verify_all(project, NOW)


def test_cases_of_another_suite_prove_nothing(project: Project, committed: Path) -> None:
    assert committed.is_file()
    list_cases(project.root, "0" * 64)
    with pytest.raises(SuiteDescriptionError, match="changed since its cases were listed"):
        verify_all(project, NOW)
    (project.root / CASES_FILE).unlink()
    with pytest.raises(SuiteDescriptionError, match="missing list of the cases"):
        verify_all(project, NOW)


def test_the_list_of_cases_is_what_pytest_collects(root: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "tests.support.list_gpu_cases", str(tmp_path / "cases.json")],
        cwd=root,
        check=True,
        capture_output=True,
    )
    current = (root / CASES_FILE).read_text()
    assert current == (tmp_path / "cases.json").read_text(), LIST_CASES


@pytest.mark.parametrize(
    "place_of_it", ["{name}", "{digest}/more/{name}", "{digest}/copy.JSON", "{digest}/notes.md"]
)
def test_a_receipt_is_not_overlooked(project: Project, committed: Path, place_of_it: str) -> None:
    target = (
        project.root
        / FOLDER
        / place_of_it.format(name=committed.name, digest=committed.parent.name)
    )
    target.parent.mkdir(exist_ok=True)
    committed.rename(target)
    with pytest.raises(ReceiptUnreadableError, match="not records/receipts/<digest>"):
        verify_all(project, NOW)


@pytest.mark.parametrize("what", ["receipt", "folder", "all"])
def test_a_link_is_refused(project: Project, committed: Path, tmp_path: Path, what: str) -> None:
    path = {
        "receipt": committed,
        "folder": committed.parent,
        "all": project.root / FOLDER,
    }[what]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ReceiptUnreadableError, match=r"it is a link|not a plain file"):
        verify_all(project, NOW)


def test_invalid_folders(project: Project) -> None:
    (project.root / FOLDER).mkdir()
    assert verify_all(project, NOW) == ()
    (project.root / FOLDER).rmdir()
    (project.root / FOLDER).write_text("")
    with pytest.raises(ReceiptUnreadableError, match="Not a directory"):
        verify_all(project, NOW)


def test_file_of_a_killed_writer_is_not_a_receipt(project: Project, committed: Path) -> None:
    left = committed.parent / f".tmp-{committed.name}-abcdefgh"
    left.mkdir()
    (left / committed.name).write_text("{")
    assert len(verify_all(project, NOW)) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"payload": "e30=", "payload": "e30="}', "duplicate key"),
    ],
)
def test_json_that_readers_read_differently(
    project: Project, committed: Path, content: bytes, said: str
) -> None:
    committed.write_bytes(content)
    with pytest.raises(ReceiptUnreadableError, match=said):
        verify_all(project, NOW)


class TestMakeReceipt:
    """From the files that a GPU host sends back."""

    def write(self, folder: Path, result: dict[str, Any]) -> Path:
        folder.mkdir(exist_ok=True)
        path = folder / "server.json"
        path.write_text(json.dumps(result))
        return path

    def test_it_holds(self, project: Project, result: dict[str, Any], tmp_path: Path) -> None:
        path = make_receipt(project, self.write(tmp_path / "out", result), None)
        (found,) = verify_all(project, datetime.now(UTC))
        assert found.path == path

    def test_what_would_be_refused_is_not_written(
        self, project: Project, result: dict[str, Any], tmp_path: Path
    ) -> None:
        result["suite_sha256"] = "0" * 64
        path = self.write(tmp_path / "out", result)
        with pytest.raises(ReceiptSuiteError) as caught:
            make_receipt(project, path, None)
        assert caught.value.where == str(path)
        assert not (project.root / FOLDER).exists()

    @pytest.mark.parametrize("content", ["", "{}", '{"plan": 3}'])
    def test_no_result(self, project: Project, tmp_path: Path, content: str) -> None:
        path = tmp_path / "server.json"
        path.write_text(content)
        with pytest.raises(ResultFileError, match="not the result"):
            make_receipt(project, path, None)

    @pytest.mark.parametrize(
        "change",
        [
            lambda result: result["plan"].pop("tree"),
            lambda result: result["plan"]["subject"].pop("name"),
            lambda result: result.update(gpus=[{"name": "x"}]),
            lambda result: result.update(finished="yesterday"),
            lambda result: result.update(tests={"x": {"outcome": "passed", "more": 1}}),
            lambda result: result.update(tests=[]),
            lambda result: result.pop("exit"),
            lambda result: result["plan"]["subject"].update(sha256="../../elsewhere"),
            lambda result: result.update(tier="../../elsewhere"),
        ],
    )
    def test_parts_of_a_result(
        self,
        project: Project,
        result: dict[str, Any],
        tmp_path: Path,
        change: Callable[[dict[str, Any]], Any],
    ) -> None:
        change(result)
        with pytest.raises(ResultFileError, match="not the result of a tier"):
            make_receipt(project, self.write(tmp_path / "out", result), None)
        assert not (project.root / FOLDER).exists()

    def test_a_line_that_is_not_ours(
        self, project: Project, result: dict[str, Any], tmp_path: Path
    ) -> None:
        result["plan"]["line"] = "9.9"
        with pytest.raises(ReceiptSubjectError, match=r"line 9\.9 is not defined"):
            make_receipt(project, self.write(tmp_path / "out", result), None)

    def test_a_case_that_did_not_run(
        self, project: Project, result: dict[str, Any], tmp_path: Path
    ) -> None:
        """As where a run chose tests with ``--only``: all that ran is green."""
        del result["tests"][f"{FILE}::test_two[2]"]
        with pytest.raises(ReceiptIncompleteError, match=r"test_two\[2\]"):
            make_receipt(project, self.write(tmp_path / "out", result), None)

    def test_names_as_workers_have_them(
        self, project: Project, result: dict[str, Any], tmp_path: Path
    ) -> None:
        """With ``-n``, pytest-xdist appends a test's group to its name."""
        result["tests"] = {f"{name}@mtp": row for name, row in result["tests"].items()}
        make_receipt(project, self.write(tmp_path / "out", result), None)
        (found,) = verify_all(project, datetime.now(UTC))
        assert f"{FILE}::test_two[1]" in found.statement.predicate.passed

    def test_second_verdict_of_a_test_is_not_overlooked(
        self, project: Project, result: dict[str, Any], tmp_path: Path
    ) -> None:
        name = f"{FILE}::test_two[1]"
        red = {**result["tests"][name], "outcome": "failed"}
        result["tests"] = {f"{name}@other": red, **result["tests"]}
        with pytest.raises(ResultFileError, match="a test has two verdicts"):
            make_receipt(project, self.write(tmp_path / "out", result), None)

    def test_invalid_key_leaves_nothing(
        self, project: Project, result: dict[str, Any], tmp_path: Path, keys: tuple[Path, Path]
    ) -> None:
        path = self.write(tmp_path / "out", result)
        with pytest.raises(KeyFileError, match="not a private key"):
            make_receipt(project, path, keys[1])
        assert not (project.root / FOLDER).exists()
        trust(project.root, keys[1])
        make_receipt(project, path, keys[0])
        assert len(verify_all(project, signed=True)) == 1

    def test_receipt_of_an_unknown_key_is_for_handing_over(
        self, project: Project, result: dict[str, Any], tmp_path: Path, keys: tuple[Path, Path]
    ) -> None:
        path = make_receipt(project, self.write(tmp_path / "out", result), keys[0])
        assert path.is_relative_to(tmp_path / "out/receipts")
        assert not (project.root / FOLDER).exists()
        found = read_receipt(path, Keyring(keys=(read_public(keys[1]),)))
        assert len(found.signed_by) == 1


def test_status_shows_receipts_and_what_was_not_run(project: Project, committed: Path) -> None:
    text = status(project)
    grid = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:1] == "|"]
    at = grid[0].index("h200")
    cells = {", ".join(row[:2]): row[at] for row in grid if len(row) > at}
    assert "unsupported" in cells["0.22, server"]
    place = f"(../../records/receipts/{committed.parent.name}/{committed.name})"
    assert place in cells["0.26, server"]
    assert [cells[name] for name in ("0.26, soak", "0.33, server")] == ["not run"] * 2
    assert "| 300 s | 6% of its bound: test_one, drafts" in text


def test_a_receipt_reads_back(committed: Path, result: dict[str, Any]) -> None:
    assert read_receipt(committed, Keyring()).statement.content == make_statement(result).content
