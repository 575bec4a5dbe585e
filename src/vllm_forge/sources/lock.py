"""Locks: one line of text per wheel, made by uv, narrowed to the image's platform."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from rich.markup import escape
from uv import find_uv_bin

from vllm_forge.host import console, hash_of, printable, read_plain, write_whole
from vllm_forge.matrix import Base, Line
from vllm_forge.sources import errors
from vllm_forge.sources.index import CHECK_INDEX, Index, pins

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage

T = TypeVar("T")
ENTRY = re.compile(
    r"^(?P<name>[a-z0-9-]+)==(?P<version>\S+) --hash=sha256:(?P<sha256>[0-9a-f]{64})"
    r"  # (?P<filename>[A-Za-z0-9_][A-Za-z0-9_.+!~-]*\.whl) (?P<size>\d+)$"
)
TOTAL = re.compile(r"^# total: (?P<count>\d+) wheels, (?P<bytes>\d+) bytes$", re.M)
INPUT_DIGEST = re.compile(r"^# input: (?P<digest>[0-9a-f]{64})$", re.M)
# A wheel's files take this much more room unpacked than packed (2.1 for the 0.26 lock).
UNPACK_RATIO = 2.5
RESOLVED = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s\\;]+)", re.M)


@dataclass(frozen=True, kw_only=True)
class LockedWheel:
    """One wheel: normalized name, version, file name, size in bytes, SHA-256 in hex."""

    name: str
    version: str
    filename: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Lock:
    """All wheels of a line, sorted by name. ``digest`` is the SHA-256 of the file."""

    path: Path
    wheels: tuple[LockedWheel, ...]
    digest: str

    def find(self, name: str) -> LockedWheel:
        """The wheel of a distribution. Raises LockFileError: the lock has none."""
        for wheel in self.wheels:
            if wheel.name == name:
                return wheel
        remedy = "make the lock again: nox -s lock -- --line LINE"
        raise errors.LockFileError(f"the lock has no {name}", where=self.path, remedy=remedy)


def input_digest(line: Line, base: Base) -> str:
    """Hash of the fields of matrix.toml that a lock depends on."""
    fields = {
        "vllm": line.vllm,
        "torch": line.torch,
        "python": line.python,
        "platform": base.platform,
        "constraints": [item.requirement for item in line.constraints],
        "overrides": [item.requirement for item in line.overrides],
    }
    return hash_of(fields, sort_keys=True)


def read_lock(root: Path, line_name: str, line: Line, base: Base) -> Lock:
    """Parse a lock; LockFileError if missing, malformed, hand-edited, or older than the row."""
    path = root / line.lock
    again = f"run: nox -s lock -- --line {line_name}"
    refused = partial(errors.LockFileError, where=path, remedy=again)
    if not path.is_file():
        raise refused(f"line {line_name} has no lock")
    text, wheels = read_wheels(path, again)
    stated = INPUT_DIGEST.search(text)
    if stated is None or stated["digest"] != input_digest(line, base):
        raise refused(f"the lock was not made for what matrix.toml now says of line {line_name}")
    total = TOTAL.search(text)
    counted = (str(len(wheels)), str(sum(wheel.size for wheel in wheels)))
    if total is None or total.group("count", "bytes") != counted:
        raise refused(
            f"the lock has {counted[0]} wheels of {counted[1]} bytes, its header says otherwise: "
            "it was edited by hand"
        )
    lock = Lock(path=path, wheels=wheels, digest=hashlib.sha256(text.encode()).hexdigest())
    for name, version in (("vllm", line.vllm), ("torch", line.torch)):
        if (locked := lock.find(name).version) != version:
            raise refused(f"the lock has {name} {locked}, the row says {version}")
    return lock


def read_wheels(path: Path, again: str) -> tuple[str, tuple[LockedWheel, ...]]:
    """Text and entries of a file in the form of a lock, else LockFileError with ``again``."""
    text, rows = read_rows(path, ENTRY, again)
    return text, tuple(LockedWheel(**row) for row in rows)


def read_rows(path: Path, row: re.Pattern[str], again: str) -> tuple[str, list[dict[str, Any]]]:
    """Text of a lock, and the groups of each row: sorted by ``name``, which is unique."""
    refused = partial(errors.LockFileError, where=path, remedy=again)
    try:
        text = read_plain(path).decode("utf-8")
    except (OSError, ValueError) as error:
        raise refused(f"cannot read the lock: {error}") from None
    if "\r" in text:
        raise refused("the lock has CRLF line ends")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        entry = row.fullmatch(line)
        if entry is None:
            raise refused(f"not a lock entry: {line[:80]}", where=f"{path}:{number}")
        rows.append(entry.groupdict() | {"size": int(entry["size"])})
    names = [entry["name"] for entry in rows]
    if names != sorted(set(names)):
        raise refused("entries are not sorted or not unique")
    return text, rows


def make_lock(root: Path, line_name: str, line: Line, base: Base, index: Index) -> Lock:
    """Resolve a line with uv and write its lock; the reasons of overrides are printed."""
    for kind, items in (("constraint", line.constraints), ("override", line.overrides)):
        for item in items:
            console.print(f"[yellow]{kind}[/] {escape(f'{item.requirement}: {item.reason}')}")
    resolved = _resolve(line, base, index)
    offered = index.files_of(name for name, _ in resolved)
    tags = wheel_tags(line, base)
    wheels = [choose_wheel(name, version, offered[name], tags) for name, version in resolved]
    text = _text(line_name, line, base, wheels)
    return replace_lock(
        root, line.lock,
        write=lambda path: write_whole(path, text),
        read=lambda place: read_lock(place, line_name, line, base),
    )  # fmt: skip


def replace_lock(
    root: Path, name: str, *, write: Callable[[Path], None], read: Callable[[Path], T]
) -> T:
    """Write the lock ``name`` below ``root``, unless ``read`` of such a root refuses it."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, name))
        try:
            read(Path(folder))
        except errors.LockFileError as error:
            what = f"what was resolved makes no lock: {error.what}"
            row = error.where.replace(f"{folder}/", "")
            remedy = "change the row in matrix.toml; the lock was left as it was"
            raise errors.ResolutionError(what, where=row, remedy=remedy) from None
    write(root / name)
    return read(root)


def _resolve(line: Line, base: Base, index: Index) -> list[tuple[str, str]]:
    inputs = {
        "in": [f"vllm=={line.vllm}", f"torch=={line.torch}"],
        "constraints": [item.requirement for item in line.constraints],
        "overrides": [item.requirement for item in line.overrides],
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, requirements in inputs.items():
            Path(folder, f"{name}.txt").write_text("".join(f"{item}\n" for item in requirements))
        argv = [
            find_uv_bin(), "pip", "compile", "in.txt", "--quiet", "--no-header", "--no-annotate",
            # This Python: uv would look for the line's, and try to download one, to build sdists.
            "--only-binary=:all:", f"--python={sys.executable}",
            f"--python-version={line.python}", f"--python-platform={base.platform}",
            "--constraints=constraints.txt", "--overrides=overrides.txt",
        ]  # fmt: skip
        done = subprocess.run(
            argv,
            cwd=folder,
            # Not an option: every user of the host can read a command line, and this URL may have
            # a password.
            env=os.environ | {"UV_DEFAULT_INDEX": index.url},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0 and "Failed to fetch" in done.stderr:
        what = f"uv could not reach the package index:\n{done.stderr.strip()}"
        raise errors.IndexUnreachableError(what, where=index.url, remedy=CHECK_INDEX)
    if done.returncode != 0:
        what = f"uv finds no solution for vllm=={line.vllm} with torch=={line.torch}:\n"
        remedy = "if a single requirement is in the way, an override with its reason in the "
        remedy += "line's row is how to say so"
        raise errors.ResolutionError(what + done.stderr.strip(), remedy=remedy)
    return sorted(
        (canonicalize_name(found["name"]), found["version"])
        for found in RESOLVED.finditer(done.stdout)
    )


def wheel_tags(line: Line, base: Base) -> dict[Tag, int]:
    """Wheel tags that a line's Python takes on the platform, best first: tag -> rank."""
    machine, _, glibc_minor = base.platform.rpartition("-manylinux_2_")
    legacy = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    platforms = []
    for minor in range(int(glibc_minor), 4, -1):
        platforms.append(f"manylinux_2_{minor}_{machine}")
        if minor in legacy:
            platforms.append(f"{legacy[minor]}_{machine}")
    platforms.append(f"linux_{machine}")
    major, _, minor_text = line.python.partition(".")
    version = (int(major), int(minor_text))
    interpreter = f"cp{version[0]}{version[1]}"
    ordered = [
        *cpython_tags(version, abis=[interpreter], platforms=platforms),
        *compatible_tags(version, interpreter=interpreter, platforms=platforms),
    ]
    return {tag: rank for rank, tag in enumerate(ordered)}


def choose_wheel(
    name: str, version: str, files: list["DistributionPackage"], tags: dict[Tag, int]
) -> LockedWheel:
    """The best file of a release, whose hash and size are known; else DistributionNotFoundError.

    A yanked one is taken, and named with its authors' reason.
    """
    ranked: dict[int, DistributionPackage] = {}
    for file in files:
        try:
            wheel_name, wheel_version, _, wheel_tags = parse_wheel_filename(file.filename)
        except InvalidWheelFilename:  # no wheel; or old, with e.g. a "py36+" tag: none takes them
            continue
        ranks = [tags[tag] for tag in wheel_tags if tag in tags]
        if (wheel_name, str(wheel_version)) == (name, version) and ranks:
            ranked.setdefault(min(ranks), file)
    if not ranked:
        what = f"{name} {version} has no wheel for the image's platform"
        remedy = "constrain it in the line's row to a version with one, or use another index"
        raise errors.DistributionNotFoundError(what, remedy=remedy)
    best = ranked[min(ranked)]
    if best.is_yanked:  # an exact pin takes it, and uv says so only where it is not --quiet
        text = f"{best.filename}: {best.yanked_reason or 'no reason given'}"
        console.print(f"[yellow]yanked[/] {escape(printable(text))}")
    sha256, size = pins(best)
    return LockedWheel(name=name, version=version, filename=best.filename, size=size, sha256=sha256)


def _text(line_name: str, line: Line, base: Base, wheels: list[LockedWheel]) -> str:
    header = [
        f"# vLLM {line.vllm} for Python {line.python} on {base.platform}. Made by:",
        f"#     nox -s lock -- --line {line_name}",
        "# Do not edit: change the line's row in matrix.toml and make it again.",
        f"# input: {input_digest(line, base)}",
        f"# total: {len(wheels)} wheels, {sum(wheel.size for wheel in wheels)} bytes",
        *(f"# constraint {item.requirement}: {item.reason}" for item in line.constraints),
        *(f"# override {item.requirement}: {item.reason}" for item in line.overrides),
    ]
    rows = [
        f"{w.name}=={w.version} --hash=sha256:{w.sha256}  # {w.filename} {w.size}" for w in wheels
    ]
    return "\n".join([*header, *rows]) + "\n"
