"""Which wheels a GPU host lacks, given what it has: the line's own versions, for its Python.

The lock is for the image's Python. A host with another one gets the same versions: wheels of the
lock that do not depend on the Python are taken with the lock's hash; the others are other files
of the same release, chosen here, with the hash that the index states. Those are named as a
difference, and so is what the host has in another version or what is left out.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from email.parser import BytesParser
from typing import TYPE_CHECKING

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from vllm_forge.gputest.errors import KitError
from vllm_forge.images.content import VLLM
from vllm_forge.sources.lock import choose_wheel, wheel_tags

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


@dataclass(frozen=True, kw_only=True)
class Chosen:
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
        KitError: it is not one, or it is another Python's: one without torch.
    """
    found: dict[str, str] = {}
    try:
        rows = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KitError(
            f"the freeze cannot be read: {error}",
            where=str(path),
            remedy="bring it from the host: python3 -m pip freeze > freeze.txt",
        ) from None
    for number, row in enumerate(rows, 1):
        text = row.strip()
        if not text or text.startswith(("#", "-e ")):
            continue
        if (entry := FROZEN.match(text)) is not None:
            found[canonicalize_name(entry["name"])] = entry["version"]
        elif LINKED.match(text) is None:  # "name @ file://": installed, of no known version
            raise KitError(
                f"not a line of pip freeze: {text[:80]}",
                where=f"{path}:{number}",
                remedy="leave what python3 -m pip freeze printed as it is",
            )
    if TORCH not in found:
        raise KitError(
            "this freeze has no torch, so it is not of the Python that will run the tests",
            where=str(path),
            remedy="on the host: python3 -m pip freeze, with the python3 that imports torch",
        )
    return found


def choose(
    line: Line,
    base: Base,
    lock: Lock,
    index: Index,
    *,
    frozen: dict[str, str],
    omit: Sequence[str],
    extra: Sequence[LockedWheel],
) -> Chosen:
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
            f"the lock has no {unknown[0]} that could be left out",
            where=str(lock.path),
            remedy="--omit takes the name of a package of that lock",
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
    found = [choose_wheel(item.name, item.version, offered[item.name], tags) for item in other]
    rows = [f"{name} is left out" for name in sorted(omit)]
    if found:
        rows.append(
            f"Python {line.python}: {len(found)} wheels are other files of the locked releases, "
            f"with the index's hashes: {', '.join(wheel.name for wheel in found)}"
        )
    return Chosen(
        wheels=tuple(sorted([*wheels, *found], key=lambda wheel: wheel.name)),
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
        KitError: something is asked for that nobody brings: the lock is for another Python, and
            a requirement may hold for one of them only.
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
            wanted = Requirement(text)
            name = canonicalize_name(wanted.name)
            if name in names or (wanted.marker and not wanted.marker.evaluate(environment)):
                continue
            raise KitError(
                f"{item['Name']} needs {text} on Python {python}, and the lock has no {name}",
                remedy="make the kit for the line's Python, or for a host that has it",
            )


def _metadata(path: Path) -> Message:
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return BytesParser().parsebytes(archive.read(name), headersonly=True)
