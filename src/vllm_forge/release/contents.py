"""What an image has: what its record says, what its wheels say, and what its layers say.

Wheels have SBOMs of their own (PEP 770) and vendored distributions, which no lock lists. They are
read from wheels, to write the SBOM, and from the layers, to compare it with what ships.
"""

import email.parser
import hashlib
import re
import tarfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from packaging.utils import canonicalize_name
from pydantic import Field

from vllm_forge.host import cache_root, hash_of
from vllm_forge.host.files import read_sealed, write_sealed
from vllm_forge.images.errors import BuildRecordError
from vllm_forge.images.layer import LayerBlob, overlay
from vllm_forge.images.layout import Image
from vllm_forge.matrix import FrozenModel, ImageCell
from vllm_forge.patches import read_tree_lock
from vllm_forge.project import Project
from vllm_forge.release.errors import SbomError
from vllm_forge.sources import Lock, LockedWheel, Wheelhouse
from vllm_forge.sources.debian import DebianPackage, installed_packages, read_base_lock

FORMAT = 1  # raise when WheelContents has other fields
LARGEST = 16 << 20  # bytes of a file of metadata; the largest SBOM has 0.4 MB
METADATA = re.compile(r"(?:^|/)[^/]+\.dist-info/METADATA$")
SBOMS = re.compile(r"(?:^|/)[^/]+\.dist-info/sboms/.*[^/]$")
SITE = re.compile(r"^opt/venv/lib/python[\d.]+/site-packages/")
# Properties of components: where a distribution is vendored; path and hash of an SBOM in a wheel.
VENDORED, EMBEDDED = "vllm-forge:vendored", "vllm-forge:sbom"
STATUS = "var/lib/dpkg/status"


class Distribution(FrozenModel):
    """What METADATA says; ``path`` of its folder, relative to site-packages."""

    name: str
    version: str
    path: str


class WheelContents(FrozenModel):
    """Of one wheel. ``sboms``: path relative to site-packages -> content."""

    license: str | None = None  # a licence expression (PEP 639)
    sboms: dict[str, str] = Field(default_factory=dict)
    vendored: tuple[Distribution, ...] = ()


def wheel_contents(lock: Lock) -> dict[str, WheelContents]:
    """Name of each locked wheel -> its contents; kept in the cache, for all are hashed first.

    Raises:
        SbomError: a wheel's metadata does not match the lock, or cannot be read.
        HashMismatchError: a wheel in the cache is not the locked one.
    """
    path = cache_root() / "contents" / f"{hash_of([FORMAT, lock.digest])}.json"
    try:
        rows = read_sealed(path)
        return {name: WheelContents.model_validate(row) for name, row in rows.items()}
    except (OSError, ValueError):
        pass  # never read before, or damaged: written again
    Wheelhouse().fetch(lock.wheels)
    with ThreadPoolExecutor() as pool:
        contents = dict(
            zip((wheel.name for wheel in lock.wheels), pool.map(_read, lock.wheels), strict=True)
        )
    write_sealed(path, {name: row.model_dump(mode="json") for name, row in contents.items()})
    return contents


def _read(wheel: LockedWheel) -> WheelContents:
    path = Wheelhouse().verify(wheel)
    sboms, vendored, licenses = {}, [], None
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                place = re.sub(r"^[^/]+\.data/(?:pure|plat)lib/", "", member.filename)
                is_sbom = bool(SBOMS.search(place))
                if not is_sbom and not METADATA.search(place):
                    continue
                if member.file_size > LARGEST:
                    raise ValueError(f"{place} has {member.file_size} bytes")  # noqa: TRY301
                text = archive.read(member).decode("utf-8")
                if is_sbom:
                    sboms[place] = text
                elif place.count("/") > 1:
                    vendored.append(_distribution(text, place)[0])
                else:
                    own, licenses = _distribution(text, place)
                    if (own.name, own.version) != (wheel.name, wheel.version):
                        raise ValueError(f"it says {own.name} {own.version}")  # noqa: TRY301
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        what = f"cannot read what {wheel.filename} has: {error}"
        remedy = "ask its authors; until then, lock another version"
        raise SbomError(what, where=str(path), remedy=remedy) from None
    return WheelContents(license=licenses, sboms=sboms, vendored=tuple(vendored))


def _distribution(text: str, path: str) -> tuple[Distribution, str | None]:
    """A distribution, and its licence expression if it has one."""
    fields = email.parser.HeaderParser().parsestr(text)
    name, version = fields["Name"], fields["Version"]
    if not name or not version:
        raise ValueError(f"{path} has no Name or Version")
    row = Distribution(
        name=canonicalize_name(name), version=str(version), path=path.rpartition("/")[0]
    )
    return row, fields["License-Expression"]


def require_own_image(
    project: Project, cell: ImageCell, image: Image, record: dict[str, Any]
) -> None:
    """BuildRecordError unless this checkout's lock and series gave the image of a record."""
    stack, folder = record["stack"], project.root / cell.line.series
    rows = {
        "digest": (f"sha256:{image.digest}", record["digest"]),
        "lock": (project.lock(cell.line_name).digest, stack["lock"]["sha256"]),
        "tree": (read_tree_lock(folder, cell.line_name).result, stack["tree"]),
    }
    if other := [f"{name} {b}, not {a}" for name, (a, b) in rows.items() if a != b]:
        what = f"the record of the image is not of this checkout: {'; '.join(other)}"
        remedy = "build the image again"
        raise BuildRecordError(what, where=str(image.path), remedy=remedy)


def locked_debs(
    project: Project, cell: ImageCell, stack: dict[str, Any]
) -> tuple[DebianPackage, ...]:
    """The locked Debian packages of an image; none where it was built from current ones."""
    lock = read_base_lock(project.root, cell.base)
    if lock is None or stack["base"]["packages"] != f"sha256:{lock.digest}":
        return ()
    return lock.packages


def image_contents(layers: Sequence[LayerBlob]) -> tuple[dict[str, str], ...]:
    """What the bytes of an image have, of which its SBOM says the same.

    Versions of Python and of Debian packages by name, names and versions of vendored distributions
    by path, hashes of SBOMs (SHA-256, hex) by path. Reads all layers, given lowest first: about a
    minute for a full image. SbomError: one of these is not a file, or too large.
    """

    def read(path: str, info: tarfile.TarInfo, tar: tarfile.TarFile) -> bytes | None:
        if not (METADATA.search(path) or SBOMS.search(path) or path == STATUS):
            return None
        file = tar.extractfile(info) if info.isreg() else None
        if file is None or info.size > LARGEST:
            what = f"/{path} is not a file of at most {LARGEST} bytes"
            raise SbomError(what, remedy="build the image again")
        return file.read()

    python, debian, vendored, sboms = {}, {}, {}, {}
    for path, (_, content) in overlay(layers, read).items():
        place, text = SITE.sub("", path), content.decode(errors="replace")
        if path == STATUS:
            debian = installed_packages(text)
        elif SBOMS.search(path):
            sboms[place] = hashlib.sha256(content).hexdigest()
        else:
            row, _ = _distribution(text, place)
            if place.count("/") == 1 and place != path:
                python[row.name] = row.version
            else:
                vendored[row.path] = f"{row.name} {row.version}"
    return python, debian, vendored, sboms
