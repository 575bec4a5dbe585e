"""What an image still lacks for a stage: rows [release.*] of matrix.toml against the records.

The gate reads the checkout and its records; what is attached to an image in a registry is judged
in ``evidence``, by the code that a stranger runs, too.

The decision on an image that passed is a SLSA verification summary (VSA). It names the policy by
digest, the statements that it relied on, the tags that the image gets, and the tiers that were
waived. Source: https://slsa.dev/spec/v1.2/verification_summary.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field

import vllm_forge
from vllm_forge.errors import ForgeError, shortened, suggestion
from vllm_forge.host import canonical, head_commit
from vllm_forge.images.prewarm import prewarm_lock
from vllm_forge.kernels.coverage.families import FINE
from vllm_forge.kernels.coverage.families import digest as families_digest
from vllm_forge.kernels.selection.record import require_fresh
from vllm_forge.matrix import FrozenModel, ImageCell
from vllm_forge.matrix.errors import RecordFileError
from vllm_forge.matrix.model import Name, ReleasePolicy, Stage
from vllm_forge.patches import read_tree_lock
from vllm_forge.project import Project
from vllm_forge.proofs.record import fresh_record
from vllm_forge.receipts.receipt import Receipt
from vllm_forge.receipts.suite import read_suite
from vllm_forge.receipts.verification import read_receipts
from vllm_forge.release import errors
from vllm_forge.release.evidence import DECISION, Evidence, slsa_level

VERIFIER = "https://vllm-forge.dev/gate"
SLSA_VERSION = "1.2"
LEVEL = "SLSA_BUILD_LEVEL_"
NAMED = 3  # files of a list
PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"


class Waiver(FrozenModel):
    """The decision to release without a receipt of a tier; valid until the end of a day, UTC."""

    tier: Name
    until: date
    reason: Annotated[str, Field(pattern=PRINTABLE, min_length=10, max_length=500)]

    def expired(self, now: datetime) -> bool:
        return now.astimezone(UTC).date() > self.until


class Resource(FrozenModel):
    """A statement by its kind, or a policy, with the hash of its bytes."""

    uri: str
    digest: dict[Literal["sha256"], str] = Field(min_length=1)

    @property
    def sha256(self) -> str:
        return self.digest["sha256"]


class Verifier(FrozenModel):
    id: str
    version: dict[str, str]


class Detail(FrozenModel):
    """What a VSA has no field for."""

    stage: Stage
    tags: tuple[str, ...] = Field(min_length=1)
    waivers: tuple[Waiver, ...] = ()


class Decision(FrozenModel):
    """The predicate; unknown fields are refused."""

    verifier: Verifier
    time: AwareDatetime = Field(alias="timeVerified")
    resource: str = Field(alias="resourceUri")
    policy: Resource
    inputs: tuple[Resource, ...] = Field(alias="inputAttestations")
    result: Literal["PASSED"] = Field(alias="verificationResult")
    levels: tuple[str, ...] = Field(alias="verifiedLevels")
    slsa_version: str = Field(alias="slsaVersion")
    detail: Detail = Field(alias="vllmForge")

    @property
    def statements(self) -> set[str]:
        """Hashes of the statements that it relies on."""
        return {row.sha256 for row in self.inputs}


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A cell at a stage; ``digest``: ``sha256:<hex>`` of its image.

    None before it is built: then a receipt of any image of the cell may be the one that is needed.
    """

    project: Project
    cell: ImageCell
    stage: Stage
    policy: ReleasePolicy
    digest: str | None
    now: datetime
    waivers: tuple[Waiver, ...] = ()
    prewarm: str | None = None  # hash of the compiled kernels that the image carries

    @property
    def oldest(self) -> datetime | None:
        """Time before which a build or a receipt is too old for this stage."""
        days = self.policy.max_age_days
        return None if days is None else self.now - timedelta(days=days)

    def findings(self) -> list[ForgeError]:
        """All that the checkout lacks."""
        checks = (
            (True, _for_development),
            (self.policy.committed, _uncommitted),
            (self.policy.committed, _unlocked),
            (self.policy.proofs, _unproven),
            (self.policy.upstream, _regressed),
            (self.policy.kernels, _kernels_unknown),
            (True, _untested),
        )
        rows: list[ForgeError] = []
        for required, check in checks:
            try:
                rows += check(self) if required else ()
            except ForgeError as error:
                rows.append(error)
        return rows

    def require(self, findings: Sequence[ForgeError]) -> None:
        """Raise GateRefusedError with what is missing, if anything is."""
        if findings:
            rows = "".join(
                f"\n  - {row.what}\n    where:  {row.where}\n    remedy: {row.remedy}"
                for row in findings
            )
            number = len(findings)
            what = (
                f"{self.cell.name} is not ready for stage {self.stage}; missing ({number}):{rows}"
            )
            raise errors.GateRefusedError(
                what,
                where=f"matrix.toml, release.{self.stage}",
                remedy="supply what is missing; each has its own remedy",
            )

    def receipts(self) -> dict[str, Receipt]:
        """Tier -> the committed receipt of this image, signed and valid now."""
        rows = read_receipts(self.project, self.now, image=self.digest or "", signed=True).valid
        return {
            row.statement.detail.tier: row
            for row in rows
            if (row.statement.detail.sku, row.statement.detail.line)
            == (self.cell.sku_name, self.cell.line_name)
        }

    def report(self, findings: Sequence[ForgeError]) -> dict[str, Any]:
        """The JSON document of what is missing."""
        return {
            "cell": self.cell.name, "stage": self.stage, "digest": self.digest,
            "missing": [row.as_dict() for row in findings],
            "waivers": [row.model_dump(mode="json") for row in self.waivers],
        }  # fmt: skip


def make_decision(
    gate: Gate, tags: tuple[str, ...], time: datetime, evidence: Evidence, stack: dict[str, Any]
) -> Decision:
    """The decision on an image that passed: on all statements that count, but earlier decisions."""
    return Decision(
        verifier=Verifier(id=VERIFIER, version={"vllm-forge": vllm_forge.__version__}),
        timeVerified=time,
        resourceUri=resource(stack, str(gate.digest)),
        policy=policy_of_stage(gate.stage, gate.policy),
        inputAttestations=tuple(
            Resource(uri=name, digest={"sha256": row.sha256})
            for name in sorted(evidence.named.keys() - {DECISION})
            for row in evidence.signed(name)
        ),
        verificationResult="PASSED",
        verifiedLevels=(f"{LEVEL}{slsa_level(evidence.signers('provenance'))}",),
        slsaVersion=SLSA_VERSION,
        vllmForge=Detail(stage=gate.stage, tags=tags, waivers=gate.waivers),
    )


def resource(stack: dict[str, Any], digest: str) -> str:
    """Package URL of an image, as its SBOM has it: whatever registry it is in."""
    return f"pkg:oci/vllm-{stack['vllm_release']}-{stack['sku']}@{digest}?arch=amd64"


def policy_of_stage(stage: Stage, policy: ReleasePolicy) -> Resource:
    """A stage's row of matrix.toml, by its hash."""
    row = {stage: policy.model_dump(mode="json")}
    digest = hashlib.sha256(canonical(row)).hexdigest()
    return Resource(uri=f"matrix.toml#release.{stage}", digest={"sha256": digest})


def policy_of(project: Project, stage: Stage) -> ReleasePolicy:
    """The row of a stage; UnknownStageError if matrix.toml has none."""
    rows = project.matrix.release
    if stage not in rows:
        what = f"stage {stage} has no policy: matrix.toml has {', '.join(rows) or 'none'}"
        remedy = f"add a table [release.{stage}]"
        raise errors.UnknownStageError(what, where=project.root, remedy=remedy)
    return rows[stage]


def make_waivers(
    tiers: Sequence[str], until: date | None, reason: str | None, policy: ReleasePolicy
) -> tuple[Waiver, ...]:
    """Waivers of the command line: tiers, an end and a reason, or none of them."""
    if not (bool(tiers) == (until is not None) == (reason is not None)):
        what = "incomplete waiver: --waive, --until and --reason belong together"
        raise errors.WaiverError(what, remedy="give all three, or none")
    if until is None or reason is None:
        return ()
    for tier in tiers:
        if tier not in policy.tiers:
            what = f"invalid --waive {tier!r}: this stage does not require it"
            remedy = f"tiers: {', '.join(policy.tiers) or 'none'}"
            raise errors.WaiverError(what + suggestion(tier, policy.tiers), remedy=remedy)
    try:
        return tuple(Waiver(tier=tier, until=until, reason=reason) for tier in dict.fromkeys(tiers))
    except ValueError:
        what = "invalid --reason: expected 10 to 500 characters in one line"
        raise errors.WaiverError(what, remedy="say why, for whoever reads the release") from None


def _for_development(gate: Gate) -> Iterator[ForgeError]:
    if gate.stage == "release" and gate.cell.sku.development:
        yield errors.RequirementError(
            f"{gate.cell.sku_name} is a SKU for development, which is never released for",
            where=f"matrix.toml, sku.{gate.cell.sku_name}.development",
            remedy="stop at stage candidate",
        )


def _uncommitted(gate: Gate) -> Iterator[ForgeError]:
    commit, changed = head_commit(gate.project.root)
    if commit is None:
        what, remedy = "the checkout has no commit", "release from a git checkout with a commit"
    elif changed:
        names = ", ".join(shortened(changed, NAMED))
        what = f"the checkout differs from commit {commit[:12]}: {names}"
        remedy = "commit them, or remove them: git status"
    else:
        return
    yield errors.RequirementError(what, where=gate.project.root, remedy=remedy)


def _unlocked(gate: Gate) -> Iterator[ForgeError]:
    path, lock = prewarm_lock(gate.project.root, gate.cell)
    if gate.prewarm is not None and (lock is None or lock.sha256 != gate.prewarm):
        locked = f"the lock is of {lock.sha256[:12]}" if lock else "there is no lock"
        what = f"the compiled kernels {gate.prewarm[:12]} are not locked: {locked}"
        remedy = f"nox -s forge -- gpu prewarm {gate.cell.sku_name} FOLDER, and commit the lock"
        yield errors.RequirementError(what, where=path, remedy=remedy)


def _unproven(gate: Gate) -> Iterator[ForgeError]:
    name = gate.cell.line_name
    if fresh_record(gate.project, name) is None:
        what = f"the patches of line {name} are not proven on the present series, lock and tests"
        remedy = f"as root: nox -s prove -- --line {name}"
        yield errors.RequirementError(what, where=f"records/proofs/{name}.json", remedy=remedy)


def _regressed(gate: Gate) -> Iterator[ForgeError]:
    project, name, line = gate.project, gate.cell.line_name, gate.cell.line
    path = f"records/upstream/{name}.json"
    trees, files = project.read_json(path, lambda data: (data["trees"], dict(data["files"])))
    remedy = f"as root: nox -s forge -- patch upstream --line {name}"
    lock = read_tree_lock(project.root / line.series, name)
    if trees != {"published": lock.base, "patched": lock.result}:
        what = f"vLLM's own tests were not run on the present series of line {name}"
        yield errors.RequirementError(what, where=path, remedy=remedy)
    for file, counts in files.items():
        if lost := [outcome for outcome in counts if outcome.startswith("passed, then ")]:
            what = f"tests of {file} pass as published, not as patched: {lost[0]}"
            again = f"correct the patch, then {remedy}"
            yield errors.RequirementError(what, where=path, remedy=again)


def _kernels_unknown(gate: Gate) -> Iterator[ForgeError]:
    project, name, sku = gate.project, gate.cell.line_name, gate.cell.sku_name
    try:
        require_fresh(project, name)
    except ForgeError as error:
        yield error
    path = f"records/coverage/{name}.json"
    inputs, cells = project.read_json(
        path,
        lambda data: (
            (data["lock"], data["families"]),
            {family: row[sku] for family, row in data["coverage"].items()},
        ),
    )
    remedy = f"nox -s forge -- kernels coverage --record --line {name}"
    if inputs != (project.lock(name).digest, families_digest()):
        what = f"kernel coverage of line {name} was recorded of other packages"
        yield errors.RequirementError(what, where=path, remedy=remedy)
    for family, cell in cells.items():
        accepted = cell["needed_by"] is None or cell["exception"] is not None
        if not accepted and cell["verdict"] not in FINE:
            what = f"kernels of {family} are {cell['verdict']} on {sku}: {cell['detail']}"
            yield errors.RequirementError(what, where=path, remedy="use packages that have them")


def _untested(gate: Gate) -> Iterator[ForgeError]:
    """Tiers without a receipt of this digest that is signed, valid and recent, and not waived."""
    waivers = {row.tier: row for row in gate.waivers}
    missing = {tier: row for tier in gate.policy.tiers if (row := _receipt_fault(gate, tier))}
    for tier, finding in missing.items():
        if tier not in waivers:
            yield finding
        elif waivers[tier].expired(gate.now):
            what = f"the waiver of tier {tier} expired at the end of {waivers[tier].until}"
            remedy = "run the tier, or decide again with a later date"
            yield errors.RequirementError(what, where="--until", remedy=remedy)
    for tier in waivers.keys() - missing.keys() if gate.digest else ():
        what = f"the waiver of tier {tier} is not needed: its receipt is valid"
        remedy = "leave it out, so that nobody reads that the tier was not run"
        yield errors.RequirementError(what, where=f"--waive {tier}", remedy=remedy)


def _receipt_fault(gate: Gate, tier: str) -> ForgeError | None:
    cell, (sku, line) = gate.cell, (gate.cell.sku_name, gate.cell.line_name)
    if tier not in (known := read_suite(gate.project.root).tier):
        what = f"matrix.toml requires tier {tier!r}, which the suite does not have"
        raise RecordFileError(what + suggestion(tier, known), where=f"release.{gate.stage}.tiers")
    remedy = (
        f"on a host with that GPU: nox -s test-gpu -- --sku {sku} --line {line} --tier {tier} "
        f"--key KEY; or decide without it: --waive {tier} --until DATE --reason TEXT"
    )
    image = gate.digest or "an image that is not built here"
    where = f"records/receipts/{(gate.digest or 'sha256:<digest>')[7:]}/{sku}--{line}--{tier}.json"
    if (receipt := gate.receipts().get(tier)) is not None:
        finished = receipt.statement.detail.finished
        if gate.oldest is None or finished >= gate.oldest:
            return None
        what = (
            f"the receipt of tier {tier} is of {finished.date()}; stage {gate.stage} takes none "
            f"older than {gate.policy.max_age_days} days"
        )
        return errors.RequirementError(what, where=where, remedy=remedy)
    refused = read_receipts(gate.project, gate.now, image=gate.digest or "", signed=True).refused
    for path, error in refused:
        if path.name == Path(where).name:
            return error
    what = f"missing receipt of tier {tier} on {cell.sku.device} ({sku}) for {image}"
    return errors.RequirementError(what, where=where, remedy=remedy)
