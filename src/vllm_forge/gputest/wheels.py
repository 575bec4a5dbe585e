"""The wheels of a kit: those that the host lacks, in the line's versions; vLLM's for one GPU.

The lock is for the image's Python. A host with another one gets the same versions: wheels of the
lock that do not depend on the Python are taken with the lock's hash; the others are other files
of the same release, selected here, with the hash that the index states. Those are listed as
differences, and so is what is left out.

In the patched wheel, device code that cannot run on the GPU is zeroed, so that it packs. Offsets
stay, and so do the headers of all entries; the driver reads the one entry that it takes. Libraries
whose code no test launches are zeroed whole: they load, as vLLM imports them.
"""

from __future__ import annotations

import fnmatch
import re
import zipfile
from dataclasses import dataclass
from email.parser import BytesParser
from typing import TYPE_CHECKING

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from vllm_forge.gputest.errors import KitError
from vllm_forge.host import atomic_path
from vllm_forge.images.content import VLLM
from vllm_forge.kernels.coverage import Capability, device_code, runs_on
from vllm_forge.sources.errors import WheelError
from vllm_forge.sources.lock import choose_wheel, wheel_tags
from vllm_forge.sources.wheel_format import record_row, rewrite_record

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet
    from email.message import Message
    from pathlib import Path

    from vllm_forge.matrix import Base, Line
    from vllm_forge.sources import Index, Lock, LockedWheel

FROZEN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>\S+)$")
LINKED = re.compile(r"^(?P<name>[A-Za-z0-9._-]+) @ ")
TORCH = "torch"
LIBRARY = ".so"
LEVEL = 6


@dataclass(frozen=True, kw_only=True)
class WheelSelection:
    """What travels.

    Attributes:
        wheels: to be installed, vLLM not among them.
        kept: distributions of the lock that the host has already, in the same version.
        differences: from the lock, each a sentence.
    """

    wheels: tuple[LockedWheel, ...]
    kept: tuple[str, ...]
    differences: tuple[str, ...]


def read_freeze(path: Path) -> dict[str, str]:
    """Name -> version of a host's ``pip freeze``.

    Raises:
        KitError: not a freeze, or one without torch, so of another Python.
    """
    versions: dict[str, str] = {}
    try:
        rows = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KitError(
            f"cannot read --freeze: {error}",
            where=str(path),
            remedy="bring it from the host: python3 -m pip freeze > freeze.txt",
        ) from None
    for number, row in enumerate(rows, 1):
        text = row.strip()
        if not text or text.startswith(("#", "-e ")):
            continue
        if (entry := FROZEN.match(text)) is not None:
            versions[canonicalize_name(entry["name"])] = entry["version"]
        elif LINKED.match(text) is None:  # "name @ file://": installed, of no known version
            raise KitError(
                f"not a line of pip freeze: {text[:80]}",
                where=f"{path}:{number}",
                remedy="leave what python3 -m pip freeze printed as it is",
            )
    if TORCH not in versions:
        raise KitError(
            "missing torch in --freeze: not of the Python that will run the tests",
            where=str(path),
            remedy="on the host: python3 -m pip freeze, with the python3 that imports torch",
        )
    return versions


def select_wheels(
    line: Line,
    base: Base,
    lock: Lock,
    index: Index,
    *,
    frozen: dict[str, str],
    omit: Sequence[str],
    extra: Sequence[LockedWheel],
) -> WheelSelection:
    """Compare lock and host.

    Args:
        line: with the host's Python instead of its own.
        base: the platform.
        lock: of the line.
        index: offers other files of a release.
        frozen: what the host has.
        omit: distributions to leave out, by name.
        extra: wheels besides the lock's that are needed: pytest.

    Raises:
        KitError: the host's torch is not the line's, or a name in ``omit`` is not in the lock.
        DistributionNotFoundError: a release has no wheel for the host's Python.
    """
    names = {wheel.name for wheel in lock.wheels}
    if unknown := sorted(set(omit) - names):
        raise KitError(
            f"unknown --omit {unknown[0]}: not in the lock",
            where=str(lock.path),
            remedy="name a package of that lock",
        )
    torch = frozen[TORCH].partition("+")[0]
    if torch != line.torch:
        raise KitError(
            f"the host has torch {torch}, the line needs {line.torch}",
            remedy="choose another line, or another host: torch does not fit into a kit",
        )
    tags = wheel_tags(line, base)
    kept, wheels, other = [], [], []
    for wheel in (*lock.wheels, *extra):
        if wheel.name == VLLM or wheel.name in omit:
            continue
        if frozen.get(wheel.name, "").partition("+")[0] == wheel.version:
            kept.append(wheel.name)
        elif any(tag in tags for tag in parse_wheel_filename(wheel.filename)[3]):
            wheels.append(wheel)
        else:
            other.append(wheel)
    offered = index.files_of(wheel.name for wheel in other) if other else {}
    others = [choose_wheel(wheel.name, wheel.version, offered[wheel.name], tags) for wheel in other]
    rows = [f"{name} is left out" for name in sorted(omit)]
    if others:
        rows.append(
            f"Python {line.python}: {len(others)} wheels are other files of the locked releases, "
            f"with the index's hashes: {', '.join(wheel.name for wheel in others)}"
        )
    return WheelSelection(
        wheels=tuple(sorted([*wheels, *others], key=lambda wheel: wheel.name)),
        kept=tuple(kept),
        differences=tuple(rows),
    )


def require_closed(wheels: Sequence[Path], present: AbstractSet[str], python: str) -> None:
    """Everything that these wheels ask for on that Python must be there.

    Args:
        wheels: files.
        present: names that the host has, or that are left out on purpose.
        python: e.g. ``3.12``.

    Raises:
        KitError: one is missing: the lock is for another Python, and a requirement may hold for
            one of them only.
    """
    environment: dict[str, str | AbstractSet[str]] = {
        **{name: str(value) for name, value in default_environment().items()},
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": "x86_64",
        "sys_platform": "linux",
        "extra": "",
    }
    metadata = [_metadata(path) for path in wheels]
    names = present | {canonicalize_name(item["Name"]) for item in metadata}
    for item in metadata:
        for text in item.get_all("Requires-Dist") or ():
            requirement = Requirement(text)
            name, marker = canonicalize_name(requirement.name), requirement.marker
            if name in names or (marker and not marker.evaluate(environment)):
                continue
            raise KitError(
                f"missing {name}: {item['Name']} needs {text} on Python {python}",
                remedy="make the kit for the line's Python, or for a host that has it",
            )


def _metadata(path: Path) -> Message:
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return BytesParser().parsebytes(archive.read(name), headersonly=True)


@dataclass(frozen=True, kw_only=True)
class ThinWheel:
    """A wheel with less device code.

    Attributes:
        path: the wheel.
        zeroed: bytes of device code that were zeroed.
        differences: from the wheel as built, each a sentence.
    """

    path: Path
    zeroed: int
    differences: tuple[str, ...]


def thin_wheel(
    wheel: Path, target: Path, capability: Capability, unused: Sequence[str]
) -> ThinWheel:
    """Write ``target``: the wheel without device code for other GPUs.

    Args:
        wheel: as built.
        target: is written.
        capability: of the GPU.
        unused: patterns of libraries none of whose device code is launched.

    Raises:
        UnknownFatbinError: see kernels.coverage.device_code.
        WheelError: it has no RECORD.
    """
    zeroed, emptied, rows = 0, [], {}
    record = None
    with (
        zipfile.ZipFile(wheel) as source,
        atomic_path(target) as aside,
        zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL) as out,
    ):
        for member in source.infolist():
            if member.filename.endswith(".dist-info/RECORD"):
                record = member
                continue
            content = source.read(member)
            if member.filename.endswith(LIBRARY):
                whole = any(fnmatch.fnmatch(member.filename, pattern) for pattern in unused)
                content, count = thin(content, member.filename, None if whole else capability)
                zeroed += count
                emptied += [member.filename] if whole else []
                rows[member.filename] = record_row(content)
            _write(out, member, content)
        if record is None:
            raise WheelError("the wheel has no RECORD", where=str(wheel))
        new_record = rewrite_record(
            source.read(record), lambda path, *columns: (path, *rows.get(path, columns))
        )
        _write(out, record, new_record)
    differences = [f"device code for other GPUs is zeroed in {len(rows)} libraries of vLLM"]
    differences += [f"all device code of {name} is zeroed: no test launches it" for name in emptied]
    return ThinWheel(path=target, zeroed=zeroed, differences=tuple(differences))


def thin(content: bytes, name: str, capability: Capability | None) -> tuple[bytes, int]:
    """A library with zeros for what cannot run; None: for all. Also the bytes zeroed."""
    data, count = bytearray(content), 0
    for code in device_code(content, name):
        if capability is None or not runs_on(code.target, code.kind, capability):
            data[code.offset : code.offset + code.size] = bytes(code.size)
            count += code.size
    return bytes(data), count


def _write(out: zipfile.ZipFile, member: zipfile.ZipInfo, content: bytes) -> None:
    info = zipfile.ZipInfo(member.filename, member.date_time)
    info.external_attr = member.external_attr
    info.compress_type = zipfile.ZIP_DEFLATED
    out.writestr(info, content)
