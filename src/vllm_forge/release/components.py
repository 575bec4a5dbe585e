"""Make the SBOM of an image, by cyclonedx-python-lib; imported only where one is written.

CycloneDX 1.6, the same bytes each time, of the lock, the wheels, the Debian lock and the series;
equal to the image's stack.json. Two things that scanners of images do not find: components that
wheels declare in SBOMs of their own (PEP 770: crates, libraries), nested in the wheel; and that
this vLLM is a patched release: an advisory names the release, so it is an ancestor in the pedigree,
beside the patches.

Source: cyclonedx.org/docs/1.6/json.
"""

import base64
import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from cyclonedx.exception import CycloneDxException
from cyclonedx.model import AttachedText, Encoding, HashAlgorithm, HashType, Property, XsUri
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import (
    Component,
    ComponentType,
    Diff,
    Patch,
    PatchClassification,
    Pedigree,
)
from cyclonedx.model.dependency import Dependency
from cyclonedx.model.issue import IssueClassification, IssueType
from cyclonedx.model.license import LicenseExpression
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

import vllm_forge
from vllm_forge.host import parse_json
from vllm_forge.images.layout import Image
from vllm_forge.matrix import ImageCell
from vllm_forge.patches import apply, read_series
from vllm_forge.project import Project
from vllm_forge.release import sbom
from vllm_forge.release.errors import SbomError
from vllm_forge.release.sbom import EMBEDDED, VENDORED, Document, WheelContents
from vllm_forge.sources import LockedWheel
from vllm_forge.sources.debian import DebianPackage

VLLM = "vllm"
VERSION = SchemaVersion.V1_6
# By the first word of a patch's Origin (DEP 3).
ORIGINS = {"upstream": PatchClassification.CHERRY_PICK, "backport": PatchClassification.BACKPORT}


def make_sbom(project: Project, cell: ImageCell, image: Image, record: dict[str, Any]) -> Document:
    """The CycloneDX document of an image that was built here; ``record``: ``dist/<cell>.json``.

    Raises:
        BuildRecordError: see ``require_own_image``.
        SbomError: an SBOM inside a wheel cannot be read.
        HashMismatchError: a wheel in the cache is not the locked one.
    """
    sbom.require_own_image(project, cell, image, record)
    stack, lock = record["stack"], project.lock(cell.line_name)
    contents = sbom.wheel_contents(lock)
    wheels = {row.name: wheel_component(row, contents[row.name]) for row in lock.wheels}
    wheels[VLLM] = _patched_component(
        wheels[VLLM], stack["vllm"], stack["tree"], cell.line.series,
        read_series(project.root / cell.line.series),
    )  # fmt: skip
    debs = {row.name: row for row in sbom.locked_debs(project, cell, stack)}
    release = stack["debian"].get("base-files", "").partition("+")[0]  # e.g. 13.8
    rows = list(wheels.values())
    for name, version in stack["debian"].items():
        rows.append(_debian_component(name, version, release, debs.get(name)))
    if release:  # the distribution by which scanners choose their advisories
        rows.append(_component("debian", release, type=ComponentType.OPERATING_SYSTEM))
    files = {f"kernel archive {name}": sha for name, sha in stack.get("kernels", {}).items()}
    if "prewarm" in stack:
        files = {"prewarm": stack["prewarm"]["sha256"], **files}
    for name, sha256 in files.items():
        rows.append(_component(name, type=ComponentType.FILE, sha256=sha256))
    document = _document(cell, image, rows)
    if sbom.packages_of(document) != (stack["packages"], stack["debian"]):
        what = "the SBOM has other packages than the image's stack.json"
        remedy = "build the image again; if it is the same, report it"
        raise SbomError(what, where=image.path, remedy=remedy)
    return document


def _document(cell: ImageCell, image: Image, rows: Sequence[Component]) -> Document:
    """The SBOM as JSON, valid by the strict schema; its serial number is made of the digest."""
    digest, labels = f"sha256:{image.digest}", image.config["config"]["Labels"]
    root = _component(
        cell.name, digest, PackageURL("oci", None, cell.name, digest, {"arch": "amd64"}),
        type=ComponentType.CONTAINER,
        properties=[Property(name=name, value=value) for name, value in labels.items()],
    )  # fmt: skip
    tool = _component("vllm-forge", vllm_forge.__version__, type=ComponentType.APPLICATION)
    bom = Bom(
        components=rows,
        dependencies=[
            Dependency(root.bom_ref, [Dependency(row.bom_ref) for row in rows]),
            *(Dependency(row.bom_ref) for row in rows),
        ],
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, digest),
        metadata=BomMetaData(
            component=root,
            timestamp=datetime.fromtimestamp(cell.base.source_date_epoch, UTC),
            tools=ToolRepository(components=[tool]),
        ),
    )
    text = make_outputter(bom, OutputFormat.JSON, VERSION).output_as_string()
    if error := JsonStrictValidator(VERSION).validate_str(text):
        what = f"the SBOM is not valid CycloneDX {VERSION.to_version()}: {error}"
        raise SbomError(what, where=cell.name, remedy="report it, with the SBOM inside the wheel")
    document: Document = json.loads(text)
    return document


def wheel_component(wheel: LockedWheel, contents: WheelContents) -> Component:
    """A wheel as published, with what it declares and vendors nested in it."""
    purl = PackageURL("pypi", None, wheel.name, wheel.version)
    sboms = {path: hashlib.sha256(t.encode()).hexdigest() for path, t in contents.sboms.items()}
    return _component(
        wheel.name, wheel.version, purl, sha256=wheel.sha256,
        licenses=[LicenseExpression(contents.license)] if contents.license else (),
        properties=[Property(name=EMBEDDED, value=f"{path} {sha}") for path, sha in sboms.items()],
        components=_nested(wheel, purl, contents),
    )  # fmt: skip


def _patched_component(
    published: Component, version: str, tree: str, folder: str, series: Sequence[apply.Patch]
) -> Component:
    """The patched vLLM: its ancestor is the published wheel, for which advisories are written.

    ``folder``: that of the series in the checkout.
    """
    names = ", ".join(patch.name for patch in series)
    pedigree = Pedigree(
        ancestors=[published],
        patches=[_patch(folder, patch) for patch in series],
        notes=f"patches, in this order, give git tree {tree}: {names}",
    )
    purl = PackageURL("pypi", None, published.name, version)
    return _component(
        published.name, version, purl, pedigree=pedigree, licenses=published.licenses,
        properties=published.properties,
    )  # fmt: skip


def _debian_component(
    name: str, version: str, release: str, row: DebianPackage | None
) -> Component:
    """A Debian package; its hash is that of the .deb, where a lock has it."""
    qualifiers = {"distro": f"debian-{release.partition('.')[0]}"} if release else {}
    if row is not None:
        source = row.path.split("/")[-2]  # security advisories name the source package
        qualifiers |= {"arch": row.architecture} | ({"upstream": source} if source != name else {})
    purl = PackageURL("deb", "debian", name, version, qualifiers)
    return _component(name, version, purl, sha256=row.sha256 if row is not None else "")


def _component(
    name: str,
    version: str | None = None,
    purl: PackageURL | None = None,
    *,
    type: ComponentType = ComponentType.LIBRARY,
    sha256: str = "",
    **fields: Any,
) -> Component:
    """A component whose reference, if none is given, is its package URL or name."""
    fields.setdefault("bom_ref", str(purl or name))
    hashes = [HashType(alg=HashAlgorithm.SHA_256, content=sha256)] if sha256 else []
    return Component(name=name, version=version, purl=purl, type=type, hashes=hashes, **fields)


def _patch(folder: str, patch: apply.Patch) -> Patch:
    bug = patch.fields["Bug"]
    issue = IssueType(
        type=IssueClassification.DEFECT, id=bug, name=patch.summary, references=[XsUri(bug)]
    )
    text = base64.b64encode(patch.diff.encode()).decode()
    return Patch(
        type=ORIGINS.get(patch.fields["Origin"].partition(",")[0], PatchClassification.UNOFFICIAL),
        diff=Diff(
            text=AttachedText(content=text, content_type="text/x-diff", encoding=Encoding.BASE_64),
            url=XsUri(f"{folder}/{patch.name}"),
        ),
        resolves=[issue] if "://" in bug else (),
    )


def _nested(wheel: LockedWheel, own: PackageURL, contents: WheelContents) -> list[Component]:
    """Components of a wheel's SBOMs, each once, and its vendored distributions."""
    nested: dict[tuple[str, str, str], Component] = {}
    for path, text in contents.sboms.items():
        for item in _embedded(wheel, path, text):
            purl = item.purl
            if purl is not None and not purl.subpath and (purl.type, purl.name, purl.version) == (
                own.type, own.name, own.version,
            ):  # fmt: skip
                continue  # auditwheel lists the wheel itself
            key = (item.name, item.version or "", str(purl or ""))
            nested[key] = Component(
                name=item.name, version=item.version, group=item.group, type=item.type, purl=purl,
                hashes=item.hashes, licenses=item.licenses,
                bom_ref=f"{own}#{purl or f'{item.name}@{item.version}'}",
            )  # fmt: skip
    vendored = []
    for row in contents.vendored:
        purl = PackageURL("pypi", None, row.name, row.version)
        where = [Property(name=VENDORED, value=row.path)]
        item = _component(row.name, row.version, purl, bom_ref=f"{own}#{purl}", properties=where)
        vendored.append(item)
    return [*nested.values(), *vendored]


def _embedded(wheel: LockedWheel, path: str, text: str) -> Iterator[Component]:
    """All components of an SBOM inside a wheel, nested ones too."""
    try:
        document = parse_json(text)
        if document["bomFormat"] != "CycloneDX":  # the library would read it as an empty one
            raise ValueError(f"its format is {document['bomFormat']}")  # noqa: TRY301
        bom = Bom.from_json(document)  # type: ignore[attr-defined]
    except (ValueError, LookupError, TypeError, AttributeError, CycloneDxException) as error:
        what = f"cannot read the SBOM {path} of {wheel.filename}: {error}"
        remedy = "only CycloneDX JSON is supported: support its form in release/components.py"
        raise SbomError(what, where=wheel.filename, remedy=remedy) from None
    pending = list(bom.components)
    while pending:
        item = pending.pop()
        pending += item.components
        yield item
