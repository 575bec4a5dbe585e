"""The census of one library, kept in the cache by what is in the file.

Reading the names in a library costs a second or two; looking them up again costs a stat.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_forge.host import atomic_path, cache_root, exclusive
from vllm_forge.kernels.coverage.fatbin import device_code, present
from vllm_forge.kernels.coverage.kernels import by_bodies, kernels, without_stubs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Raise when the same file would get another census.
FORMAT = 1


class Group(BaseModel):
    """Kernels of one pattern that have code for the same targets.

    Attributes:
        code: e.g. ``("cubin 120f", "ptx 80")``; stubs do not count.
        kernels: how many.
        example: the mangled name of one, cut.
    """

    model_config = ConfigDict(frozen=True)

    code: tuple[str, ...]
    kernels: int
    example: str


class LibraryCensus(BaseModel):
    """What device code a library holds.

    Attributes:
        sha256: of the file.
        size: of the file, in bytes.
        code: ``cubin 120f`` -> bytes of all such payloads, as they are in the file.
        patterns: pattern -> its kernels, by what they were compiled for.
    """

    model_config = ConfigDict(frozen=True)

    sha256: str
    size: int
    code: dict[str, int]
    patterns: dict[str, tuple[Group, ...]]


def census(path: Path, patterns: Sequence[str] = ()) -> LibraryCensus:
    """The census of a file, from the cache where the same bytes were read before.

    Args:
        path: any file; one without device code has an empty census.
        patterns: regular expressions to count kernels by, searched for in mangled names.

    Raises:
        UnknownFatbinError: see device_code and kernels.
    """
    rules = hashlib.sha256(json.dumps([FORMAT, sorted(patterns)]).encode()).hexdigest()
    if (known := _known(path, rules)) is not None:
        return known
    with exclusive("census", wait=True):
        if (known := _known(path, rules)) is not None:
            return known
        sha256 = _hash(path)
        kept = _kept(sha256, rules)
        if (known := _load(kept)) is None:
            known = _read(path, sha256, patterns)
            with atomic_path(kept) as aside:
                aside.write_text(known.model_dump_json(indent=1) + "\n")
        return known


def _known(path: Path, rules: str) -> LibraryCensus | None:
    """The kept census of a file that was not touched since it was hashed."""
    try:
        record = json.loads(_stamp_path(path).read_text())
        untouched = record["stamp"] == _stamp(path)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return _load(_kept(record["sha256"], rules)) if untouched else None


def _load(kept: Path) -> LibraryCensus | None:
    try:
        return LibraryCensus.model_validate_json(kept.read_text())
    except (FileNotFoundError, ValidationError):
        return None


def _kept(sha256: str, rules: str) -> Path:
    return cache_root() / "census" / f"{sha256}-{rules[:16]}.json"


def _read(path: Path, sha256: str, patterns: Sequence[str]) -> LibraryCensus:
    with mapped(path) as buffer:
        codes = present(buffer, device_code(buffer, str(path)))
        names = kernels(buffer, str(path), codes) if patterns else {}
        code: Counter[str] = Counter()
        for item in codes:
            code[f"{item.kind} {item.target}"] += item.size
    groups = {}
    for pattern in sorted(patterns):
        search = re.compile(pattern).search
        matched = {name: without_stubs(bodies) for name, bodies in names.items() if search(name)}
        groups[pattern] = tuple(
            Group(
                code=tuple(f"{kind} {target}" for kind, target in bodies),
                kernels=len(members),
                example=min(members)[:160],
            )
            for bodies, members in sorted(by_bodies(matched).items())
        )
    return LibraryCensus(
        sha256=sha256, size=path.stat().st_size, code=dict(sorted(code.items())), patterns=groups
    )


@contextmanager
def mapped(path: Path) -> Iterator[bytes | mmap.mmap]:
    """The bytes of a file, read when they are looked at."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            yield buffer


def _stamp_path(path: Path) -> Path:
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    return cache_root() / "census" / "files" / f"{name}.json"


def _stamp(path: Path) -> list[int]:
    """What the inode says, as in git's index.

    The change time cannot be set back, so a file that was written to is read again.
    """
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _hash(path: Path) -> str:
    """SHA-256 of a file, and a note of its stamp from before it was read."""
    stamp = _stamp(path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    with atomic_path(_stamp_path(path)) as aside:
        aside.write_text(json.dumps({"stamp": stamp, "sha256": sha256}) + "\n")
    return sha256
