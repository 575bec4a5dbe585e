"""From a cell to a name: build, push by digest, attach, read back, verify, decide, name.

A name is given last, to an image that was read from the registry and passed. Each step leaves what
it did in the registry and does it only if it is not there: whatever ends a release, running the
command again goes on where it stopped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from vllm_forge import images
from vllm_forge.errors import ForgeError
from vllm_forge.host import RecordingRunner, Runner
from vllm_forge.images.engines import Engine
from vllm_forge.images.errors import BuildRecordError
from vllm_forge.images.prewarm import Prewarm
from vllm_forge.images.record import read_record
from vllm_forge.images.rootfs import LOCKED, ROOTFS
from vllm_forge.release import statements
from vllm_forge.release.errors import RequirementError
from vllm_forge.release.evidence import KINDS, RECEIPT, Evidence, Trust
from vllm_forge.release.gate import Gate, make_decision
from vllm_forge.release.mirror import push_layout
from vllm_forge.release.published import from_registry
from vllm_forge.release.referrers import attach
from vllm_forge.release.registry import Reference, Repository
from vllm_forge.release.tags import Names, choose_names, forms, require_free
from vllm_forge.release.verify import Report, Verification
from vllm_forge.signing import PrivateKey, Role, Verified, sign
from vllm_forge.signing.bundle import Statement, sign_keyless


@dataclass(frozen=True, kw_only=True)
class Job:
    """A release: ``gate`` has cell, stage, policy and waivers; ``reference`` has no tag.

    ``key``: None to sign as the ambient identity that ``trust`` names, or not at all.
    """

    gate: Gate
    plan: images.ImagePlan
    reference: Reference
    trust: Trust
    key: PrivateKey | None = None
    ca: Path | None = None
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)

    def findings(self) -> list[ForgeError]:
        """Why nothing that this job signs would count, before anything is built."""
        if not self.gate.policy.statements:
            return []
        if self.key is None and self.trust.identity is None:
            what = "no key signs the statements that this stage requires"
            remedy = "give a private key with --key, or --identity and --issuer of this host"
            return [RequirementError(what, where="--key", remedy=remedy)]
        fault = self.fault(None) or (self.fault("builder") and self.fault("release"))
        return [] if fault is None else [fault]

    def fault(self, role: Role | None) -> ForgeError | None:
        """Why the key may not sign for a role now (None: for any)."""
        try:
            if self.key and (row := self.trust.keys.find(keyid=self.key.public.id)):
                row.require(role, self.clock(), "--key")
        except ForgeError as error:
            return error
        return None

    def sign(self, statement: Statement) -> bytes:
        """A bundle, signed with the key, which must have the role, or as this host's identity."""
        if fault := self.fault(KINDS[statement.predicate_type][1]):
            raise fault
        if self.key is not None:
            return sign(statement.content, self.key)
        return sign_keyless(statement.content)

    def signed(self, row: Verified) -> bool:
        """Whether this job's signer signed it."""
        return row.key_id == ("" if self.key is None else self.key.public.id)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished release."""

    digest: str
    names: Names
    report: Report


def release(job: Job, runner: Runner) -> Outcome | None:
    """Release a cell; None for a dry run.

    Raises:
        GateRefusedError: something is missing, and nothing was named.
        TagTakenError: another image got the name meanwhile.
    """
    gate, policy = job.gate, job.gate.policy
    gate.require([*job.findings(), *gate.findings()])
    cell, plan, dry = gate.cell, job.plan, isinstance(runner, RecordingRunner)
    with runner.exclusive(f"release-{cell.name}"):
        if dry:
            words = [f"--line={cell.line_name}", f"--base={plan.options.base}"]
            words += [f"--engine={plan.engine.name}", f"--output={plan.options.output}"]
            words += ["--kernels"] if plan.options.kernels else []
            if (prewarm := plan.options.prewarm) is not None:
                words.append(f"--prewarm={prewarm.folder}")
            runner.run(["nox", "-s", "forge", "--", "build", cell.sku_name, *words])
        built = runner.act("hash every blob of the image", lambda: _build(job, runner))
        digest = "sha256:DIGEST" if dry else str(built().digest)
        push_layout(runner, plan.target, job.reference, digest, ca=job.ca)
        runner.act(
            f"sign and attach: {', '.join(policy.statements) or 'nothing'}",
            lambda: _attach(job, built()),
        )
        checked = runner.act(
            f"read all of it from {job.reference}, and verify what stage {gate.stage} requires",
            lambda: _check(job, built(), decided=False),
        )
        decided = runner.act(
            "choose the tags; sign and attach the decision; read and verify all again",
            lambda: _decide(job, built(), checked()),
        )
        outcome = runner.act(
            f"let the tags name the image: {', '.join(forms(cell, gate.stage))}",
            lambda: _name(job, *decided()),
        )
        return None if dry else outcome()


def plan_of(
    gate: Gate, output: Path, engine: Engine, prewarm: Prewarm | None = None
) -> images.ImagePlan:
    """How the image of a cell is built at a stage, to a folder: in the variant of its policy."""
    policy = gate.policy
    options = images.BuildOptions(
        output=output, base=LOCKED if policy.committed else ROOTFS, prewarm=prewarm,
        kernels=policy.archives == "carried",
    )  # fmt: skip
    return images.resolve(gate.project, gate.cell, options, engine)


def _build(job: Job, runner: Runner) -> Gate:
    """Build the image unless it is there, hash its blobs, and judge the checkout for its digest."""
    image, _ = images.build_image(job.plan, runner)
    images.verify(image, unpacked=True)  # a registry takes layers that no engine could unpack
    gate = replace(job.gate, digest=f"sha256:{image.digest}", now=job.clock())
    gate.require(gate.findings())
    return gate


def _attach(job: Job, gate: Gate) -> None:
    """Attach what is not attached yet; statements that trusted signers attached are kept."""
    if not gate.policy.statements:
        return
    repository = Repository(job.reference, ca=job.ca)
    evidence = _verification(job, gate, decided=False).gather()
    subject = repository.manifest(str(gate.digest))
    for predicate_type, bundle in _bundles(job, gate, evidence):
        attach(repository, subject, bundle, predicate_type)


def _bundles(job: Job, gate: Gate, evidence: Evidence) -> Iterator[tuple[str, bytes]]:
    """Predicate type and bundle of what an image lacks."""
    from vllm_forge.release.components import make_sbom  # noqa: PLC0415 - loads cyclonedx

    image = images.read_image(job.plan.target)
    if (record := read_record(job.plan.record_path)) is None:
        what, remedy = "the record of the build is gone", "run the same command again"
        raise BuildRecordError(what, where=job.plan.record_path, remedy=remedy)
    if not evidence.signed("sbom"):
        document = make_sbom(gate.project, gate.cell, image, record)
        sbom = statements.image_statement(gate.cell, image, statements.SBOM, document)
        yield sbom.predicate_type, job.sign(sbom)
    built = evidence.signers("provenance")
    if not any(map(job.signed, built)) and not (built and job.fault("builder")):
        statement = statements.make_provenance(gate.project, gate.cell, image, record, job.key)
        yield statement.predicate_type, job.sign(statement)
    for tier, receipt in gate.receipts().items():
        if receipt.statement.content not in evidence.named.get(f"{RECEIPT}-{tier}", {}):
            yield statements.TEST_RESULT, statements.receipt_bundle(receipt)
    vex = statements.make_vex(gate.project, gate.cell, image, record)
    if vex is not None and vex.content not in evidence.named.get("vex", {}):
        yield vex.predicate_type, job.sign(vex)


def _verification(job: Job, gate: Gate, *, decided: bool) -> Verification:
    """Of what the registry has: nothing of it is taken from this host."""
    published = from_registry(job.reference.at(str(gate.digest)), job.ca)
    return Verification(
        published=published, policy=gate.policy, stage=gate.stage, trust=job.trust,
        now=job.clock(), waivers=None if decided else gate.waivers,
    )  # fmt: skip


def _check(job: Job, gate: Gate, *, decided: bool) -> Verification:
    verification = _verification(job, gate, decided=decided)
    gate.require(verification.run().findings)
    return verification


def _decide(job: Job, gate: Gate, checked: Verification) -> tuple[Gate, Names, Report]:
    """Attach a decision, unless one that holds gives these names; verify as a stranger does."""
    digest, repository = str(gate.digest), Repository(job.reference, ca=job.ca)
    names = choose_names(gate.cell, gate.stage, digest, repository.tags(), repository.resolve)
    if names.fixed:
        require_free(names.fixed, digest, repository.resolve(names.fixed))
    if not gate.policy.statements:
        return gate, names, checked.report
    current = _verification(job, gate, decided=True)
    report, decided = current.run(), current.decided
    if (
        decided is not None
        and not report.findings
        and decided.detail.waivers == gate.waivers
        and set(names.all) <= set(decided.detail.tags)
    ):
        return gate, names, report
    decision = make_decision(gate, names.all, job.clock(), checked.evidence, checked.stack)
    image = images.read_image(job.plan.target)
    predicate = decision.model_dump(mode="json", by_alias=True)
    statement = statements.image_statement(gate.cell, image, statements.VSA, predicate)
    subject = repository.manifest(digest)
    attach(repository, subject, job.sign(statement), statement.predicate_type)
    return gate, names, _check(job, gate, decided=True).report


def _name(job: Job, gate: Gate, names: Names, report: Report) -> Outcome:
    """Set the tags, each unless it is set; the one that moves is the last."""
    digest, repository = str(gate.digest), Repository(job.reference, ca=job.ca)
    for tag in names.all:
        current = repository.resolve(tag)
        if tag == names.fixed:
            require_free(tag, digest, current)
        if current != digest:
            repository.set_tag(tag, digest)  # and reads it back
    return Outcome(digest=digest, names=names, report=report)
