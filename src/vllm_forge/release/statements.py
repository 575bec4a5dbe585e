"""in-toto statements of a release: what is signed about an image.

``builder.id`` of a provenance claims no more than its signature does. With a key it is the key: the
owner says that they built the image (SLSA build level 1). In a job of GitHub Actions that signs as
itself it is the workflow, as its certificate has it: level 2 if the certificate says that GitHub
runs the runner, else 1. Nothing here claims level 3.

Sources: github.com/in-toto/attestation, spec/v1/statement.md; slsa.dev/spec/v1.2/build-provenance;
github.com/openvex/spec, OPENVEX-SPEC.md.
"""

import hmac
import os
import re
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, ConfigDict, Field

import vllm_forge
from vllm_forge.host import canonical
from vllm_forge.host.files import file_digest
from vllm_forge.images.layout import Image
from vllm_forge.images.rootfs import CURRENT, LOCKED
from vllm_forge.matrix import FrozenModel, ImageCell
from vllm_forge.patches import read_series, read_tree_lock
from vllm_forge.project import Project
from vllm_forge.receipts.errors import ReceiptKeyError
from vllm_forge.receipts.receipt import Receipt
from vllm_forge.release.contents import locked_debs, require_own_image
from vllm_forge.release.errors import ProvenanceError
from vllm_forge.release.gate import head_commit
from vllm_forge.signing import PrivateKey, wrap

SBOM = "https://cyclonedx.org/bom"
PROVENANCE = "https://slsa.dev/provenance/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
VEX = "https://openvex.dev/ns/v0.2.0"
VSA = "https://slsa.dev/verification_summary/v1"

BUILD_TYPE = "https://vllm-forge.dev/build/image/v1"
BUILDER = "https://vllm-forge.dev/builder/key"
FORGE, SOURCE, PATCHED = "vllm-forge", "vllm source", "vllm source, patched"
MACHINE_ID = Path("/etc/machine-id")
SCP = re.compile(r"^(?:[^@/]+@)?(?P<host>[^:/]+):(?P<path>[^/].*)$")  # git@host:path
URL = re.compile(r"^(?P<scheme>https?|ssh|git)://(?:[^@/]*@)?(?P<rest>[^/].*)$")


class Subject(FrozenModel):
    """What a statement is about: an in-toto ResourceDescriptor."""

    name: str
    digest: dict[str, str] = Field(min_length=1)


class _Record(FrozenModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Statement(_Record):
    """An in-toto statement v1; ``predicate`` is as its type has it."""

    kind: Literal["https://in-toto.io/Statement/v1"] = Field(
        alias="_type", default="https://in-toto.io/Statement/v1"
    )
    subject: tuple[Subject, ...] = Field(min_length=1)
    predicate_type: str = Field(alias="predicateType")
    predicate: dict[str, Any]

    @property
    def content(self) -> bytes:
        """Canonical bytes, to be signed."""
        return canonical(self.model_dump(mode="json", by_alias=True))

    def has_subject(self, digest: str) -> bool:
        """Whether it is about the manifest ``sha256:<hex>``."""
        algorithm, _, value = digest.partition(":")
        return any(subject.digest.get(algorithm) == value for subject in self.subject)


def image_statement(
    cell: ImageCell, image: Image, kind: str, predicate: dict[str, Any]
) -> Statement:
    """A statement about an image, by its manifest."""
    subject = Subject(name=cell.name, digest={"sha256": image.digest})
    return Statement(subject=(subject,), predicate_type=kind, predicate=predicate)


class BuildOptions(_Record):
    """Options of ``build``. ``prewarm``: hash of the set, which is not in the repository."""

    base: str
    engine: str
    prewarm: str | None = None
    kernels: bool = False


class External(_Record):
    """externalParameters: all that whoever started the build chose."""

    sku: str
    line: str
    options: BuildOptions


class Dependency(_Record):
    """A ResourceDescriptor."""

    name: str
    uri: str | None = None
    digest: dict[str, str] = Field(min_length=1)


class Definition(_Record):
    build_type: Literal["https://vllm-forge.dev/build/image/v1"] = Field(alias="buildType")
    external: External = Field(alias="externalParameters")
    dependencies: tuple[Dependency, ...] = Field(alias="resolvedDependencies")


class Builder(_Record):
    """``machine``: keyed hash of the host's id, to distinguish the hosts of two builds."""

    id: str
    version: dict[str, str]
    machine: str | None = Field(alias="vllmForge_machine", default=None)


class Metadata(_Record):
    """``finished``: when the newest layer was written."""

    finished: AwareDatetime = Field(alias="finishedOn")


class Run(_Record):
    builder: Builder
    metadata: Metadata


class Provenance(_Record):
    """The predicate of SLSA provenance v1; unknown fields, parameters among them, are refused."""

    definition: Definition = Field(alias="buildDefinition")
    run: Run = Field(alias="runDetails")

    @property
    def external(self) -> External:
        return self.definition.external

    @property
    def build_options(self) -> dict[str, str]:
        """Options by which ``build`` makes it again; a prewarm set is not among them."""
        options = self.external.options
        return {"base": options.base, "engine": options.engine}

    @property
    def builder_id(self) -> str:
        return self.run.builder.id

    @property
    def finished(self) -> datetime:
        return self.run.metadata.finished

    @property
    def commit(self) -> str:
        """Of this repository, hex."""
        return self._digest(FORGE, "gitCommit")

    @property
    def source(self) -> str:
        """URI of this repository, empty where the builder's checkout names none."""
        uris = (row.uri for row in self.definition.dependencies if row.name == FORGE)
        return next(uris, None) or ""

    @property
    def tree(self) -> str:
        """Git tree of the patched vLLM, hex."""
        return self._digest(PATCHED, "gitTree")

    def _digest(self, name: str, kind: str) -> str:
        rows = (
            row.digest.get(kind, "") for row in self.definition.dependencies if row.name == name
        )
        return next(rows, "")


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
    provenance = Provenance(
        definition=Definition(
            build_type=BUILD_TYPE,
            external=External(
                sku=cell.sku_name,
                line=cell.line_name,
                options=_options(record),
            ),
            dependencies=tuple(_dependencies(project, cell, stack)),
        ),
        run=Run(
            builder=Builder(
                id=f"{BUILDER}/{key.public.id}" if key is not None else _workflow(),
                version={"vllm-forge": vllm_forge.__version__},
                machine=_machine(),
            ),
            metadata=Metadata(finished=datetime.fromtimestamp(newest, UTC)),
        ),
    )
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
            f"a provenance names a commit, and {what}", where=str(project.root), remedy=remedy
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
    argv = ["git", "-C", str(root), "remote", "get-url", "origin"]
    address = subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip()
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
    raise ReceiptKeyError(what, where=str(receipt.path), remedy=remedy)
