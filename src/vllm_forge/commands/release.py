"""Release images, verify them, and what comes with them."""

import argparse
import os
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.commands import parsers
from vllm_forge.commands.build import ENGINES, as_namespace_root
from vllm_forge.commands.parsers import JSON, LINE, SKU, Commands, command, group, option
from vllm_forge.errors import UsageError
from vllm_forge.host import RecordingRunner, Runner, console, show
from vllm_forge.project import Project

if TYPE_CHECKING:
    from vllm_forge.release.evidence import Trust
    from vllm_forge.release.registry import Reference
    from vllm_forge.release.verify import Verification
    from vllm_forge.signing import Keyring, PrivateKey

STAGES = ("dev", "candidate", "release")
TARGET = "HOST/NAME:TAG or HOST/NAME@DIGEST of a registry, or the folder of an OCI layout"


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        what = f"invalid value {text!r}: expected a date, e.g. 2027-01-31"
        raise argparse.ArgumentTypeError(what) from None


def register(choices: Commands) -> None:
    ca = option("--ca", type=Path, metavar="FILE", help="PEM of a registry's own authority")
    identity = option("--identity", help="exact identity that signs, without a key")
    identity.add_argument("--issuer", help="exact issuer of that identity")
    trust = option(
        "--key", action="append", default=[], type=Path, metavar="FILE",
        help="public key (PEM) to trust, beside those of records/keys; repeatable",
    )  # fmt: skip
    stage = option("--stage", choices=STAGES, default="release", help="default: release")
    target = option("target", metavar="IMAGE", help=TARGET)

    one = command(choices, "release", release, SKU, LINE, JSON, ca, identity)
    one.add_argument("--stage", choices=STAGES, required=True, help="row [release.*] to meet")
    one.add_argument("--registry", metavar="HOST/NAME", help="without it, only say what is missing")
    one.add_argument("--key", type=Path, metavar="FILE", help="private key (PEM) that signs")
    one.add_argument(
        "--waive", action="append", default=[], metavar="TIER", help="release without its receipt"
    )
    one.add_argument("--until", type=_date, metavar="DATE", help="last day of the waiver")
    one.add_argument("--reason", metavar="TEXT", help="why, for who reads the release")
    one.add_argument("--engine", choices=ENGINES, help="default: the one that is installed")
    one.add_argument("--prewarm", type=Path, metavar="DIR", help="compiled kernels to carry")
    one.add_argument("--output", type=Path, help="folder for the OCI layout (default: dist)")
    one.add_argument("--dry-run", action="store_true", help="print the commands, do nothing")

    checked = (target, JSON, ca, identity, trust, stage)
    one = command(choices, "verify", verify, *checked, packaged=True)
    one.add_argument("--offline", action="store_true", help="use no network: IMAGE is a folder")
    one.add_argument("--deep", action="store_true", help="also hash all bytes of its layers")
    one.add_argument("--rebuild", action="store_true", help="also build its commit, and compare")
    one.add_argument("--osv", type=Path, metavar="FILE", help="OSV's PyPI/all.zip, to look up in")

    one = command(choices, "notes", notes, target, ca, identity, trust, stage, packaged=True)
    one.add_argument("--since", metavar="IMAGE", help="default: the release before")
    one = command(choices, "sbom", sbom, target, ca, identity, trust, packaged=True)
    one.set_defaults(stage="release")
    one.add_argument("--diff", metavar="IMAGE", help="print what changed since this one")
    one = command(choices, "mirror", mirror, target, ca, packaged=True)
    one.add_argument("to", metavar="TO", help="registry, or folder that will be made")

    receipts = group(choices, "receipts", help="sign receipts, and accept those of others")
    one = command(receipts, "sign", sign)
    one.add_argument("receipt", type=Path, help="committed file without a signature")
    one.add_argument("--key", type=Path, required=True, help="private key (PEM) that signs")
    one = command(receipts, "accept", accept, trust)
    one.add_argument("receipt", type=Path, help="signed file of whoever ran the suite")


def release(project: Project, args: argparse.Namespace) -> None:
    """Build, attest, push and verify an image, then name it."""
    from vllm_forge import images
    from vllm_forge.gputest.launch import prewarm_of
    from vllm_forge.release import gate as gates
    from vllm_forge.release import pipeline
    from vllm_forge.release.verify import describe

    cell, policy = project.cell(args.sku, args.line), gates.policy_of(project, args.stage)
    if args.key and not policy.statements:
        what = f"--key, and stage {args.stage} signs nothing"
        raise UsageError(what, remedy="leave it out, or choose another --stage")
    prewarm = args.prewarm and prewarm_of(project, cell, args.prewarm.resolve())
    gate = gates.Gate(
        project=project, cell=cell, stage=args.stage, policy=policy, now=datetime.now(UTC),
        digest=None, waivers=gates.make_waivers(args.waive, args.until, args.reason, policy),
        prewarm=None if prewarm is None else prewarm.digest,
    )  # fmt: skip
    dry = args.dry_run or args.registry is None
    engine = images.choose_engine(args.engine, dry_run=dry)
    plan = pipeline.plan_of(gate, args.output or project.root / "dist", engine, prewarm)
    if (image := plan.up_to_date()) is not None:
        gate = replace(gate, digest=f"sha256:{image.digest}")
    if args.registry is None:
        findings = gate.findings()
        if args.json:
            parsers.print_json(args, gate.report(findings))
        if policy.statements:
            console.print(
                f"judged by this checkout only; with --registry HOST/NAME, stage {args.stage} also "
                f"asks for: signed {', '.join(policy.statements)} (--key), independent builders: "
                f"{policy.builders}", markup=False,
            )  # fmt: skip
        gate.require(findings)
        console.print(f"{cell.name}: nothing is missing for stage {args.stage}, as far as known")
        return
    key, trust = _signer(project, args)
    if engine.name == "buildah" and os.geteuid() != 0 and not dry:
        as_namespace_root()
    job = pipeline.Job(
        gate=gate, plan=plan, reference=_repository(args.registry), key=key, trust=trust, ca=args.ca
    )
    runner = RecordingRunner() if dry else Runner()
    outcome = pipeline.release(job, runner)
    if outcome is not None:
        console.print(describe(outcome.report), markup=False)
        tags = list(outcome.names.all)
        parsers.print_json(
            args, {"image": str(job.reference), "digest": outcome.digest, "tags": tags}
        )


def verify(project: Project, args: argparse.Namespace) -> None:
    """Verify an image of a registry or a folder: bytes, statements, who signed them."""
    from vllm_forge.release.rebuild import rebuild
    from vllm_forge.release.verify import describe

    if args.offline and args.rebuild:
        raise UsageError("--rebuild downloads what is not in the cache", remedy="drop --offline")
    if args.rebuild:
        project.require_checkout("verify --rebuild")
    verification = _verification(project, args, args.target)
    report = verification.run(deep=args.deep, export=args.osv)
    if not args.rebuild:
        report.not_checked.append("that its commit gives this digest: --rebuild")
    elif not report.findings:  # the commit is of a statement that holds
        verification.evidence.require("provenance")
        provenance, published = verification.provenances[0], verification.published
        left = rebuild(project, published, provenance, Runner())
        report.rebuilt, report.not_checked = not left, report.not_checked + left
    if args.json:
        parsers.print_json(args, report.document())
    else:
        print(describe(report))
    for error in report.findings[1:]:
        console.print(f"{type(error).__name__}: {error}", markup=False)
    for error in report.findings[:1]:
        raise error


def notes(project: Project, args: argparse.Namespace) -> None:
    """Print the notes of a release, made of data only."""
    from vllm_forge.pages.notes import make_notes
    from vllm_forge.release.registry import Reference
    from vllm_forge.release.tags import previous_release

    verification = _verification(project, args, args.target)
    for error in verification.run().findings:
        raise error
    place = _place(args.target)
    before = args.since
    if not before and isinstance(place, Reference) and place.tag:
        tag = previous_release(place.tag)
        before = tag and str(replace(place, tag=tag, digest=None))
    earlier = _verification(project, args, before) if before else None
    if earlier is not None:
        earlier.run()  # what is wrong with it is for `verify` to say
    print(make_notes(project, verification, earlier))


def sbom(project: Project, args: argparse.Namespace) -> None:
    """Print the SBOM of an image, or how it differs from another."""
    from vllm_forge.release.sbom import diff

    def read(text: str) -> dict[str, Any]:
        evidence = _verification(project, args, text).gather()
        return evidence.only("sbom").statement.predicate

    if args.diff:
        print("\n".join(diff(read(args.diff), read(args.target))) or "no differences")
    else:
        parsers.print_json(args, read(args.target))


def mirror(_: Project, args: argparse.Namespace) -> None:
    """Copy an image with all that is attached to it, to a registry or a folder."""
    from vllm_forge.release.mirror import mirror as copy

    show(copy(_place(args.target), _place(args.to), Runner(), ca=args.ca))


def sign(project: Project, args: argparse.Namespace) -> None:
    """Sign a receipt that was written without a key, after verifying it."""
    from vllm_forge.receipts.handover import sign_receipt
    from vllm_forge.signing import load_private

    show(sign_receipt(project, args.receipt, load_private(args.key)))


def accept(project: Project, args: argparse.Namespace) -> None:
    """Verify a signed receipt of others, and put it among the committed ones."""
    from vllm_forge.receipts.handover import accept_receipt

    receipt = accept_receipt(project, args.receipt, _keyring(project, args.key))
    show(receipt.path.relative_to(project.root))


def _keyring(project: Project, paths: list[Path]) -> "Keyring":
    from vllm_forge.signing import read_keyring

    keys = read_keyring(project.root)
    for path in paths:
        keys = keys.including(path)
    return keys


def _trust(project: Project, args: argparse.Namespace, public: list[Path]) -> "Trust":
    from vllm_forge.release.evidence import Trust

    if (args.identity is None) != (args.issuer is None):
        raise UsageError("--identity and --issuer belong together", remedy="give both, or neither")
    identity = None if args.identity is None else (args.identity, args.issuer)
    return Trust(keys=_keyring(project, public), identity=identity)


def _signer(project: Project, args: argparse.Namespace) -> "tuple[PrivateKey | None, Trust]":
    """The key that signs, if there is one; and who is trusted when all is read back."""
    from vllm_forge.signing import Keyring, load_private

    trust = _trust(project, args, [])
    if args.key is None:
        return None, trust
    key = load_private(args.key)
    if trust.keys.find(keyid=key.public.id) is None:
        what = f"{args.key} is not in records/keys: others must name its public half, --key"
        console.print(what, markup=False)
        trust = replace(trust, keys=Keyring(keys=(key.public, *trust.keys.keys)))
    return key, trust


def _repository(text: str) -> "Reference":
    from vllm_forge.release.registry import Reference

    reference = Reference.parse(text)
    if reference.tag or reference.digest:
        what = f"invalid --registry {reference}: the release chooses the tag"
        raise UsageError(what, remedy="give HOST/NAME only")
    return reference


def _place(text: str) -> "Reference | Path":
    from vllm_forge.release.registry import Reference

    path = Path(text)
    is_folder = path.is_dir() or text.startswith((".", "/")) or "/" not in text
    return path if is_folder else Reference.parse(text)


def _verification(project: Project, args: argparse.Namespace, text: str) -> "Verification":
    from vllm_forge.release import gate, published, verify

    trust, place = _trust(project, args, args.key), _place(text)
    if getattr(args, "offline", False) and not isinstance(place, Path):
        what, remedy = "--offline, and the image is in a registry", "give the folder of a mirror"
        raise UsageError(what, where=place, remedy=remedy)
    if isinstance(place, Path):
        image = published.from_layout(place)
    else:
        image = published.from_registry(place, args.ca)
    return verify.Verification(
        published=image, policy=gate.policy_of(project, args.stage), stage=args.stage, trust=trust,
        now=datetime.now(UTC),
    )  # fmt: skip
