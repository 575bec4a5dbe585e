"""in-toto statements of a release: what is signed about an image.

``builder.id`` of a provenance claims no more than its signature does. With a key it is the key: the
owner says that they built the image (SLSA build level 1). In a job of GitHub Actions that signs as
itself it is the workflow, as its certificate has it: level 2 if the certificate says that GitHub
runs the runner, else 1. Nothing here claims level 3.

OpenVEX, what known vulnerabilities mean for an image, is made of hand-kept ``records/vex.toml``.
Its rows name packages by purl, which must be in the image's SBOM as they are written: a row that
outlived its package says nothing, and is refused.

Sources: github.com/in-toto/attestation, spec/v1/statement.md; slsa.dev/spec/v1.2/build-provenance;
github.com/openvex/spec, OPENVEX-SPEC.md v0.2.0.
"""

import hmac
import os
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, Field, model_validator

import vllm_forge
from vllm_forge.host import git, head_commit, read_data
from vllm_forge.host.files import file_digest
from vllm_forge.images.layout import Image
from vllm_forge.images.rootfs import CURRENT, LOCKED
from vllm_forge.matrix import FrozenModel, ImageCell
from vllm_forge.patches import read_series, read_tree_lock
from vllm_forge.project import Project
from vllm_forge.receipts.errors import ReceiptKeyError
from vllm_forge.receipts.receipt import Receipt
from vllm_forge.release.errors import ProvenanceError, VexError
from vllm_forge.release.sbom import Document, locked_debs, require_own_image
from vllm_forge.signing import PrivateKey, wrap
from vllm_forge.signing.bundle import Statement, Subject

SBOM = "https://cyclonedx.org/bom"
PROVENANCE = "https://slsa.dev/provenance/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
VEX = "https://openvex.dev/ns/v0.2.0"
VSA = "https://slsa.dev/verification_summary/v1"

BUILD_TYPE = "https://vllm-forge.dev/build/image/v1"
BUILDER = "https://vllm-forge.dev/builder/key"
FORGE, SOURCE, PATCHED = "vllm-forge", "vllm source", "vllm source, patched"
VEX_FILE = "records/vex.toml"
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f]+$", max_length=1000)]
MACHINE_ID = Path("/etc/machine-id")
SCP = re.compile(r"^(?:[^@/]+@)?(?P<host>[^:/]+):(?P<path>[^/].*)$")  # git@host:path
URL = re.compile(r"^(?P<scheme>https?|ssh|git)://(?:[^@/]*@)?(?P<rest>[^/].*)$")


def image_statement(
    cell: ImageCell, image: Image, kind: str, predicate: dict[str, Any]
) -> Statement:
    """A statement about an image, by its manifest."""
    subject = Subject(name=cell.name, digest={"sha256": image.digest})
    return Statement(subject=(subject,), predicate_type=kind, predicate=predicate)


class BuildOptions(FrozenModel):
    """Options of ``build``. ``prewarm``: hash of the set, which is not in the repository."""

    base: str
    engine: str
    prewarm: str | None = None
    kernels: bool = False


class External(FrozenModel):
    """externalParameters: all that whoever started the build chose."""

    sku: str
    line: str
    options: BuildOptions


class Dependency(FrozenModel):
    name: str
    digest: dict[str, str] = Field(min_length=1)
    uri: str | None = None


class Definition(FrozenModel):
    build_type: Literal["https://vllm-forge.dev/build/image/v1"] = Field(alias="buildType")
    external: External = Field(alias="externalParameters")
    dependencies: tuple[Dependency, ...] = Field(alias="resolvedDependencies")


class Builder(FrozenModel):
    """``machine``: keyed hash of the host's id, to distinguish the hosts of two builds."""

    id: str
    version: dict[str, str]
    machine: str | None = Field(alias="vllmForge_machine", default=None)


class Metadata(FrozenModel):
    """``finished``: when the newest layer was written."""

    finished: AwareDatetime = Field(alias="finishedOn")


class Run(FrozenModel):
    builder: Builder
    metadata: Metadata


class Provenance(FrozenModel):
    """The predicate of SLSA provenance v1; unknown fields, parameters among them, are refused."""

    definition: Definition = Field(alias="buildDefinition")
    run: Run = Field(alias="runDetails")

    @property
    def commit(self) -> str:
        """Of this repository, hex."""
        return self._named(FORGE).digest.get("gitCommit", "")

    @property
    def source(self) -> str:
        """URI of this repository, empty where the builder's checkout names none."""
        return self._named(FORGE).uri or ""

    @property
    def tree(self) -> str:
        """Git tree of the patched vLLM, hex."""
        return self._named(PATCHED).digest.get("gitTree", "")

    def _named(self, name: str) -> Dependency:
        """The one dependency of this name; without a digest where there is none, or another."""
        rows = [row for row in self.definition.dependencies if row.name == name]
        return rows[0] if len(rows) == 1 else Dependency.model_construct(name=name, digest={})


def make_provenance(
    project: Project,
    cell: ImageCell,
    image: Image,
    record: dict[str, Any],
    key: PrivateKey | None,
) -> Statement:
    """The provenance of an image that was built here; the same bytes until it is built again.

    ``record``: that of the build, ``dist/<cell>.json``; ``key``: None to sign as this job's
    identity.

    Raises:
        ProvenanceError: the checkout is not a commit, or no identity is known.
        BuildRecordError: see ``require_own_image``.
    """
    require_own_image(project, cell, image, record)
    stack = record["stack"]
    newest = max(record["blobs"].values()) // 10**9
    external = External(sku=cell.sku_name, line=cell.line_name, options=_options(record))
    provenance = Provenance(
        buildDefinition=Definition(
            buildType=BUILD_TYPE, externalParameters=external,
            resolvedDependencies=tuple(_dependencies(project, cell, stack)),
        ),
        runDetails=Run(
            builder=Builder(
                id=f"{BUILDER}/{key.public.id}" if key is not None else _workflow(),
                version={"vllm-forge": vllm_forge.__version__},
                vllmForge_machine=_machine(),
            ),
            metadata=Metadata(finishedOn=datetime.fromtimestamp(newest, UTC)),
        ),
    )  # fmt: skip
    predicate = provenance.model_dump(mode="json", by_alias=True, exclude_none=True)
    return image_statement(cell, image, PROVENANCE, predicate)


def _options(record: dict[str, Any]) -> BuildOptions:
    stack, label = record["stack"], record["stack"]["base"]["packages"]
    return BuildOptions(
        base={CURRENT: CURRENT}.get(label, LOCKED if label.startswith("sha256:") else label),
        engine=record["engine"],
        prewarm=stack.get("prewarm", {}).get("sha256"),
        kernels="kernels" in stack,
    )


def _dependencies(project: Project, cell: ImageCell, stack: dict[str, Any]) -> Iterator[Dependency]:
    """This repository, vLLM's source, patches, wheels, Debian packages, the system layers."""
    from packageurl import PackageURL  # noqa: PLC0415

    commit, changed = head_commit(project.root)
    if commit is None or changed:
        what = "the checkout has no commit" if commit is None else f"{len(changed)} files differ"
        remedy = "commit what was built, and build again"
        raise ProvenanceError(
            f"a provenance names a commit, and {what}", where=project.root, remedy=remedy
        )
    source = remote_uri(project.root)
    uri = f"git+{source}@{commit}" if source else None
    yield Dependency(name=FORGE, uri=uri, digest={"gitCommit": commit})
    folder = project.root / cell.line.series
    tree = read_tree_lock(folder, cell.line_name)
    release = str(PackageURL("pypi", None, "vllm", cell.line.vllm, {"file_name": tree.sdist}))
    yield Dependency(name=SOURCE, uri=release, digest={"sha256": tree.sha256, "gitTree": tree.base})
    for patch in read_series(folder):
        digest = {"sha256": file_digest(patch.path)}
        yield Dependency(name=f"{cell.line.series}/{patch.name}", digest=digest)
    yield Dependency(name=PATCHED, digest={"gitTree": stack["tree"]})
    for wheel in project.lock(cell.line_name).wheels:
        package = PackageURL("pypi", None, wheel.name, wheel.version)
        yield Dependency(name=wheel.filename, uri=str(package), digest={"sha256": wheel.sha256})
    for name, sha256 in stack.get("kernels", {}).items():
        yield Dependency(name=f"kernel archive {name}", digest={"sha256": sha256})
    for row in locked_debs(project, cell, stack):
        package = PackageURL("deb", "debian", row.name, row.version, {"arch": row.architecture})
        yield Dependency(name=row.path, uri=str(package), digest={"sha256": row.sha256})
    yield Dependency(
        name="system layers", digest={"sha256": stack["base"]["system"].removeprefix("sha256:")}
    )


def remote_uri(root: Path) -> str:
    """URL of the remote ``origin``, without credentials; empty where it has none or is a path."""
    address = (git(root, "remote", "get-url", "origin") or "").strip()
    if match := URL.match(address):
        return f"{match['scheme']}://{match['rest']}"
    match = SCP.match(address)
    return f"ssh://{match['host']}/{match['path']}" if match else ""


def _workflow() -> str:
    """The workflow that runs this, as the certificate of its identity has it."""
    server, workflow = (os.environ.get(f"GITHUB_{name}") for name in ("SERVER_URL", "WORKFLOW_REF"))
    if not server or not workflow:
        what = "the builder has no id: there is no key, and this is not a job of GitHub Actions"
        remedy = "give a private key with --key"
        raise ProvenanceError(what, remedy=remedy)
    return f"{server}/{workflow}"


def _machine() -> str | None:
    """This host's id, hashed with a key of this use as machine-id(5) asks; None without one."""
    try:
        value = MACHINE_ID.read_bytes().strip()
    except OSError:
        return None
    return hmac.new(value, b"vllm-forge provenance", "sha256").hexdigest() if value else None


def receipt_bundle(receipt: Receipt) -> bytes:
    """A signed receipt as a bundle: the same statement, and the signature that it has.

    ReceiptKeyError: it is unsigned.
    """
    for key, signature in receipt.signatures:
        return wrap(receipt.statement.content, signature, key)
    what, remedy = "an unsigned receipt cannot be attached", "sign it: receipts sign RECEIPT --key"
    raise ReceiptKeyError(what, where=receipt.path, remedy=remedy)


class VexRow(FrozenModel):
    """``[[statement]]``: a vulnerability in packages of the images of some lines."""

    vulnerability: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.:-]+$")]
    packages: tuple[Annotated[str, Field(pattern=r"^pkg:[^\s]+$")], ...] = Field(min_length=1)
    lines: tuple[str, ...] = Field(min_length=1)
    status: Literal["not_affected", "affected", "fixed", "under_investigation"]
    justification: (
        Literal[
            "component_not_present",
            "vulnerable_code_not_present",
            "vulnerable_code_not_in_execute_path",
            "vulnerable_code_cannot_be_controlled_by_adversary",
            "inline_mitigations_already_exist",
        ]
        | None
    ) = None
    impact: Text | None = None
    action: Text | None = None
    date: date

    @model_validator(mode="after")
    def _says_why(self) -> Self:
        if self.status == "not_affected" and self.justification is None:
            raise ValueError("status not_affected needs a justification")
        if self.status == "affected" and self.action is None:
            raise ValueError("status affected needs an action")
        return self


class _VexTable(FrozenModel):
    author: Text
    version: int = Field(ge=1)  # raised with every change
    statement: tuple[VexRow, ...] = Field(min_length=1)


def make_vex(
    project: Project, cell: ImageCell, image: Image, record: dict[str, Any]
) -> Statement | None:
    """The OpenVEX statement of an image; None where no row is about its line.

    Raises:
        VexError: the file is invalid, or a row names a line or package that is not there.
        SbomError: see ``make_sbom``.
    """
    from vllm_forge.release.components import make_sbom  # noqa: PLC0415 - loads cyclonedx

    path = project.root / VEX_FILE
    if not os.path.lexists(path):
        return None
    file = read_data(
        path, _VexTable.model_validate, VexError, what="table of vulnerabilities",
        remedy="correct it; the fields are those of VexRow in release/statements.py",
    )  # fmt: skip
    for row in file.statement:
        if unknown := sorted(set(row.lines) - set(project.matrix.line)):
            raise _stale(row, f"line {unknown[0]}, which is not defined in matrix.toml")
    rows = [row for row in file.statement if cell.line_name in row.lines]
    if not rows:
        return None
    document = make_sbom(project, cell, image, record)
    known = set(_purls(document["components"]))
    for row in rows:
        if missing := [purl for purl in row.packages if purl not in known]:
            raise _stale(row, f"{missing[0]}, which the SBOM of {cell.name} does not have")
    product = document["metadata"]["component"]["purl"]
    predicate = {
        "@context": VEX,
        "@id": f"https://vllm-forge.dev/vex/sha256-{image.digest}",
        "author": file.author,
        "timestamp": _midnight(max(row.date for row in rows)),
        "version": file.version,
        "statements": [_vex_row(row, product, image.digest) for row in rows],
    }
    return image_statement(cell, image, VEX, predicate)


def _vex_row(row: VexRow, product: str, digest: str) -> dict[str, Any]:
    fields = {
        "vulnerability": {"name": row.vulnerability},
        "timestamp": _midnight(row.date),
        "products": [
            {
                "@id": product,
                "hashes": {"sha-256": digest},
                "subcomponents": [{"@id": purl} for purl in row.packages],
            }
        ],
        "status": row.status,
        "justification": row.justification,
        "impact_statement": row.impact,
        "action_statement": row.action,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _purls(components: list[Document]) -> Iterator[str]:
    """Of components, those nested in them, and the releases that they were patched from."""
    for row in components:
        if "purl" in row:
            yield row["purl"]
        yield from _purls(row.get("components", []))
        yield from _purls(row.get("pedigree", {}).get("ancestors", []))


def _midnight(day: date) -> str:
    return datetime.combine(day, time.min, UTC).isoformat()


def _stale(row: VexRow, what: str) -> VexError:
    what = f"the row of {row.vulnerability} names {what}"
    remedy = "change the row for the present packages, or delete it"
    return VexError(what, where=VEX_FILE, remedy=remedy)
