"""Device code in a host library: ELF sections, the fatbins in them, an entry per target.

The fatbin's layout is NVIDIA's and not documented. It was derived from the output of nvcc 12.x and
13.x and from every library of the three lines; ``tests/toolkit`` compiles each form and compares
with cuobjdump. Unknown values are an error, never skipped.

    fatbin   u32 magic, u16 version 1, u16 header size 16, u64 size of the entries
    entry    +0  u16 kind, u16 version 0x101, u32 header size, u64 payload size (padded to 8)
             +16 u32 compressed size or 0, +28 u32 architecture, +40 u64 flags,
             +56 u64 size when decompressed or 0

cuobjdump prints ``sm_120`` for sm_120 and sm_120f alike; flag bits 20 (``a``) and 21 (``f``)
tell them apart.

Targets: CUDA Programming Guide, "Compute Capabilities", sections on binary compatibility and on
architecture- and family-specific features; nvcc's manual, "GPU Feature List".

ELF: System V ABI, "Object Files"; 64-bit little-endian files only. pyelftools takes minutes for
the tens of thousands of cubins of an image, this reader seconds.
"""

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap
from typing import Literal, Self, TypeAlias, cast

from vllm_forge.kernels.errors import UnknownFatbinError, UnknownTargetError

Kind: TypeAlias = Literal["cubin", "ptx", "lto"]
Suffix: TypeAlias = Literal["", "a", "f"]
Capability: TypeAlias = tuple[int, int]

_NAME = re.compile(r"(?:(?:sm|compute|lto)_)?(\d+)\.?(\d)([af]?)")

# The capabilities that code for family target ``XYf`` runs on. A GPU that NVIDIA has not put into
# a family is not in it, however near its number: 10.1 was never one of 100f.
FAMILIES: dict[Capability, frozenset[Capability]] = {
    (10, 0): frozenset({(10, 0), (10, 3)}),
    (10, 1): frozenset({(10, 1)}),
    (10, 3): frozenset({(10, 3)}),
    (11, 0): frozenset({(11, 0)}),
    (12, 0): frozenset({(12, 0), (12, 1)}),
    (12, 1): frozenset({(12, 1)}),
}

ELF_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little endian
NO_BYTES = (0, 8)  # SHT_NULL, SHT_NOBITS: nothing in the file
SYMBOLS = 2  # SHT_SYMTAB
EXECUTABLE = 0x4  # SHF_EXECINSTR
FUNCTION = 2  # STT_FUNC
_HEADER = struct.Struct("<QIHHHHHH")  # e_shoff to e_shstrndx, at 0x28
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")

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
COMPRESSIONS = {0: "", LZ4: "lz4", ZSTD: "zstd"}

_FATBIN = struct.Struct("<IHHQ")
_ENTRY = struct.Struct("<HHIQIIHHIIIQQQ")
_START = struct.pack("<IHH", MAGIC, 1, _FATBIN.size)
_ENTRY_VERSION = 0x101
_ALIGN = 8


@dataclass(frozen=True, order=True)
class Target:
    """``major.minor`` and the suffix: none, ``a`` (this GPU only) or ``f`` (its family)."""

    major: int
    minor: int
    suffix: Suffix = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read e.g. ``sm_100a``, ``compute_80``, ``120f`` or ``10.3a``."""
        match = _NAME.fullmatch(text)
        if match is None:
            what = f"invalid CUDA target {text!r}"
            raise UnknownTargetError(what, remedy="use e.g. sm_100a, 120f or 9.0a")
        return cls(int(match[1]), int(match[2]), cast("Suffix", match[3]))

    def __str__(self) -> str:
        return f"{self.major}{self.minor}{self.suffix}"

    @property
    def capability(self) -> Capability:
        return self.major, self.minor


def parse_capability(text: str) -> Capability:
    target = Target.parse(text)
    if target.suffix or "." not in text:
        raise UnknownTargetError(f"invalid compute capability {text!r}", remedy="use e.g. 10.3")
    return target.capability


def runs_on(target: Target, kind: Kind, capability: Capability) -> bool:
    """Whether code of this target and kind can be loaded on a GPU of that capability.

    Machine code (cubin) runs within its major version, from its minor version on. PTX and LTO
    intermediate code is compiled by the driver (or nvJitLink) for any later GPU. With suffix
    ``a`` both run on exactly the GPU they name, with ``f`` on its family.
    """
    if target.suffix == "a":
        return target.capability == capability
    if target.suffix == "f":
        if target.capability not in FAMILIES:
            raise UnknownTargetError(
                f"unknown family target {target}",
                where="kernels/coverage/device_code.py, FAMILIES",
                remedy="add the family's members from the CUDA Programming Guide",
            )
        return capability in FAMILIES[target.capability]
    if kind == "cubin" and target.major != capability[0]:
        return False
    return capability >= target.capability


@dataclass(frozen=True, slots=True)
class Section:
    name: str
    executable: bool
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """An entry of a fatbin: device code for one target. All sizes are in bytes."""

    kind: Kind
    target: Target
    header: int  # where the entry's header is in the file
    offset: int  # where its payload is
    size: int  # of the payload, with its padding
    stored: int  # of the payload's compressed stream; `size` if not compressed
    unpacked: int  # when decompressed; `size` if not compressed
    compression: str  # of COMPRESSIONS
    section: str


def is_elf(buffer: bytes | mmap) -> bool:
    return buffer[: len(ELF_MAGIC)] == ELF_MAGIC


@contextmanager
def readable_elf(name: str) -> Iterator[None]:
    """Raise UnknownFatbinError for an ELF file that cannot be read in the block."""
    try:
        yield
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        what, remedy = f"malformed ELF file: {error}", "download the library again"
        raise UnknownFatbinError(what, where=name or "a library", remedy=remedy) from None


def _section_rows(buffer: bytes | mmap) -> tuple[list[tuple[int, ...]], int]:
    start, _, _, _, _, entry, count, names = _HEADER.unpack_from(buffer, 0x28)
    if start == 0 or entry != _SECTION.size:
        return [], 0
    return [_SECTION.unpack_from(buffer, start + i * entry) for i in range(count)], names


def _text(buffer: bytes | mmap, offset: int) -> str:
    return bytes(buffer[offset : buffer.find(b"\0", offset)]).decode()


def sections(buffer: bytes | mmap) -> list[Section]:
    rows, names = _section_rows(buffer)
    if any(row[4] + row[5] > len(buffer) for row in rows if row[1] not in NO_BYTES):
        raise ValueError("a section that is not in the file")
    return [
        Section(_text(buffer, rows[names][4] + row[0]), bool(row[2] & EXECUTABLE), row[4], row[5])
        for row in rows
        if row[1] not in NO_BYTES
    ]


def functions(buffer: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, ``st_other`` and size in bytes of each function that the symbol table defines."""
    rows, _ = _section_rows(buffer)
    for row in rows:
        if row[1] != SYMBOLS:
            continue
        names = rows[row[6]][4]
        symbols = buffer[row[4] : row[4] + row[5]]
        for name, info, other, section, _, size in _SYMBOL.iter_unpack(symbols):
            if info & 0xF == FUNCTION and section:
                yield _text(buffer, names + name), other, size


def device_code(buffer: bytes | mmap, name: str = "") -> list[Code]:
    """All device code of a file; empty if it is not an ELF file or has none.

    Besides the two sections that nvcc fills, NVIDIA's libraries keep fatbins in their data
    (cuBLASLt in ``.cask_resource``, cuFFT in ``.ldata``, cuSPARSE in ``.rodata``). They are found
    by the first eight bytes of a fatbin, and must be complete, else UnknownFatbinError.
    """
    codes: list[Code] = []
    with readable_elf(name):
        found = sections(buffer) if is_elf(buffer) else []
    for section in sorted(found, key=lambda section: section.offset):
        if section.executable:
            continue  # code that writes a fatbin has its first bytes as constants
        scan = _Scan(buffer, section, name)
        for start, end in scan.fatbins():
            codes += scan.entries(start, end)
    return codes


@dataclass(frozen=True)
class _Scan:
    buffer: bytes | mmap
    section: Section
    name: str

    @property
    def end(self) -> int:
        return self.section.offset + self.section.size

    def fatbins(self) -> Iterator[tuple[int, int]]:
        """Start and end of each fatbin.

        A section of SECTIONS holds only fatbins, with zeros between them; others hold other data.
        """
        packed, at = self.section.name in SECTIONS, self.section.offset
        while at < self.end:
            if not packed and (at := self.buffer.find(_START, at, self.end)) < 0:
                return
            if self.buffer[at : at + 4] == _START[:4]:
                end = self._end(at)
                yield at, end
                at = end
            elif any(self.buffer[at : min(at + _ALIGN, self.end)]):
                raise self._unknown("bytes that belong to no fatbin", at)
            else:
                at += _ALIGN

    def _end(self, at: int) -> int:
        if self.end - at < _FATBIN.size:
            raise self._unknown("a fatbin header that the section cuts off", at)
        magic, version, header, size = _FATBIN.unpack_from(self.buffer, at)
        if (magic, version, header) != (MAGIC, 1, _FATBIN.size):
            raise self._unknown(f"fatbin version {version} with a header of {header} bytes", at)
        end: int = at + header + size
        if end > self.end:
            raise self._unknown("a fatbin that is longer than its section", at)
        return end

    def entries(self, start: int, end: int) -> Iterator[Code]:
        at = start + _FATBIN.size
        while at < end:
            if end - at < _ENTRY.size:
                raise self._unknown("an entry that the fatbin cuts off", at)
            row = _ENTRY.unpack_from(self.buffer, at)
            kind, version, header, size, packed, _, _, _, arch, _, _, flags, _, unpacked = row
            if kind not in KINDS or version != _ENTRY_VERSION or header < _ENTRY.size:
                what = f"an entry of kind {kind}, version {version:#x}, header {header} bytes"
                raise self._unknown(what, at)
            if flags & ~KNOWN or not flags & BITS_64 or bool(flags & LTO) != (KINDS[kind] == "lto"):
                raise self._unknown(f"an entry with flags {flags:#x}", at)
            if at + header + size > end:
                raise self._unknown("an entry that is longer than its fatbin", at)
            compression = COMPRESSIONS.get(flags & (LZ4 | ZSTD))
            if compression is None or bool(compression) != bool(packed) or packed > size:
                what = f"an entry with flags {flags:#x} and {packed} compressed bytes"
                raise self._unknown(what, at)
            exact, family = bool(flags & EXACT), bool(flags & FAMILY)
            if not 10 <= arch < 1000 or (exact and family):  # noqa: PLR2004 - sm_10 to sm_999
                raise self._unknown(f"architecture {arch} with flags {flags:#x}", at)
            suffix: Suffix = "a" if exact else "f" if family else ""
            yield Code(
                kind=KINDS[kind],
                target=Target(arch // 10, arch % 10, suffix),
                header=at,
                offset=at + header,
                size=size,
                stored=packed or size,
                unpacked=unpacked if packed else size,
                compression=compression,
                section=self.section.name,
            )
            at += header + size

    def _unknown(self, what: str, at: int) -> UnknownFatbinError:
        return UnknownFatbinError(
            f"device code in an unknown layout: {what}",
            where=f"{self.name or 'a library'}, section {self.section.name}, byte {at:#x}",
            remedy="compare with cuobjdump; add the layout to kernels/coverage/device_code.py, "
            "with a fixture",
        )
