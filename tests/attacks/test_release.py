"""Boundary: what is attached to an image. Whoever may write to a registry may change it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import shutil
import tarfile
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.fast_build import use
from tests.support.keys import REVOKED, key_pair, trust
from tests.support.project import make_project
from tests.support.registry_server import RegistryServer
from tests.support.release import CELL, ReleaseRunner, Releases, add_receipt, commit, releasable
from vllm_forge.host import canonical
from vllm_forge.images.errors import LayoutError
from vllm_forge.images.layer import LayerBlob
from vllm_forge.images.layout import ImageLayer, read_image, write_image
from vllm_forge.matrix.model import ReleasePolicy
from vllm_forge.project import Project
from vllm_forge.release import errors, published
from vllm_forge.release.evidence import Trust
from vllm_forge.release.gate import policy_of
from vllm_forge.release.pipeline import release
from vllm_forge.release.published import SUFFIX, attest_folder, from_layout, from_registry
from vllm_forge.release.registry import Reference
from vllm_forge.release.statements import PROVENANCE, SBOM, TEST_RESULT, VEX, VEX_FILE, VSA
from vllm_forge.release.verify import Report, Verification, describe
from vllm_forge.signing import errors as signing
from vllm_forge.signing import load_private, read, read_keyring, sign

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm_forge.errors import ForgeError

pytestmark = pytest.mark.xdist_group("evidence")  # one worker builds what its fixtures have

KINDS = {
    SBOM: "sbom", PROVENANCE: "provenance", TEST_RESULT: "receipt-server", VSA: "decision",
    VEX: "vex",
}  # fmt: skip
NAMES = list(KINDS.values())
ROWS = """
author = "A Person"
version = 1
[[statement]]
vulnerability = "CVE-2026-0001"
packages = ["pkg:pypi/sixlike@1.0"]
lines = ["mini"]
status = "not_affected"
justification = "vulnerable_code_not_in_execute_path"
impact = "nothing calls it"
date = 2026-11-30
"""
OTHER = "sha256:" + "7" * 64
PARAMETERS = "buildDefinition.externalParameters"


@dataclass(frozen=True, kw_only=True)
class Released:
    """A released image as a folder, the checkout that made it, and its keys."""

    root: Path
    layout: Path
    keys: dict[str, Path]

    def bundle(self, name: str) -> Path:
        return attest_folder(self.layout) / f"{name}{SUFFIX}"

    def statement(self, name: str) -> dict[str, Any]:
        statement: dict[str, Any] = json.loads(read(self.bundle(name).read_bytes()).statement)
        return statement

    def put(self, name: str, statement: dict[str, Any], key: Path | str) -> None:
        """Sign a statement with a key, of the release by its name or of a file."""
        path = self.keys[key] if isinstance(key, str) else key
        self.bundle(name).write_bytes(sign(canonical(statement), load_private(path)))

    def change(self, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change a statement, and sign it as before."""
        statement = self.statement(name)
        change(statement)
        self.put(name, statement, "lab" if name.startswith("receipt") else "release")

    def verify(self, now: datetime | None = None, *, deep: bool = False) -> Report:
        return Verification(
            published=from_layout(self.layout),
            policy=policy_of(Project(self.root), "release"),
            stage="release",
            trust=Trust(keys=read_keyring(self.root)),
            now=now or datetime.now(UTC),
        ).run(deep=deep)

    def finding(self, kind: type[ForgeError], **options: Any) -> str:
        """The message of the finding of this class."""
        report = self.verify(**options)
        found = [row.what for row in report.findings if type(row) is kind]
        assert found, [f"{type(row).__name__}: {row}" for row in report.findings]
        return found[0]

    def refusal(self, name: str, kind: type[ForgeError]) -> str:
        """Why a statement does not count.

        No stage requires VEX: then the finding is that the decision relies on what does not count.
        """
        if name != "vex":
            return self.finding(kind)
        assert "relies on a vex of" in self.finding(errors.DecisionError)
        return "\n".join(self.verify().not_counted)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Released]:
    """Alpha, released."""
    folder = tmp_path_factory.mktemp("release")
    with ExitStack() as stack:
        mini = make_project(folder / "mini")
        stack.callback(mini.index.close)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        use(mini, patch)
        server = stack.enter_context(RegistryServer().running())
        keys = stack.enter_context(releasable(mini, folder))
        (mini.root / VEX_FILE).write_text(ROWS)
        commit(mini.root)
        releases = Releases(mini, keys, Reference.parse(f"{server.host}/forge/vllm"))
        candidate = release(releases.job("dev"), ReleaseRunner())
        assert candidate is not None
        add_receipt(mini, candidate.digest, keys["lab"])
        assert release(releases.job("release"), ReleaseRunner()) is not None
        layout = mini.root / "dist" / CELL
        attest_folder(layout).mkdir()
        released = Released(root=mini.root, layout=layout, keys=keys)
        for item in from_registry(releases.reference.at(candidate.digest)).attached:
            released.bundle(KINDS[item.stated]).write_bytes(item.content)
    yield released


@pytest.fixture
def released(original: Released, tmp_path: Path) -> Released:
    """A copy to change."""
    root = tmp_path / "checkout"
    shutil.copytree(original.root / "records", root / "records")
    shutil.copy(original.root / "matrix.toml", root)
    for path in (original.layout, attest_folder(original.layout)):
        shutil.copytree(path, root / "dist" / path.name)
    return Released(root=root, layout=root / "dist" / CELL, keys=original.keys)


def test_released_image_holds(released: Released) -> None:
    report = released.verify(deep=True)
    assert report.findings == []
    assert [row["tier"] for row in report.receipts] == ["server"]
    assert report.decision["tags"] == ["0.1.0-forge.1-alpha", "mini-alpha"]


@pytest.mark.parametrize("name", NAMES)
def test_deleted_statement_is_missing(released: Released, name: str) -> None:
    released.bundle(name).unlink()
    refusal = released.refusal(name, errors.StatementMissingError)
    assert refusal == ("" if name == "vex" else f"missing {name}: nothing of it is attached")


def test_all_deleted_are_missing(released: Released) -> None:
    shutil.rmtree(attest_folder(released.layout))
    findings = released.verify().findings
    assert {f"missing {name}: nothing of it is attached" for name in NAMES if name != "vex"} == {
        row.what for row in findings
    }


@pytest.mark.parametrize("name", NAMES)
def test_edited_statement_is_refused(released: Released, name: str) -> None:
    path = released.bundle(name)
    document = json.loads(path.read_text())
    statement = released.statement(name)
    statement["predicate"]["edited"] = True
    payload = base64.b64encode(canonical(statement)).decode()
    document["dsseEnvelope"]["payload"] = payload
    path.write_bytes(canonical(document))
    assert f"{name}: invalid signature" in released.refusal(name, signing.SignatureInvalidError)


@pytest.mark.parametrize("name", NAMES)
def test_statement_of_an_unknown_key_is_refused(
    released: Released, name: str, tmp_path: Path
) -> None:
    private, _ = key_pair(tmp_path / "stranger", "p256")
    released.put(name, released.statement(name), private)
    assert "which is not trusted" in released.refusal(name, signing.UnknownSignerError)


@pytest.mark.parametrize("name", NAMES)
def test_statement_of_a_key_with_another_role_is_refused(released: Released, name: str) -> None:
    key = "release" if name.startswith("receipt") else "lab"
    released.put(name, released.statement(name), key)
    assert f"{name}: key {key} may sign" in released.refusal(name, signing.KeyRoleError)


@pytest.mark.parametrize("name", NAMES)
def test_statement_of_another_image_is_refused(released: Released, name: str) -> None:
    released.change(name, lambda s: s["subject"][0]["digest"].update(sha256=OTHER[7:]))
    what = released.refusal(name, errors.StatementSubjectError)
    assert f"{name}: it is about another image: sha256:{OTHER[7:]}" in what


@pytest.mark.parametrize("name", ["sbom", "provenance", "decision"])
def test_swapped_statement_is_refused(released: Released, name: str) -> None:
    one, other = released.bundle(name), released.bundle("receipt-server")
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    what = released.finding(errors.StatementKindError)
    assert what.startswith(f"{name}: it is said to be 'receipt-server', and its statement is of")


@pytest.mark.parametrize("name", ["sbom", "provenance"])
def test_second_statement_of_a_kind_is_refused(released: Released, name: str) -> None:
    statement = released.statement(name)
    if name == "sbom":
        statement["predicate"]["serialNumber"] = "urn:uuid:0"
    else:
        statement["predicate"]["runDetails"]["metadata"]["finishedOn"] = "2026-11-30T00:00:00Z"
    released.put(f"{name}-other", statement, "release")
    assert f"different statements of {name}" in released.finding(errors.StatementDuplicateError)


def test_two_decisions_of_one_time_are_refused(released: Released) -> None:
    statement = released.statement("decision")
    statement["predicate"]["vllmForge"]["tags"] = ["0.1.0-forge.7-alpha"]
    released.put("decision-other", statement, "release")
    assert "two different decisions" in released.finding(errors.StatementDuplicateError)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_foreign_statements_hide_nothing(
    released: Released, name: str, tmp_path: Path
) -> None:
    shutil.copy(released.bundle(name), released.bundle(f"{name}-copy"))
    private, _ = key_pair(tmp_path / "stranger", "p256")
    released.put(f"{name}-foreign", released.statement(name), private)
    unknown = released.statement(name) | {"predicateType": "https://example.invalid/v1"}
    released.put("unknown", unknown, private)
    released.bundle("rubbish").write_bytes(b"{")
    report = released.verify()
    assert report.findings == []
    text = "\n".join(report.not_counted)
    assert "which is not trusted" in text
    assert "rubbish: not a Sigstore bundle" in text
    assert "unknown predicate type: https://example.invalid/v1" in text


@pytest.mark.parametrize("name", ["vllm-forge", "vllm source, patched"])
def test_second_commit_or_tree_of_a_provenance_is_refused(released: Released, name: str) -> None:
    """We would read the first, and others perhaps the last."""

    def add(statement: dict[str, Any]) -> None:
        rows = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
        rows.append({"name": name, "digest": {"gitCommit": "0" * 40, "gitTree": "0" * 40}})

    released.change("provenance", add)
    assert {type(row) for row in released.verify().findings} & {
        errors.StatementContentError, errors.ImageContentError,
    }  # fmt: skip


def set_at(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one field of a predicate."""

    def change(statement: dict[str, Any]) -> None:
        place = statement["predicate"]
        *parents, last = path.split(".")
        for part in parents:
            place = place[int(part) if part.isdecimal() else part]
        place[last] = value

    return change


@pytest.mark.parametrize(
    ("name", "field", "ours"),
    [("decision", "resourceUri", "resource"), ("provenance", "runDetails", "run")],
)
def test_field_by_a_name_that_others_do_not_read_is_refused(
    released: Released, name: str, field: str, ours: str
) -> None:
    """What our code calls a field is not its name."""
    released.change(name, lambda s: s["predicate"].update({ours: s["predicate"].pop(field)}))
    assert f"{field}: Field required" in released.finding(errors.StatementContentError)


@pytest.mark.parametrize(
    ("name", "change", "kind", "what"),
    [
        ("provenance", set_at(f"{PARAMETERS}.features", "x"),
         errors.StatementContentError, "unknown key buildDefinition.externalParameters.features"),
        ("provenance", set_at(f"{PARAMETERS}.sku", "beta"), errors.ImageContentError, "sku"),
        ("provenance", set_at("buildDefinition.resolvedDependencies.3.digest.gitTree", "0" * 40),
         errors.ImageContentError, "tree"),
        ("provenance", set_at("buildDefinition.resolvedDependencies.0.name", "other"),
         errors.StatementContentError, "commit '', signed by"),
        ("provenance", set_at("runDetails.builder.id", "https://github.com/a/b/c.yml@refs/heads/d"),
         errors.StatementContentError, "provenance: builder https://github.com/a/b/c.yml@refs"),
        ("sbom", set_at("components", []), errors.ImageContentError, "other Python packages"),
        ("decision", set_at("verificationResult", "FAILED"), errors.StatementContentError, "PASS"),
        ("decision", set_at("exceptions", []), errors.StatementContentError, "unknown key excep"),
        ("decision", set_at("vllmForge.stage", "candidate"), errors.DecisionError, "one for: cand"),
        ("decision", set_at("inputAttestations", []), errors.DecisionError, "rely on any prov"),
        ("decision", set_at("resourceUri", "pkg:oci/x"), errors.DecisionError, "about pkg:oci/x"),
        ("decision", set_at("verifiedLevels", ["SLSA_BUILD_LEVEL_2"]), errors.DecisionError,
         "claims SLSA_BUILD_LEVEL_2; the signatures of its provenance prove level 1"),
        ("decision", set_at("timeVerified", "2190-01-01T00:00:00Z"),
         errors.StatementExpiredError, "the decision is of 2190"),
        ("decision", set_at("timeVerified", 1796000000), errors.StatementContentError, "timeVer"),
        ("provenance", set_at("runDetails.metadata.finishedOn", 1700000000),
         errors.StatementContentError, "finishedOn"),
        ("receipt-server", set_at("vllmForge.sku", "beta"), errors.DecisionError, "not attached"),
        ("receipt-server", set_at("result", "FAILED"), errors.DecisionError, "not attached"),
    ],
)  # fmt: skip
def test_statement_that_contradicts_is_refused(
    released: Released, name: str, change: Any, kind: type[ForgeError], what: str
) -> None:
    """Signed by the right key: a builder that was broken into, or a mistake."""
    released.change(name, change)
    assert what in released.finding(kind)


def add_gpu(statement: dict[str, Any]) -> None:
    """A second one, of another kind."""
    gpus = statement["predicate"]["vllmForge"]["gpus"]
    gpus.append(gpus[0] | {"compute_capability": "1.0", "uuid_sha256": "0" * 64})


def over_bound(statement: dict[str, Any]) -> None:
    for test in statement["predicate"]["vllmForge"]["tests"].values():
        for margin in test["margins"].values():
            margin["measured"] = 17


@pytest.mark.parametrize(
    ("change", "what"),
    [(set_at("vllmForge.sku", "beta"), "changed sku"), (add_gpu, "changed compute_capability")],
)
def test_receipt_of_another_cell_is_refused(released: Released, change: Any, what: str) -> None:
    """Also where the decision relies on it."""
    decide_on_receipt(released, change)
    finding = released.finding(errors.ImageContentError)
    assert f"its receipt of tier server is of another image: {what}" in finding


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (set_at("passedTests", []), "other passedTests than tests that passed"),
        (set_at("vllmForge.expires", "2199-12-31T00:00:00Z"), "at most 90 days are accepted"),
        (set_at("vllmForge.started", "2199-12-31T00:00:00Z"), "before its start"),
        (over_bound, "is red: tests/gpu/mtp/test_it.py::test_one: drafts is 17, its bound 16"),
    ],
)
def test_receipt_that_contradicts_itself_is_refused(
    released: Released, change: Any, what: str
) -> None:
    """Made by hand, signed by the lab, and relied on by the decision."""
    decide_on_receipt(released, change)
    assert what in released.finding(errors.StatementContentError)


def decide_on_receipt(released: Released, change: Any) -> None:
    """Change the receipt, and let the decision rely on that."""
    released.change("receipt-server", change)
    digest = hashlib.sha256(read(released.bundle("receipt-server").read_bytes()).statement)
    rows = released.statement("decision")["predicate"]["inputAttestations"]
    for row in rows:
        if row["uri"] == "receipt-server":
            row["digest"] = {"sha256": digest.hexdigest()}
    released.change("decision", set_at("inputAttestations", rows))


def test_expired_receipt_is_refused(released: Released) -> None:
    now = datetime.now(UTC) + timedelta(days=90)
    assert "receipt-server: expired on" in released.finding(errors.StatementExpiredError, now=now)


def test_decision_on_old_evidence_is_refused(released: Released) -> None:
    """Nothing has expired yet, but the policy takes only what is newer."""
    time = datetime.now(UTC) + timedelta(days=61)
    released.change("decision", set_at("timeVerified", time.isoformat()))
    what = released.finding(errors.StatementExpiredError, now=time)
    assert "more than 60 days before the decision" in what


def test_clock_in_the_past_is_refused(released: Released) -> None:
    now = datetime.now(UTC) - timedelta(days=1)
    what = released.finding(errors.StatementExpiredError, now=now)
    assert what.startswith("the decision is of ")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (REVOKED, signing.KeyRevokedError),
        ({"valid_until": "2020-01-02"}, signing.KeyExpiredError),
        ({"valid_from": "2199-01-02"}, signing.KeyExpiredError),
    ],
)
def test_key_that_does_not_count_makes_its_statements_missing(
    released: Released, row: dict[str, str], kind: type[ForgeError]
) -> None:
    folder = released.root / "records" / "keys"
    public = (folder / "release.pem").read_bytes()
    (folder / "keyring.toml").unlink()
    trust(released.root, (folder / "lab.pem").read_bytes(), "lab")
    trust(released.root, public, "release", **row)
    (folder / "second.pem").unlink()
    report = released.verify()
    assert {type(error) for error in report.findings} == {kind}


def test_changed_image_has_no_statements(released: Released) -> None:
    """Another configuration, with every digest of the layout in order."""
    image = read_image(released.layout)
    config = image.config["config"] | {"User": "0:0"}
    write_image(released.layout, layers=image.layers, config=config, epoch=1735689600, name="x:y")
    findings = {type(error) for error in released.verify().findings}
    assert findings == {errors.StatementSubjectError}


def with_layer(released: Released, content: bytes, count: int = 1) -> None:
    """Put ``content`` on the image, ``count`` times, as its highest layers."""
    image = read_image(released.layout)
    path = released.root / "top.tar.gz"
    path.write_bytes(gzip.compress(content))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    blob = LayerBlob(path=path, digest=digest, diff_id="0" * 64, size=path.stat().st_size)
    layers = [*image.layers, *[ImageLayer(blob=blob, name="top")] * count]
    config = image.config["config"]
    write_image(released.layout, layers=layers, config=config, epoch=1735689600, name="x:y")


def headers_of(size: int) -> bytes:
    """A tar whose first entry has an extended header of ``size`` bytes."""
    info = tarfile.TarInfo("x")
    info.pax_headers = {"comment": "x" * size}
    return info.tobuf(tarfile.PAX_FORMAT)


class Counted(io.BytesIO):
    """Counts what is read of all of them."""

    total = 0

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        Counted.total += len(content)
        return content


TARS: dict[str, Callable[[], bytes]] = {
    "header": lambda: headers_of(4 << 20),
    "empty": bytes,
    "cut": lambda: headers_of(9)[:700],
}


@pytest.mark.parametrize("tar", TARS)
def test_layer_of_a_stranger_is_read_in_part(
    released: Released, tar: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few bytes of gzip can be any number of bytes, and Python keeps a header in memory."""
    with_layer(released, TARS[tar]())
    monkeypatch.setattr(published, "PLAIN_BYTES", 1 << 20)
    monkeypatch.setattr(published, "plain_tar", lambda _: Counted(TARS[tar]()))
    Counted.total = 0
    findings = {type(error) for error in released.verify().findings}
    assert findings == {errors.ImageContentError}
    assert Counted.total <= len(read_image(released.layout).layers) << 20


def test_image_of_more_layers_than_docker_runs_is_refused(released: Released) -> None:
    """Each could be one to fetch, in search of a stack.json."""
    with_layer(released, b"", 120)
    with pytest.raises(LayoutError, match="more than 125 layers"):
        released.verify()


def test_stage_without_signatures_says_so(released: Released) -> None:
    shutil.rmtree(attest_folder(released.layout))
    report = Verification(
        published=from_layout(released.layout), policy=ReleasePolicy(), stage="dev",
        trust=Trust(keys=read_keyring(released.root)), now=datetime.now(UTC),
    ).run()  # fmt: skip
    assert report.findings == []
    assert "not checked  who made it: stage dev requires no signature" in describe(report)


@pytest.mark.parametrize("stage", ["candidate", "dev"])
def test_other_stage_is_named(released: Released, stage: str) -> None:
    released.change("decision", set_at("vllmForge.stage", stage))
    what = released.finding(errors.DecisionError)
    assert what == f"no decision releases it as release; there is one for: {stage}"
