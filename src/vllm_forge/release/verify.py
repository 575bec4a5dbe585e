"""What a stranger can know of an image: by its bytes, its statements, and who signed them.

Everything that a stage requires must be there and hold; what was not checked is said.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from vllm_forge.errors import ForgeError, problems, shortened
from vllm_forge.host import canonical, printable
from vllm_forge.images.content import labels
from vllm_forge.images.record import differences
from vllm_forge.matrix.model import ReleasePolicy, Stage
from vllm_forge.receipts.receipt import Statement as Receipt
from vllm_forge.receipts.receipt import closest_margin, contradictions
from vllm_forge.release import errors
from vllm_forge.release.evidence import DECISION, RECEIPT, Evidence, Trust, gather, slsa_level
from vllm_forge.release.gate import LEVEL, Decision, Waiver, policy_of_stage, resource
from vllm_forge.release.published import UNREADABLE, Published, read_stack, work_folder
from vllm_forge.release.sbom import compare_contents, find, packages_of
from vllm_forge.release.statements import BUILDER, Provenance
from vllm_forge.signing import Verified

SHOWN = 5  # differences
COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
AHEAD = timedelta(minutes=5)  # that the clock of a signer may be
Model = TypeVar("Model", Decision, Provenance, Receipt)


@dataclass(kw_only=True)
class Report:
    """What is known of an image; ``findings``: what is missing or wrong."""

    where: str
    digest: str
    stage: Stage
    image: dict[str, str] = field(default_factory=dict)
    builders: list[dict[str, str]] = field(default_factory=list)
    packages: dict[str, int] = field(default_factory=dict)
    receipts: list[dict[str, Any]] = field(default_factory=list)
    decision: dict[str, Any] = field(default_factory=dict)
    vulnerabilities: list[dict[str, Any]] = field(default_factory=list)
    rebuilt: bool = False
    findings: list[ForgeError] = field(default_factory=list)
    not_counted: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        rows = {**vars(self), "findings": [row.as_dict() for row in self.findings]}
        return {"verified": not self.findings, **rows}


@dataclass(kw_only=True)
class Verification:
    """One image at one stage.

    ``waivers``: of the decision that is about to be made; None: it was made, and is attached.
    """

    published: Published
    policy: ReleasePolicy
    stage: Stage
    trust: Trust
    now: datetime
    waivers: tuple[Waiver, ...] | None = None
    stack: dict[str, Any] = field(default_factory=dict)
    provenances: list[Provenance] = field(default_factory=list)
    decided: Decision | None = None

    def run(self, *, deep: bool = False, export: Path | None = None) -> Report:
        """All checks; without a stack.json none of those that compare with it.

        ``export``: of OSV, in which the packages of the SBOM are looked up.
        """
        published, self.evidence = self.published, self.gather()
        self.report = Report(where=published.where, digest=published.digest, stage=self.stage)
        self._try(self._image)
        checks: list[Callable[[], None]] = []
        if self.waivers is None and self.policy.statements:
            checks.append(self._decision)
        for name, check in {"sbom": self._sbom, "provenance": self._builders}.items():
            if name in self.policy.statements or self.evidence.named.get(name):
                checks.append(check)
            else:
                self.report.not_checked.append(f"{name}: none is attached, none is required")
        checks += [partial(self._receipt, tier) for tier in self.policy.tiers]
        checks += [partial(self.evidence.require, "vex")] if "vex" in self.policy.statements else []
        checks += [self._bytes] if deep else []
        for check in checks if self.stack else ():
            self._try(check)
        if export is not None and self.report.packages:
            self._known(export)
        else:
            why = "--osv" if export is None else "there is no SBOM that holds"
            self.report.not_checked.append(f"known vulnerabilities: {why}")
        self._notes(deep=deep)
        return self.report

    def gather(self) -> Evidence:
        """The statements whose signatures hold."""
        return gather(self.published.attached, self.published.digest, self.trust, self.now)

    def _try(self, check: Callable[[], None]) -> None:
        try:
            check()
        except ForgeError as error:
            self.report.findings.append(error)

    def _image(self) -> None:
        """Read stack.json; the labels must be those that the build makes of it."""
        self.stack = read_stack(self.published)
        expected = labels(self.stack, self.published.image.config["created"])
        self._same("its labels are not those of its stack.json", expected, self.published.labels)
        keys = ("sku", "arch", "line", "vllm", "tree")
        self.report.image = {key: str(self.stack[key]) for key in keys}

    def _same(self, what: str, expected: dict[str, Any], actual: dict[str, Any]) -> None:
        rows = differences(expected, actual) if expected != actual else ()
        if rows:
            text = f"{what}: {printable('; '.join(shortened(rows, SHOWN)))}"
            remedy = "do not use it: what is signed and what is in the image differ"
            raise errors.ImageContentError(text, where=self.published.where, remedy=remedy)

    def _about(self, what: str, **stated: str) -> None:
        """Compare what a statement says of the image with its stack.json."""
        facts = self.stack | {"lock": self.stack["lock"]["sha256"]}
        self._same(f"its {what} is of another image", {k: facts[k] for k in stated}, stated)

    def _sbom(self) -> None:
        python, debian = packages_of(self.evidence.only("sbom").statement.predicate)
        for what, key, packages in (("Python", "packages", python), ("Debian", "debian", debian)):
            self._same(f"its sbom has other {what} packages", self.stack[key], packages)
            self.report.packages[what] = len(packages)

    def _bytes(self) -> None:
        """Hash all layers, and compare the packages in them with the SBOM."""
        with work_folder() as work:
            layers = self.published.fetch(self.published.image.layers, work)
            if self.evidence.named.get("sbom"):
                document = self.evidence.only("sbom").statement.predicate
                try:
                    rows = compare_contents(document, [layer.blob for layer in layers])
                except UNREADABLE as error:
                    rows = [f"cannot read them: {type(error).__name__}: {error}"]
                self._same("its files are not those of its sbom", {}, dict.fromkeys(rows, ""))

    def _known(self, export: Path) -> None:
        """Known vulnerabilities, of which none is a finding; OsvError."""
        known, left = find(self.evidence.only("sbom").statement.predicate, export)
        self.report.vulnerabilities = [row._asdict() for row in known]
        self.report.not_checked += [f"known vulnerabilities of {row}" for row in left]

    def _builders(self) -> None:
        """Independent builders have other ids, signers and machines."""
        self.evidence.require("provenance")
        seen: dict[tuple[str, str, str], bytes] = {}
        for content, rows in self.evidence.named["provenance"].items():
            for row in rows:
                provenance = self._provenance(row)
                machine = provenance.run.builder.machine or row.signer
                builder = (provenance.run.builder.id, row.signer, machine)
                if seen.setdefault(builder, content) != content:
                    what = f"two different statements of provenance by {row.signer}, of one builder"
                    remedy = "find out which is right, and delete the other"
                    raise errors.StatementDuplicateError(what, where=builder[0], remedy=remedy)
        count = min(len(set(column)) for column in zip(*seen, strict=True))
        if count < self.policy.builders:
            signers = ", ".join(signer for _, signer, _ in seen)
            raise errors.StatementMissingError(
                f"provenance of {self.policy.builders} independent builders is required, and "
                f"{count} signed it: {signers}",
                remedy="build the commit on another machine, and attach its provenance there with "
                "another key: nox -s release -- SKU --stage candidate --key OTHER",
            )

    def _provenance(self, row: Verified) -> Provenance:
        """Of this image; unknown parameters are refused."""
        made = parse(Provenance, "provenance", row)
        builder = f"{BUILDER}/{row.key_id}" if row.key_id else row.signer.partition(" (")[0]
        if made.run.builder.id != builder or not COMMIT.fullmatch(made.commit):
            named = f"builder {made.run.builder.id}, commit {made.commit!r}"
            what = f"provenance: {named}, signed by {builder}"
            remedy = "a builder signs for itself, and names a commit: ask who signed it"
            raise errors.StatementContentError(what, remedy=remedy)
        self._about(
            "provenance",
            sku=made.definition.external.sku,
            line=made.definition.external.line,
            tree=made.tree,
        )
        self.provenances.append(made)
        self.report.builders.append(
            {
                "builder": made.run.builder.id, "signer": row.signer, "source": made.source,
                "commit": made.commit, "finished": made.run.metadata.finished.isoformat(),
                "level": str(slsa_level([row])),
            }
        )  # fmt: skip
        self._require_recent("the build", made.run.metadata.finished)
        return made

    def _receipt(self, tier: str) -> None:
        """The newest receipt of a tier that the decision relies on; else its waiver."""
        name, decided = f"{RECEIPT}-{tier}", self.decided
        waivers = decided.detail.waivers if decided else self.waivers or ()
        waiver = next((row for row in waivers if row.tier == tier), None)
        rows = [
            (parse(Receipt, name, row), row.signer)
            for row in self.evidence.signed(name)
            if decided is None or row.sha256 in decided.statements
        ]
        if not rows and waiver is not None:
            if waiver.expired(self.now):
                what = f"released without tier {tier}, by a waiver that expired: {waiver.until}"
                remedy = "ask for a release with a receipt of this tier"
                raise errors.StatementExpiredError(what, remedy=remedy)
            return
        if not rows:
            self.evidence.require(name)
            what = f"{name}: the decision does not rely on the one that is attached"
            raise errors.DecisionError(what, remedy="release it again, with this receipt")
        receipt, signer = max(rows, key=lambda row: row[0].detail.finished)
        detail, gpu = receipt.detail, receipt.detail.gpus[0]
        self._about(
            f"receipt of tier {tier}", sku=detail.sku, line=detail.line, tree=receipt.tree,
            lock=detail.lock_sha256,
            compute_capability=", ".join(sorted({row.compute_capability for row in detail.gpus})),
        )  # fmt: skip
        self.report.receipts.append(
            {
                "tier": tier, "gpu": gpu.name, "count": len(detail.gpus), "driver": gpu.driver,
                "tests": len(receipt.predicate.passed), "margin": closest_margin(detail),
                "finished": detail.finished.isoformat(), "expires": detail.expires.isoformat(),
                "signer": signer,
            }
        )  # fmt: skip
        for what in contradictions(receipt):
            remedy = "no run gives this: ask who signed it, and release it with a receipt of a run"
            raise errors.StatementContentError(f"{name}: {what}", remedy=remedy)
        if self.now >= detail.expires:
            what = f"{name}: expired on {detail.expires.date()}"
            remedy = "ask for a release with a newer receipt"
            raise errors.StatementExpiredError(what, remedy=remedy)
        self._require_recent(f"tier {tier}", detail.finished)

    def _decision(self) -> None:
        """The newest decision of the stage, the tag that it gives, and what it relies on."""
        self.evidence.require(DECISION)
        decisions = [
            (parse(Decision, DECISION, row), row) for row in self.evidence.signed(DECISION)
        ]
        rows = [row for row in decisions if row[0].detail.stage == self.stage]
        if not rows:
            stages = ", ".join(sorted({row.detail.stage for row, _ in decisions}))
            what = f"no decision releases it as {self.stage}; there is one for: {stages}"
            raise errors.DecisionError(what, remedy=f"to accept that, add --stage {stages}")
        decision, verified = max(rows, key=lambda row: row[0].time)
        if sum(row.time == decision.time for row, _ in rows) > 1:
            what = f"two different decisions of {decision.time}, signed by {verified.signer}"
            raise errors.StatementDuplicateError(what, remedy="release it again")
        if decision.time > self.now + AHEAD:
            what = f"the decision is of {decision.time}, and it is {self.now} here"
            raise errors.StatementExpiredError(what, remedy="check the clock of this host")
        self.decided, detail = decision, decision.detail
        self.report.decision = {
            "signer": verified.signer, "time": decision.time.isoformat(),
            "tags": list(detail.tags), "levels": list(decision.levels),
            "policy": decision.policy.sha256,
            "waivers": [row.model_dump(mode="json") for row in detail.waivers],
        }  # fmt: skip
        for what in self._contradictions(decision):
            text, where = f"decision: {what}", self.published.where
            remedy = "do not use this image under this name; ask who released it"
            raise errors.DecisionError(text, where=where, remedy=remedy)

    def _contradictions(self, decision: Decision) -> Iterator[str]:
        present = {
            rows[0].sha256: name
            for name, statements in self.evidence.named.items()
            for rows in statements.values()
        }
        for row in decision.inputs:
            if present.get(row.sha256) != row.uri:
                yield f"it relies on a {row.uri} of {row.sha256}, which is not attached"
        names = {row.uri for row in decision.inputs}
        waived = {f"{RECEIPT}-{row.tier}" for row in decision.detail.waivers}
        tiers = {f"{RECEIPT}-{tier}" for tier in self.policy.tiers}
        for name in sorted({*self.policy.statements, *tiers} - names - waived):
            yield f"it does not rely on any {name}"
        if decision.resource != resource(self.stack, self.published.digest):
            yield f"it is about {decision.resource}"
        signers = self.evidence.signers("provenance")
        level = slsa_level([row for row in signers if row.sha256 in decision.statements])
        proven = {f"{LEVEL}{number}" for number in range(level + 1)}
        if claimed := sorted(set(decision.levels) - proven):
            yield f"it claims {claimed[0]}; the signatures of its provenance prove level {level}"
        tag = self.published.tag
        if tag is not None and tag not in decision.detail.tags:
            yield f"tag {tag} is not of this image, which is {', '.join(decision.detail.tags)}"

    def _require_recent(self, what: str, finished: datetime) -> None:
        """Not in the future, and when it was decided not older than the policy allows."""
        time = self.decided.time if self.decided else self.now
        days = self.policy.max_age_days
        if finished > self.now + AHEAD:
            text = f"{what} ended at {finished}, and it is {self.now} here"
            raise errors.StatementExpiredError(text, remedy="check the clock of this host")
        if days is not None and finished < time - timedelta(days=days):
            text = f"{what} is of {finished.date()}, more than {days} days before the decision"
            raise errors.StatementExpiredError(text, remedy="build and test it again")

    def _notes(self, *, deep: bool) -> None:
        report, decided = self.report, self.decided
        report.not_counted = [str(row).replace("\n", ";") for _, row in self.evidence.refused]
        report.not_counted += [f"unknown predicate type: {row}" for row in self.evidence.unrelated]
        if not self.policy.statements:
            report.not_checked.append(f"who made it: stage {self.stage} requires no signature")
        if not deep:
            report.not_checked.append("bytes of the layers: --deep")
        current = policy_of_stage(self.stage, self.policy)
        if decided is not None and decided.policy != current:
            report.not_checked.append(
                f"the policy of the decision, sha256:{decided.policy.sha256}: this vllm-forge "
                f"has, and applied, sha256:{current.sha256}"
            )


def parse(model: type[Model], name: str, row: Verified) -> Model:
    """The predicate, or the receipt, of a verified statement; unknown fields are refused."""
    try:
        content = row.content if model is Receipt else canonical(row.statement.predicate)
        return model.model_validate_json(content, strict=True)
    except ValidationError as error:
        what = f"{name}: signed by {row.signer}: {problems(error, model)[0]}"
        remedy = "an unknown field may change what is meant: verify with a newer vllm-forge"
        raise errors.StatementContentError(what, remedy=remedy) from None


def describe(report: Report) -> str:
    """The report as text."""
    image, decision = report.image, report.decision
    rows = [("image", report.where)]
    if image:
        text = "vLLM {vllm} for {sku} ({arch}), line {line}, source tree {tree}"
        rows.append(("is", text.format(**image)))
    counts = ", ".join(f"{count} {what} packages" for what, count in report.packages.items())
    rows += [("contains", f"{counts}: as stack.json says")] if counts else []
    for row in report.builders:
        source = f" of {row['source']}" if row["source"] else ""
        text = f"{row['builder']}, commit {row['commit']}{source}, signed by {row['signer']}"
        rows.append(("built by", f"{text}, SLSA build level {row['level']}"))
    for row in report.receipts:
        text = "tier {tier}: {tests} tests on {count} x {gpu}, driver {driver}, until {expires}, "
        rows.append(("proven", (text + "signed by {signer}").format(**row)))
    if decision:
        tags, levels = ", ".join(decision["tags"]), ", ".join(decision["levels"])
        rows.append(("decided", f"{report.stage} {tags}, {decision['time']}, {levels}, signed by "
                                f"{decision['signer']}"))  # fmt: skip
        for waiver in decision["waivers"]:
            text = "released without tier {tier}, until {until}: {reason}"
            rows.append(("waived", text.format(**waiver)))
    for row in report.vulnerabilities:
        fixed = f"fixed in {', '.join(row['fixed'])}" if row["fixed"] else "no fixed version known"
        what = f"{row['package']} {row['version']}: {', '.join(row['ids'])}, {fixed}"
        rows.append(("vulnerable", what))
    rows += [("rebuilt", "its commit gives this digest here")] if report.rebuilt else []
    rows += [("ignored", text) for text in report.not_counted]
    rows += [("not checked", text) for text in report.not_checked]
    verdict = "refused" if report.findings else f"holds for stage {report.stage}"
    lines = [f"{name:<12} {printable(text)}" for name, text in [*rows, ("verdict", verdict)]]
    return "\n".join(lines)
