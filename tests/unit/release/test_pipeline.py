"""A release of the small project, from its build to its names."""

from __future__ import annotations

import errno
import shutil
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.fast_build import fast_build, use
from tests.support.osv import export, record, since
from tests.support.project import Project as MiniProject
from tests.support.project import make_project
from tests.support.release import (
    ReleaseRunner,
    Releases,
    add_receipt,
    commit,
    git,
    releasable,
    write_records,
)
from tests.support.sigstore_services import IDENTITY, ISSUER, sigstore_services
from vllm_forge.errors import ForgeError
from vllm_forge.host import RecordingRunner
from vllm_forge.pages.notes import make_notes
from vllm_forge.project import Project
from vllm_forge.release import sbom, statements
from vllm_forge.release.errors import (
    DecisionError,
    GateRefusedError,
    OsvError,
    RegistryAuthError,
    RegistryContentError,
    RegistryUnreachableError,
    StatementExpiredError,
    TagTakenError,
)
from vllm_forge.release.evidence import Trust
from vllm_forge.release.gate import Waiver
from vllm_forge.release.pipeline import Outcome, release
from vllm_forge.release.published import from_registry
from vllm_forge.release.referrers import PREDICATE, referrers
from vllm_forge.release.registry import Reference, Repository
from vllm_forge.release.tags import Names
from vllm_forge.release.verify import Report, Verification, describe
from vllm_forge.signing import Keyring
from vllm_forge.signing.errors import KeyRoleError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.registry_server import RegistryServer
    from vllm_forge.matrix.model import Stage

pytestmark = pytest.mark.xdist_group("pipeline")  # one worker builds what its fixtures have

REASON = "the lab has no such GPU before January"
STEPS = ["sign and attach: prov", "read all of it", "choose the tags", "let the tags name"]


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[MiniProject, dict[str, Path]]]:
    """The small project, with alpha in dist/."""
    folder = tmp_path_factory.mktemp("prepared")
    with ExitStack() as stack:
        mini = make_project(folder / "mini")
        stack.callback(mini.index.close)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        use(mini, patch)
        keys = stack.enter_context(releasable(mini, folder))
        fast_build(mini, "alpha", base="locked")
        yield mini, keys


@pytest.fixture
def releases(
    prepared: tuple[MiniProject, dict[str, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    registry: RegistryServer,
) -> Releases:
    """A copy of its checkout, and an empty registry."""
    mini, keys = prepared
    copy = MiniProject(root=tmp_path / "checkout", cache=mini.cache, index=mini.index)
    shutil.copytree(mini.root, copy.root)
    use(copy, monkeypatch)
    return Releases(copy, keys, Reference.parse(f"{registry.host}/forge/vllm"))


def run(releases: Releases, stage: Stage, **changes: Any) -> Outcome:
    outcome = release(releases.job(stage, **changes), ReleaseRunner())
    assert outcome is not None
    return outcome


def verification(
    releases: Releases, name: str, stage: Stage = "release", **changes: Any
) -> Verification:
    """Of a tag or digest, by a stranger."""
    job = releases.job(stage)
    settings: dict[str, Any] = {"now": datetime.now(UTC), "trust": job.trust, **changes}
    reference = Reference.parse(f"{releases.reference}{name}")
    return Verification(
        published=from_registry(reference), policy=job.gate.policy, stage=stage, **settings,
    )  # fmt: skip


def verified(releases: Releases, name: str, stage: Stage = "release", **changes: Any) -> Report:
    """What a stranger gets of a tag or digest."""
    return verification(releases, name, stage, **changes).run()


def new_image(releases: Releases) -> str:
    """Build another image of alpha, for another commit."""
    releases.mini.patch("bool(args and not args.dynamic)")
    write_records(Project(releases.mini.root))
    commit(releases.mini.root)
    return run(releases, "dev", key=None).digest


def test_stages_follow_each_other(releases: Releases, repository: Repository) -> None:
    dev = run(releases, "dev", key=None)
    assert dev.names.all == ("mini-alpha-dev",)
    candidate = run(releases, "candidate")
    assert candidate.names.all == ("0.1.0-forge.1-alpha-rc1",)
    add_receipt(releases.mini, dev.digest, releases.keys["lab"])
    last = run(releases, "release")
    assert last.names.all == ("0.1.0-forge.1-alpha", "mini-alpha")
    names = [*dev.names.all, *candidate.names.all, *last.names.all]
    assert {repository.resolve(tag) for tag in names} == {dev.digest}
    report = verified(releases, ":0.1.0-forge.1-alpha")
    assert report.findings == []
    assert [row["signer"] for row in report.builders] == ["release"]


def test_known_vulnerabilities_are_listed_by_an_export(releases: Releases, tmp_path: Path) -> None:
    """They are no finding: whether an image is forged is another question."""
    tag = run(releases, "candidate").names.fixed
    blind = verified(releases, f":{tag}", "candidate")
    assert "known vulnerabilities: --osv" in blind.not_checked
    row = record("vllm", *since("0", fixed="0.1.1"), aliases=["CVE-2026-1"])
    path = export(tmp_path, row, record("vllm", *since("0"), id="X-2"))
    report = verification(releases, f":{tag}", "candidate").run(export=path)
    assert report.findings == []
    text = describe(report)
    assert ": X-1, CVE-2026-1, fixed in 0.1.1" in text
    assert ": X-2, no fixed version known" in text
    assert [row["ids"] for row in report.vulnerabilities] == [("X-1", "CVE-2026-1"), ("X-2",)]
    path.write_bytes(b"")
    with pytest.raises(OsvError):  # of the file, not of the image
        verification(releases, f":{tag}", "candidate").run(export=path)
    assert any("packages of type deb" in row for row in report.not_checked)


def test_release_without_a_receipt_names_nothing(
    releases: Releases, repository: Repository
) -> None:
    run(releases, "candidate")
    before = set(repository.tags())
    with pytest.raises(GateRefusedError, match="missing receipt of tier server on NVIDIA Alpha"):
        run(releases, "release")
    assert set(repository.tags()) == before


def test_unsigned_receipt_does_not_count(releases: Releases) -> None:
    add_receipt(releases.mini, run(releases, "dev", key=None).digest, None)
    with pytest.raises(GateRefusedError, match="the receipt is unsigned"):
        run(releases, "release")


def test_old_receipt_does_not_count(releases: Releases) -> None:
    digest = run(releases, "dev", key=None).digest
    finished = datetime.now(UTC) - timedelta(days=61)
    add_receipt(releases.mini, digest, releases.keys["lab"], finished)
    with pytest.raises(GateRefusedError, match="takes none older than 60 days"):
        run(releases, "release")


def test_waiver_is_in_the_decision(releases: Releases) -> None:
    today = datetime.now(UTC).date()
    waivers = (Waiver(tier="server", until=today, reason=REASON),)
    run(releases, "release", waivers=waivers)
    report = verified(releases, ":mini-alpha")
    assert report.findings == []
    assert f"released without tier server, until {today}: {REASON}" in describe(report)
    (error,) = verified(releases, ":mini-alpha", now=datetime.now(UTC) + timedelta(days=1)).findings
    assert isinstance(error, StatementExpiredError)
    assert f"released without tier server, by a waiver that expired: {today}" in error.what


def test_waiver_that_is_not_needed_is_refused(releases: Releases) -> None:
    """Of an image that is built, as only then its receipts are known."""
    digest = run(releases, "dev", key=None).digest
    add_receipt(releases.mini, digest, releases.keys["lab"])
    waivers = (Waiver(tier="server", until=datetime.now(UTC).date(), reason=REASON),)
    with pytest.raises(GateRefusedError, match="the waiver of tier server is not needed"):
        run(releases, "release", waivers=waivers)


def test_second_run_changes_nothing(releases: Releases, registry: RegistryServer) -> None:
    first = run(releases, "candidate")
    manifests, tags = dict(registry.manifests), dict(registry.tags)
    second = run(releases, "candidate")
    assert second.names == first.names
    assert (registry.manifests, registry.tags) == (manifests, tags)


@pytest.mark.parametrize("step", STEPS)
def test_stopped_release_has_no_name_and_goes_on(
    releases: Releases, repository: Repository, step: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        release(releases.job("candidate"), ReleaseRunner(stop=step))
    assert not [tag for tag in repository.tags() if "alpha" in tag]
    assert run(releases, "candidate").names.fixed == "0.1.0-forge.1-alpha-rc1"
    report = verified(releases, ":0.1.0-forge.1-alpha-rc1", "candidate")
    assert report.findings == []
    assert report.not_counted == []


def test_candidates_and_releases_are_counted(releases: Releases) -> None:
    first = run(releases, "candidate")
    add_receipt(releases.mini, first.digest, releases.keys["lab"])
    run(releases, "release")
    other = new_image(releases)
    assert other != first.digest
    assert run(releases, "candidate").names.fixed == "0.1.0-forge.2-alpha-rc1"
    add_receipt(releases.mini, other, releases.keys["lab"])
    assert run(releases, "release").names.fixed == "0.1.0-forge.2-alpha"


def test_older_release_does_not_take_the_moving_tag_back(
    releases: Releases, repository: Repository, prepared: tuple[MiniProject, dict[str, Path]],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    waivers = (Waiver(tier="server", until=datetime.now(UTC).date(), reason=REASON),)
    old = run(releases, "release", waivers=waivers)
    shutil.copytree(releases.mini.root, tmp_path / "old")
    new = new_image(releases)
    run(releases, "release", waivers=waivers)
    assert repository.resolve("mini-alpha") == new
    before = MiniProject(
        root=tmp_path / "old", cache=releases.mini.cache, index=releases.mini.index
    )
    use(before, monkeypatch)
    again = run(replace(releases, mini=before), "release", waivers=waivers)
    assert (again.digest, again.names) == (old.digest, Names(fixed="0.1.0-forge.1-alpha"))
    assert repository.resolve("mini-alpha") == new


@pytest.mark.parametrize("moment", [1, 2])
def test_tag_that_was_taken_meanwhile_is_refused(
    releases: Releases, registry: RegistryServer, repository: Repository, moment: int
) -> None:
    """Another host takes the name before we decide on it, or between decision and tag."""
    other = repository.put_manifest(b'{"mediaType":"x"}', "x")
    name = "0.1.0-forge.1-alpha-rc1"
    asked: list[str] = []

    def take() -> None:
        asked.append(name)
        if len(asked) == moment:
            registry.tags[releases.reference.repository, name] = other

    registry.plant("GET", f".*/manifests/{name}", before=take, times=9)
    with pytest.raises(TagTakenError, match=f"{name} is {other} already, and never moves"):
        run(releases, "candidate")
    assert repository.resolve(name) == other
    assert run(releases, "candidate").names.fixed == "0.1.0-forge.1-alpha-rc2"


def test_receipt_of_another_image_does_not_count(
    releases: Releases, registry: RegistryServer
) -> None:
    """It lets the build begin, as the digest is not known before; nothing is pushed."""
    add_receipt(releases.mini, f"sha256:{'7' * 64}", releases.keys["lab"])
    with pytest.raises(GateRefusedError, match=r"missing receipt of tier server .* for sha256:"):
        run(releases, "release")
    assert registry.manifests == {}


# What the registry does half-way -> the error, and what it says.
FAULTS: dict[str, tuple[dict[str, Any], type[ForgeError], str]] = {
    "500": (
        {"method": "PUT", "path": ".*/manifests/.*", "status": 500},
        RegistryUnreachableError, "answers 500 to PUT",
    ),
    "429": (
        {"method": "POST", "path": ".*/uploads/", "status": 429},
        RegistryUnreachableError, "answers 429 to POST",
    ),
    "401": (
        {"method": "GET", "path": ".*/manifests/.*", "status": 401,
         "headers": {"WWW-Authenticate": 'Basic realm="x"'}},
        RegistryAuthError, "asks for a login",
    ),
    "down": (
        {"method": "GET", "path": ".*/manifests/.*", "cut": 9},
        RegistryUnreachableError, "does not answer",
    ),
    "lie": (
        {"method": "GET", "path": ".*/manifests/sha256:.*", "change": lambda body: body + b" "},
        RegistryContentError, "a manifest said to be sha256:",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_registry_that_fails_half_way_leaves_no_name(
    releases: Releases, registry: RegistryServer, repository: Repository, name: str
) -> None:
    """Each failure by its own message; the same command then goes on."""
    fault, error, what = FAULTS[name]
    registry.plant(**fault, times=-1)
    with pytest.raises(error, match=what):
        run(releases, "candidate")
    registry.faults.clear()
    assert repository.tags() == ()
    assert run(releases, "candidate").names.fixed == "0.1.0-forge.1-alpha-rc1"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("revoked = {date = 2026-02-03, reason = 'lost'}", "key release was revoked on 2026-02-03"),
        ("valid_until = 2020-01-02", "key release is valid from 2020-01-01 to 2020-01-02"),
    ],
)
def test_key_that_does_not_count_is_refused_before_a_build(
    releases: Releases, registry: RegistryServer, row: str, what: str
) -> None:
    table = releases.mini.root / "records/keys/keyring.toml"
    head, _, rest = table.read_text().partition("valid_until = 2199-12-31")
    valid = "" if row.startswith("valid") else "valid_until = 2199-12-31\n"
    table.write_text(f"{head}{valid}{row}{rest}")
    commit(releases.mini.root)
    with pytest.raises(GateRefusedError, match=what):
        run(releases, "candidate")
    assert registry.requests == []


def test_key_that_signs_no_statement_of_a_release_is_refused_before_a_build(
    releases: Releases, registry: RegistryServer
) -> None:
    with pytest.raises(GateRefusedError, match="key lab may sign receipts, not release"):
        run(releases, "candidate", key="lab")
    assert registry.requests == []


def test_builder_and_releaser_with_keys_of_their_own(
    releases: Releases, repository: Repository
) -> None:
    """Each signs what its key may; nothing is attached that would not count."""
    table = releases.mini.root / "records/keys/keyring.toml"
    table.write_text(table.read_text().replace('"release", "builder", "vex"', '"release"'))
    commit(releases.mini.root)
    with pytest.raises(KeyRoleError, match="key release may sign release, not builder"):
        run(releases, "candidate")
    for _ in range(2):
        with pytest.raises(KeyRoleError, match="key second may sign builder, not release"):
            run(releases, "candidate", key="second")
    digest = run(releases, "candidate").digest
    attached = referrers(repository, digest)
    assert sorted(row.artifact.annotations[PREDICATE] for row in attached) == sorted(
        [statements.SBOM, statements.PROVENANCE, statements.VSA]
    )
    report = verified(releases, ":0.1.0-forge.1-alpha-rc1", "candidate")
    assert (report.findings, report.not_counted) == ([], [])


def test_full_disk_names_nothing_and_goes_on(
    releases: Releases, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the SBOM would be made: the image is pushed, and nothing is signed."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(sbom, "wheel_contents", full)
        run(releases, "candidate")
    assert repository.tags() == ()
    assert run(releases, "candidate").names.fixed == "0.1.0-forge.1-alpha-rc1"


def test_clock_in_the_past_names_nothing(releases: Releases, repository: Repository) -> None:
    past = datetime.now(UTC) - timedelta(days=2)
    with pytest.raises(GateRefusedError, match=r"the build ended at .*, and it is .* here"):
        run(releases, "candidate", clock=lambda: past)
    assert repository.tags() == ()


def test_uncommitted_change_is_refused_before_a_build(releases: Releases) -> None:
    (releases.mini.root / "patches" / "new").touch()
    with pytest.raises(GateRefusedError, match="differs from commit"):
        run(releases, "candidate")


def test_stage_with_statements_needs_a_key(releases: Releases) -> None:
    with pytest.raises(GateRefusedError, match="no key signs"):
        run(releases, "candidate", key=None)


def test_dry_run_asks_and_writes_nothing(
    releases: Releases, registry: RegistryServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert release(releases.job("candidate"), RecordingRunner()) is None
    assert registry.requests == []
    lines = capsys.readouterr().out.splitlines()
    commands = [line.split()[0] for line in lines if not line.startswith("#")]
    assert commands == ["nox", "skopeo"]
    assert lines[-1] == "# let the tags name the image: 0.1.0-forge.<n>-alpha-rc<n>"


def test_second_builder_adds_its_provenance(
    releases: Releases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Repository
) -> None:
    """With a key that may sign nothing else, on another machine."""
    matrix = releases.mini.root / "matrix.toml"
    matrix.write_text(matrix.read_text().replace("builders = 1", "builders = 2"))
    commit(releases.mini.root)
    digest = run(releases, "candidate").digest
    add_receipt(releases.mini, digest, releases.keys["lab"])
    wanted = "provenance of 2 independent builders is required, and 1 signed it: release"
    with pytest.raises(GateRefusedError, match=wanted):
        run(releases, "release")
    monkeypatch.setattr(statements, "MACHINE_ID", tmp_path / "machine-id")
    (tmp_path / "machine-id").write_text("another machine\n")
    before = set(repository.tags())
    assert run(releases, "candidate", key="second").names.fixed == "0.1.0-forge.1-alpha-rc1"
    assert {tag for tag in set(repository.tags()) - before if "alpha" in tag} == set()
    run(releases, "release")
    report = verified(releases, ":mini-alpha")
    assert report.findings == []
    assert {row["signer"] for row in report.builders} == {"release", "second"}


def test_two_keys_on_one_machine_are_one_builder(releases: Releases) -> None:
    matrix = releases.mini.root / "matrix.toml"
    matrix.write_text(matrix.read_text().replace("builders = 1", "builders = 2"))
    commit(releases.mini.root)
    digest = run(releases, "candidate").digest
    add_receipt(releases.mini, digest, releases.keys["lab"])
    run(releases, "candidate", key="second")
    with pytest.raises(GateRefusedError, match="and 1 signed it: release, second"):
        run(releases, "release")


@pytest.mark.parametrize(("runner", "level"), [("github-hosted", "2"), ("self-hosted", "1")])
def test_level_is_what_the_certificate_says_of_the_runner(
    releases: Releases, monkeypatch: pytest.MonkeyPatch, runner: str, level: str
) -> None:
    """A candidate of a CI job without a key, and what a stranger reads of it."""
    trust = Trust(keys=Keyring(), identity=(IDENTITY, ISSUER))
    with sigstore_services(monkeypatch) as services:
        services.runner = runner
        tag = run(releases, "candidate", key=None, trust=trust).names.fixed
        report = verified(releases, f":{tag}", "candidate", trust=trust)
    assert report.findings == []
    assert [(row["builder"], row["level"]) for row in report.builders] == [(IDENTITY, level)]
    assert report.decision["levels"] == [f"SLSA_BUILD_LEVEL_{level}"]
    assert f"SLSA build level {level}" in describe(report)


def test_tag_that_moves_while_it_is_verified_changes_nothing(
    releases: Releases, registry: RegistryServer, repository: Repository
) -> None:
    waivers = (Waiver(tier="server", until=datetime.now(UTC).date(), reason=REASON),)
    digest = run(releases, "release", waivers=waivers).digest
    other = repository.put_manifest(b'{"mediaType":"x"}', "x")
    place = (releases.reference.repository, "mini-alpha")
    registry.plant("GET", ".*/blobs/.*", before=lambda: registry.tags.update({place: other}))
    report = verified(releases, ":mini-alpha")
    assert repository.resolve("mini-alpha") == other
    assert (report.digest, report.findings) == (digest, [])


@pytest.mark.parametrize("tag", ["0.1.0-forge.9-alpha", "mini-beta", "latest"])
def test_tag_of_another_release_is_refused(
    releases: Releases, repository: Repository, tag: str
) -> None:
    """An older image under a newer name, or that of another SKU: everything about it is signed."""
    waivers = (Waiver(tier="server", until=datetime.now(UTC).date(), reason=REASON),)
    repository.set_tag(tag, run(releases, "release", waivers=waivers).digest)
    (error,) = verified(releases, f":{tag}").findings
    assert isinstance(error, DecisionError)
    assert f"tag {tag} is not of this image, which is 0.1.0-forge.1-alpha" in error.what


def test_notes_have_what_changed_and_what_was_waived(releases: Releases) -> None:
    until = datetime.now(UTC).date()
    waivers = (Waiver(tier="server", until=until, reason=REASON),)
    run(releases, "release", waivers=waivers)
    old = git(releases.mini.root, "rev-parse", "HEAD").strip()
    new_image(releases)
    run(releases, "release", waivers=waivers)
    after, before = (verification(releases, f":0.1.0-forge.{number}-alpha") for number in (2, 1))
    for each in (after, before):
        assert each.run().findings == []
    project = Project(releases.mini.root)
    text = make_notes(project, after, before)
    assert f"**Released without tier server** (until {until}): {REASON}" in text
    assert "Nothing was run on a GPU." in text
    assert "## Changes since 0.1.0-forge.1-alpha" in text
    assert "* vLLM: 2 changed" in text
    assert "* Debian packages: nothing changed" in text
    assert "* Kernel selection: not compared" in text
    assert "Changes since" not in make_notes(project, after, None)
    assert before.provenances[0].commit == old


def test_notes_have_the_receipts(releases: Releases) -> None:
    digest = run(releases, "dev", key=None).digest
    add_receipt(releases.mini, digest, releases.keys["lab"])
    run(releases, "release")
    after = verification(releases, ":mini-alpha")
    after.run()
    text = make_notes(Project(releases.mini.root), after, None)
    assert "End of support for line mini: not stated.\n" in text
    matrix = releases.mini.root / "matrix.toml"
    matrix.write_text(f"{matrix.read_text()}\n[support]\nmini = 2199-12-31\n")
    stated = make_notes(Project(releases.mini.root), after, None)
    assert "End of support for line mini: 2199-12-31.\n" in stated
    assert "| server | 1 x NVIDIA Alpha | 580.159.04 | 3 | 6% of its bound: test\\_one, dr" in text
