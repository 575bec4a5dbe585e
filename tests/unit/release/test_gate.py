"""What a cell lacks for a stage, by the committed records and by planted faults."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.support.fast_build import FastEngine
from tests.support.release import committed_checkout, git
from vllm_forge.images.prewarm import PrewarmLock, prewarm_lock
from vllm_forge.project import Project
from vllm_forge.release.errors import GateRefusedError, UnknownStageError, WaiverError
from vllm_forge.release.gate import Gate, Waiver, make_waivers, policy_of
from vllm_forge.release.pipeline import plan_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm_forge.images.engines import Engine
    from vllm_forge.matrix.model import Stage

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
REASON = "the lab has no such GPU before January"


def gate(project: Project, stage: Stage = "release", sku: str = "b300", **changes: Any) -> Gate:
    settings: dict[str, Any] = {"digest": None, "now": NOW, **changes}
    return Gate(
        project=project, cell=project.cell(sku), stage=stage, policy=policy_of(project, stage),
        **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return committed_checkout(tmp_path_factory.mktemp("gate") / "checkout")


@pytest.fixture
def project(committed: Path) -> Iterator[Project]:
    """It, to change: what a test does to it ends with the test."""
    start = git(committed, "rev-parse", "HEAD").strip()
    yield Project(committed)
    git(committed, "reset", "-q", "--hard", start)
    git(committed, "clean", "-qfd")


def edit(project: Project, path: str, change: Callable[[Any], None]) -> None:
    """Change a committed record, and commit that."""
    file = project.root / path
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    git(project.root, "commit", "-qam", "edit")


def whats(row: Gate) -> list[str]:
    return [finding.what for finding in row.findings()]


def test_blackwell_lacks_only_its_receipts(project: Project) -> None:
    row = gate(project)
    with pytest.raises(GateRefusedError) as refused:
        row.require(row.findings())
    assert whats(row) == [
        f"missing receipt of tier {tier} on NVIDIA B300 SXM6 AC (b300) for an image that is not "
        "built here"
        for tier in ("kernel", "server")
    ]
    text = str(refused.value)
    assert "vllm-0.26.0-b300 is not ready for stage release; missing (2):" in text
    assert "nox -s test-gpu -- --sku b300 --line 0.26 --tier kernel --key KEY" in text


def test_digest_of_the_missing_receipts_is_named(project: Project) -> None:
    digest = f"sha256:{'7' * 64}"
    assert all(what.endswith(f"for {digest}") for what in whats(gate(project, digest=digest)))


def test_candidate_and_dev_lack_nothing(project: Project) -> None:
    for stage in ("candidate", "dev"):
        row = gate(project, stage=stage)
        assert whats(row) == []
        row.require([])


@pytest.mark.parametrize("stage", ["dev", "candidate"])
def test_compiled_kernels_are_locked_by_the_commit(project: Project, stage: Stage) -> None:
    row = gate(project, stage=stage, prewarm="7" * 64)
    refused = [] if stage == "dev" else ["the compiled kernels 777777777777 are not locked: "]
    assert whats(row) == [what + "there is no lock" for what in refused]
    path, _ = prewarm_lock(project.root, row.cell)
    for digest, left in {"8" * 64: refused, "7" * 64: []}.items():
        lock = PrewarmLock(sha256=digest, bytes=1, key={}, image="sha256:1", tiers=("server",))
        path.parent.mkdir(exist_ok=True)
        path.write_text(lock.model_dump_json())
        git(project.root, "add", "--all")
        git(project.root, "commit", "-qm", "lock")
        assert whats(row) == [what + "the lock is of 888888888888" for what in left]


@pytest.mark.parametrize(("archives", "kernels"), [("network", False), ("carried", True)])
def test_variant_that_the_row_names_is_built(
    project: Project, tmp_path: Path, archives: str, kernels: bool
) -> None:
    row = gate(project, stage="candidate")
    row = replace(row, policy=row.policy.model_copy(update={"archives": archives}))
    options = plan_of(row, tmp_path, cast("Engine", FastEngine())).options
    assert (options.kernels, options.base) == (kernels, "locked")


def test_stage_without_a_row_is_refused(project: Project) -> None:
    matrix = project.root / "matrix.toml"
    matrix.write_text(matrix.read_text().replace("[release.dev]", ""))
    with pytest.raises(UnknownStageError, match="stage dev has no policy"):
        policy_of(Project(project.root), "dev")


def test_sku_for_development_is_never_released_for(project: Project) -> None:
    assert "for development" in whats(gate(project, sku="h200"))[0]
    assert whats(gate(project, stage="candidate", sku="h200")) == []


def change_tree(data: Any) -> None:
    data["trees"]["result"] = "0" * 40


def change_lock(data: Any) -> None:
    data["environment"]["lock_sha256"] = "0" * 64


def change_tests(data: Any) -> None:
    data["tests"] = "0" * 64


def lose_tests(data: Any) -> None:
    del data["tests"]


def change_proof(data: Any) -> None:
    data["patches"][0]["proves"] += "_of_less"


def lose_proof(data: Any) -> None:
    del data["patches"][0]["proves"]


def drop_proof(data: Any) -> None:
    data["patches"].pop()


def fail_proof(data: Any) -> None:
    del data["patches"][0]["with"]["passed"]


def change_upstream_tree(data: Any) -> None:
    data["trees"]["patched"] = "0" * 40


def regress(data: Any) -> None:
    next(iter(data["files"].values()))["passed, then failed"] = 1


def change_selection(data: Any) -> None:
    data["inputs"]["lock"] = "0" * 64


def change_coverage_lock(data: Any) -> None:
    data["lock"] = "0" * 64


def lose_kernel(data: Any) -> None:
    data["coverage"]["torch"]["b300"]["verdict"] = "missing"


@pytest.mark.parametrize(
    ("record", "change", "what"),
    [
        ("proofs", change_tree, "patches of line 0.26 are not proven"),
        ("proofs", change_lock, "patches of line 0.26 are not proven"),
        ("proofs", change_tests, "patches of line 0.26 are not proven"),
        ("proofs", lose_tests, "patches of line 0.26 are not proven"),
        ("proofs", change_proof, "patches of line 0.26 are not proven"),
        ("proofs", drop_proof, "patches of line 0.26 are not proven"),
        ("proofs", fail_proof, "patches of line 0.26 are not proven"),
        ("upstream", change_upstream_tree, "own tests were not run on the present series"),
        ("upstream", regress, "pass as published, not as patched: passed, then failed"),
        ("selection", change_selection, "inputs changed since kernel selection was recorded"),
        ("coverage", change_coverage_lock, "kernel coverage of line 0.26 was recorded of other"),
        ("coverage", lose_kernel, "kernels of torch are missing on b300"),
        ("proofs", dict.clear, "invalid record: missing key"),
        ("proofs", lose_proof, "invalid record: missing key"),
        ("upstream", dict.clear, "invalid record: missing key"),
        ("coverage", dict.clear, "invalid record: missing key"),
    ],
)
def test_record_that_does_not_hold_is_missing(
    project: Project, record: str, change: Callable[[Any], None], what: str
) -> None:
    edit(project, f"records/{record}/0.26.json", change)
    (first, *others) = whats(gate(project))
    assert what in first
    assert len(others) == 2  # the receipts


def test_uncommitted_changes_are_named(project: Project) -> None:
    (project.root / "docker" / "new").touch()
    (what,) = whats(gate(project, stage="candidate"))
    assert what.startswith("the checkout differs from commit ")
    assert what.endswith(": docker/new")


def test_checkout_without_a_commit_is_refused(project: Project, tmp_path: Path) -> None:
    skip = shutil.ignore_patterns(".git")
    copy = Project(shutil.copytree(project.root, tmp_path / "copy", ignore=skip))
    assert whats(gate(copy, stage="candidate")) == ["the checkout has no commit"]


def test_waived_tier_is_not_missing(project: Project) -> None:
    waivers = (Waiver(tier="kernel", until=NOW.date(), reason=REASON),)
    (what,) = whats(gate(project, waivers=waivers))
    assert "tier server" in what


def test_expired_waiver_is_refused(project: Project) -> None:
    waivers = (Waiver(tier="kernel", until=date(2026, 11, 29), reason=REASON),)
    assert whats(gate(project, waivers=waivers))[0] == (
        "the waiver of tier kernel expired at the end of 2026-11-29"
    )


@pytest.mark.parametrize(
    ("tiers", "until", "reason", "what"),
    [
        (["kernel"], None, None, "belong together"),
        (["kernel"], NOW.date(), None, "belong together"),
        ([], NOW.date(), REASON, "belong together"),
        (["kernle"], NOW.date(), REASON, r"'kernle': .* \(did you mean 'kernel'\?\)"),
        (["soak"], NOW.date(), REASON, "invalid --waive 'soak'"),
        (["kernel"], NOW.date(), "short", "invalid --reason"),
        (["kernel"], NOW.date(), "a reason with\nanother line", "invalid --reason"),
        (["kernel"], NOW.date(), "a reason that \x1b[2K hides", "invalid --reason"),
    ],
)
def test_incomplete_or_invalid_waiver_is_rejected(
    project: Project, tiers: list[str], until: date | None, reason: str | None, what: str
) -> None:
    with pytest.raises(WaiverError, match=what):
        make_waivers(tiers, until, reason, policy_of(project, "release"))


def test_waiver_has_one_row_a_tier(project: Project) -> None:
    rows = make_waivers(
        ["kernel", "server", "kernel"], NOW.date(), REASON, policy_of(project, "release")
    )
    assert [row.tier for row in rows] == ["kernel", "server"]
