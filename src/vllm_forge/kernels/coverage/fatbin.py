"""Device code in a host library: fatbins, and in each of them one entry per target.

The layout is NVIDIA's and not documented. It was worked out from what nvcc 12.x and 13.x write
and from every library of the three lines; ``tests/toolkit`` compiles each form and compares with
cuobjdump. Whatever is not known here is an error, never skipped.

    fatbin   u32 magic, u16 version 1, u16 header size 16, u64 size of the entries
    entry    +0  u16 kind, u16 version 0x101, u32 header size, u64 payload size (padded to 8)
             +16 u32 compressed size or 0, +28 u32 architecture, +40 u64 flags,
             +56 u64 size when decompressed or 0

cuobjdump prints ``sm_120`` for sm_120 and sm_120f alike; flag bits 20 (``a``) and 21 (``f``)
tell them apart.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from vllm_forge.kernels.coverage.elf import is_elf, sections
from vllm_forge.kernels.coverage.target import Kind, Suffix, Target
from vllm_forge.kernels.errors import UnknownFatbinError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from mmap import mmap

    from vllm_forge.kernels.coverage.elf import Section

Compression: TypeAlias = Literal["", "lz4", "zstd"]

# Relocatable device code (nvcc -rdc) has a section of its own.
SECTIONS = (".nv_fatbin", "__nv_relfatbin")
MAGIC = 0xBA55ED50
KINDS: dict[int, Kind] = {1: "ptx", 2: "cubin", 8: "lto"}

BITS_64, DEBUG, LINUX = 1 << 0, 1 << 1, 1 << 4
LZ4, ZSTD = 1 << 13, 1 << 15
LTO = 1 << 16
EXACT, FAMILY = 1 << 20, 1 << 21
NEW_ABI = 1 << 24  # set for cubins from sm_100 on
KNOWN = BITS_64 | DEBUG | LINUX | LZ4 | ZSTD | LTO | EXACT | FAMILY | NEW_ABI

_FATBIN = struct.Struct("<IHHQ")
_ENTRY = struct.Struct("<HHIQIIHHIIIQQQ")
_START = struct.pack("<IHH", MAGIC, 1, _FATBIN.size)
_ENTRY_VERSION = 0x101
_ALIGN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """One entry of a fatbin: device code for one target.

    Attributes:
        kind: machine code (cubin), PTX, or LTO intermediate code.
        target: what it was compiled for.
        header: where the entry's header is in the file.
        offset: where its payload is in the file, in bytes.
        size: bytes of the payload, with its padding.
        stored: bytes of the payload that are a compressed stream; ``size`` where it is not.
        unpacked: bytes when decompressed; ``size`` where it is not compressed.
        compression: how the payload is compressed, "" where it is not.
        module: which fatbin of the file it belongs to, counted from 0 in file order.
        section: name of the section it is in.
    """

    kind: Kind
    target: Target
    header: int
    offset: int
    size: int
    stored: int
    unpacked: int
    compression: Compression
    module: int
    section: str

    @property
    def compressed(self) -> bool:
        """Whether the payload must be decompressed to be read."""
        return self.compression != ""


def device_code(buffer: bytes | mmap, name: str = "") -> list[Code]:
    """All device code of a file; empty where it is no ELF file or has none.

    Besides the two sections that nvcc fills, NVIDIA's libraries keep fatbins in their data
    (cuBLASLt in ``.cask_resource``, cuFFT in ``.ldata``, cuSPARSE in ``.rodata``). They are found
    by the first eight bytes of a fatbin, and must be complete ones.

    Args:
        buffer: the file, e.g. as a read-only mmap.
        name: of the file, for the message of an error.

    Raises:
        UnknownFatbinError: a magic, version, kind or flag that is not known, an entry that ends
            outside its fatbin, or bytes in a fatbin section that are in no fatbin.
    """
    found: list[Code] = []
    if not is_elf(buffer):
        return found
    module = 0
    for section in sorted(sections(buffer), key=lambda section: section.offset):
        if section.executable:
            continue  # code that writes a fatbin has its first bytes as constants
        starts = _packed if section.name in SECTIONS else _scattered
        for start in starts(buffer, section, name):
            found += _entries(buffer, section, start, module, name)
            module += 1
    return found


def present(buffer: bytes | mmap, codes: Iterable[Code]) -> list[Code]:
    """The code that is there: a slim library has headers of foreign code, and zeros behind them.

    Nothing could run zeros, so leaving them out can only make a contract stricter.
    """
    return [code for code in codes if any(buffer[code.offset : code.offset + code.size])]


def _packed(buffer: bytes | mmap, section: Section, name: str) -> Iterator[int]:
    """Where fatbins start in a section that holds nothing else but zeros between them."""
    at, end = section.offset, section.offset + section.size
    while at < end:
        if buffer[at : at + 4] == _START[:4]:
            size = _size(buffer, at, end, section, name)
            yield at
            at += _FATBIN.size + size
        elif any(buffer[at : min(at + _ALIGN, end)]):
            raise _unknown("bytes that belong to no fatbin", at, section, name)
        else:
            at += _ALIGN


def _scattered(buffer: bytes | mmap, section: Section, name: str) -> Iterator[int]:
    """Where fatbins start in a section that holds other data too."""
    end = section.offset + section.size
    at = buffer.find(_START, section.offset, end)
    while at >= 0:
        size = _size(buffer, at, end, section, name)
        yield at
        at = buffer.find(_START, at + _FATBIN.size + size, end)


def _size(buffer: bytes | mmap, at: int, end: int, section: Section, name: str) -> int:
    """Bytes of the entries of the fatbin at ``at``."""
    if end - at < _FATBIN.size:
        raise _unknown("a fatbin header that the section cuts off", at, section, name)
    magic, version, header, size = _FATBIN.unpack_from(buffer, at)
    if (magic, version, header) != (MAGIC, 1, _FATBIN.size):
        raise _unknown(
            f"fatbin version {version} with a header of {header} bytes", at, section, name
        )
    if at + header + size > end:
        raise _unknown("a fatbin that is longer than its section", at, section, name)
    return int(size)


def _entries(
    buffer: bytes | mmap, section: Section, start: int, module: int, name: str
) -> Iterator[Code]:
    at = start + _FATBIN.size
    end = at + _FATBIN.unpack_from(buffer, start)[3]
    while at < end:
        if end - at < _ENTRY.size:
            raise _unknown("an entry that the fatbin cuts off", at, section, name)
        row = _ENTRY.unpack_from(buffer, at)
        kind, version, header, size, packed, _, _, _, arch, _, _, flags, _, unpacked = row
        if kind not in KINDS or version != _ENTRY_VERSION or header < _ENTRY.size:
            raise _unknown(
                f"an entry of kind {kind}, version {version:#x}, header {header} bytes",
                at, section, name,
            )  # fmt: skip
        if flags & ~KNOWN or not flags & BITS_64 or bool(flags & LTO) != (KINDS[kind] == "lto"):
            raise _unknown(f"an entry with flags {flags:#x}", at, section, name)
        if at + header + size > end:
            raise _unknown("an entry that is longer than its fatbin", at, section, name)
        compression = _compression(flags)
        if compression is None or bool(compression) != bool(packed) or packed > size:
            raise _unknown(
                f"an entry with flags {flags:#x} and {packed} compressed bytes", at, section, name
            )
        yield Code(
            kind=KINDS[kind],
            target=_target(arch, flags, at, section, name),
            header=at,
            offset=at + header,
            size=size,
            stored=packed or size,
            unpacked=unpacked if packed else size,
            compression=compression,
            module=module,
            section=section.name,
        )
        at += header + size


def _compression(flags: int) -> Compression | None:
    match bool(flags & LZ4), bool(flags & ZSTD):
        case False, False:
            return ""
        case True, False:
            return "lz4"
        case False, True:
            return "zstd"
    return None


def _target(arch: int, flags: int, at: int, section: Section, name: str) -> Target:
    exact, family = bool(flags & EXACT), bool(flags & FAMILY)
    if not 10 <= arch < 1000 or (exact and family):  # noqa: PLR2004 - sm_10 to sm_999
        raise _unknown(f"architecture {arch} with flags {flags:#x}", at, section, name)
    suffix: Suffix = "a" if exact else "f" if family else ""
    return Target(arch // 10, arch % 10, suffix)


def _unknown(what: str, at: int, section: Section, name: str) -> UnknownFatbinError:
    return UnknownFatbinError(
        f"device code in an unknown layout: {what}",
        where=f"{name or 'a library'}, section {section.name}, byte {at:#x}",
        remedy="a toolkit wrote this that the census has not seen: compare with cuobjdump and "
        "teach census/fatbin.py the layout, with a fixture",
    )
