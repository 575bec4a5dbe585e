"""Wheels as they are installed: paths, scripts and RECORD as pypa/installer decides them.

The library is given a destination that collects entries instead of writing files, so that
the bytes of a wheel's members need not be inflated to know where they go.
"""

from __future__ import annotations

import configparser
import csv
import hashlib
import io
import posixpath
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from os import PathLike, fsencode, fspath
from typing import TYPE_CHECKING, BinaryIO, cast

import installer
from installer.destinations import WheelDestination
from installer.exceptions import InstallerError
from installer.records import Hash, InvalidRecordEntry, RecordEntry, parse_record_file
from installer.scripts import Script
from installer.sources import WheelFile
from installer.utils import construct_record_file, fix_shebang

from vllm_forge.sources.errors import WheelError
from vllm_forge.sources.wheel_format import record_hash, record_row

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from installer.scripts import ScriptSection
    from installer.sources import WheelContentElement
    from installer.utils import Scheme

VENV = "opt/venv"
INSTALLER = b"vllm-forge\n"
LONGEST, PART = 1000, 255  # bytes of a member's name, and of a part of it
# Hash in RECORD -> that of the file, where a wheel as published has a wrong one: the libraries of
# pynvvideocodec 2.0.4 were changed after its RECORD was written.
PUBLISHED_WRONG = {
    "sha256=v6ESUJdMqaDlvvsxhm7YIoga42tCHowiil1kNY-DLow":
        "sha256=nlz4ed1FQLSo5RB1mDNLAJbVUdeRHSNc0WmlU7HPY2s",
    "sha256=RrFURoF8T8gqF6A-LewcSfiZQOkMV3AljzOgv7XNdm4":
        "sha256=sOM0hO7E3ySvLJBow9fKStktTZhTXT4GtojyfqqaBBs",
}  # fmt: skip
# What a wheel that is not valid makes zipfile, csv, configparser, email and installer raise.
UNREADABLE = (
    ValueError, LookupError, AssertionError, AttributeError, EOFError, RuntimeError,
    zipfile.BadZipFile, zlib.error, configparser.Error, csv.Error, InstallerError,
    InvalidRecordEntry,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One file or link to be in the image, its path relative to the root.

    It has one of: ``content``; a ``member`` of the zip ``archive``, with the hash ``recorded``
    (``sha256=...``, empty if RECORD has none); ``link``, the target of a symbolic link.
    """

    path: str
    mode: int = 0o644
    content: bytes | None = None
    archive: Path | None = None
    member: zipfile.ZipInfo | None = None
    link: str | None = None
    recorded: str = ""

    @property
    def fingerprint(self) -> tuple[int, int | str]:
        """Distinguishes equal duplicates from conflicts: size and CRC-32, or the link's target."""
        if self.member is not None:
            return self.member.file_size, self.member.CRC
        if self.content is not None:
            return len(self.content), zlib.crc32(self.content)
        return -1, self.link or ""


def site_packages(python: str) -> str:
    """Where modules are in the image, relative to the root."""
    return f"{VENV}/lib/python{python}/site-packages"


def wheel_entries(path: Path, python: str) -> list[Entry]:
    """What installing a wheel for a Python (``3.13``) puts where; or WheelError."""
    try:
        with _LazyWheel.open(path) as wheel:
            collector = _Collector(path, python)
            installer.install(wheel, collector, {"INSTALLER": INSTALLER})
    except UNREADABLE as error:
        # Not the error itself: some of installer's cannot be sent from a worker process.
        what = f"{path.name} cannot be installed: {type(error).__name__}: {error}"
        remedy = "do not use this wheel; lock another version, or build one that is valid"
        raise WheelError(what, where=path, remedy=remedy) from None
    return collector.entries


def merge(groups: Iterable[list[Entry]]) -> list[Entry]:
    """One list, sorted by path; of two entries for one path the later one wins.

    Wheels that differ there are refused once the image is complete, see layer_checks.

    Raises WheelError: one is a file where another has a folder.
    """
    by_path = {entry.path: entry for group in groups for entry in group}
    for folder in folders_of(by_path) & by_path.keys():
        path = next(path for path in by_path if path.startswith(f"{folder}/"))
        raise WheelError(f"{path} is below another file", where=by_path[path].archive or "")
    return [by_path[path] for path in sorted(by_path)]


def folders_of(paths: Iterable[str]) -> set[str]:
    """All parent folders of relative paths."""
    folders: set[str] = set()
    for path in paths:
        parent = posixpath.dirname(path)
        while parent and parent not in folders:
            folders.add(parent)
            parent = posixpath.dirname(parent)
    return folders


class _Member(io.RawIOBase):
    """A member's bytes on their way through the installer library, read only on demand."""

    def __init__(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, recorded: str) -> None:
        super().__init__()
        self.info = info
        self.recorded = recorded
        self._archive = archive

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        assert size < 0  # noqa: S101 - small members only are read, and as a whole
        with self._archive.open(self.info) as stream:
            content = stream.read()
        if self.recorded not in ("", record_row(content)[0]):
            raise ValueError(f"{self.info.filename} does not have the hash in RECORD")
        return content


class _LazyWheel(WheelFile):
    """A wheel whose members are handed on without being inflated."""

    def get_contents(self) -> Iterator[WheelContentElement]:
        names = self._zipfile.namelist()
        for name in names:
            if len(fsencode(name)) > LONGEST or max(map(len, fsencode(name).split(b"/"))) > PART:
                raise ValueError(f"too long a member name: {name[:PART]}")
            if not name.isprintable() or name.startswith("/") or "\\" in name:
                raise ValueError(f"invalid member name {name!r}")
        listed = list(parse_record_file(self.read_dist_info("RECORD").splitlines()))
        rows = {row[0]: row for row in listed}
        for place, paths in (("the archive", names), ("RECORD", [row[0] for row in listed])):
            if twice := sorted(path for path, count in Counter(paths).items() if count > 1):
                raise ValueError(f"duplicate in {place}: {', '.join(twice[:3])}")
        self.validate_record(validate_contents=False)  # contents: where they are inflated
        if gone := sorted(rows.keys() - set(names)):
            raise ValueError(f"in RECORD but not in the archive: {', '.join(gone[:3])}")
        for info in self._zipfile.infolist():
            if info.is_dir():
                continue
            row = rows.get(info.filename, (info.filename, "", ""))
            executable = bool(info.external_attr >> 16 & 0o111)
            yield row, cast("BinaryIO", _Member(self._zipfile, info, row[1])), executable


class _Collector(WheelDestination):
    """Turns the installer library's writes into entries below the virtual environment."""

    def __init__(self, archive: Path, python: str) -> None:
        self.entries: list[Entry] = []
        self._archive = archive
        self._interpreter = f"/{VENV}/bin/python"
        self._site = site_packages(python)
        self._folders: dict[str, str] = {
            "purelib": self._site,
            "platlib": self._site,
            "headers": f"{VENV}/include/site/python{python}",
            "scripts": f"{VENV}/bin",
            "data": VENV,
        }

    def write_script(
        self, name: str, module: str, attr: str, section: ScriptSection
    ) -> RecordEntry:
        script_name, content = Script(name, module, attr, section).generate(
            self._interpreter, "posix"
        )
        return self._add("scripts", script_name, content, executable=True)

    def write_file(
        self,
        scheme: Scheme,
        path: str | PathLike[str],
        stream: BinaryIO,
        is_executable: bool,
    ) -> RecordEntry:
        path = fspath(path)
        if scheme == "scripts":
            with fix_shebang(io.BytesIO(stream.read()), self._interpreter) as fixed:
                return self._add(scheme, path, fixed.read(), executable=True)
        if not isinstance(stream, _Member):
            return self._add(scheme, path, stream.read(), executable=is_executable)
        self.entries.append(
            Entry(
                path=self._target(scheme, path),
                mode=0o755 if is_executable else 0o644,
                archive=self._archive,
                member=stream.info,
                recorded=PUBLISHED_WRONG.get(stream.recorded, stream.recorded),
            )
        )
        hash_ = Hash.parse(stream.recorded) if stream.recorded else None
        return RecordEntry(path, hash_, stream.info.file_size)

    def finalize_installation(
        self, scheme: Scheme, record_file_path: str, records: Iterable[tuple[Scheme, RecordEntry]]
    ) -> None:
        with construct_record_file(records, self._record_prefix) as stream:
            self._add(scheme, record_file_path, stream.read(), executable=False)

    def _add(self, scheme: str, path: str, content: bytes, *, executable: bool) -> RecordEntry:
        mode = 0o755 if executable else 0o644
        self.entries.append(Entry(path=self._target(scheme, path), mode=mode, content=content))
        value = record_hash(hashlib.sha256(content).digest())
        return RecordEntry(path, Hash("sha256", value), len(content))

    def _target(self, scheme: str, path: str) -> str:
        folder = self._folders[scheme]
        target = posixpath.normpath(posixpath.join(folder, path))
        if not target.startswith(f"{folder}/"):  # pip refuses it as well
            raise WheelError(f"the wheel writes outside of {folder}: {path}", where=self._archive)
        return target

    def _record_prefix(self, scheme: str) -> str | None:
        folder = self._folders[scheme]
        return None if folder == self._site else posixpath.relpath(folder, self._site) + "/"
