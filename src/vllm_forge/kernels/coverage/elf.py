"""ELF: just the sections and the symbols of 64-bit little-endian files.

Source: the System V ABI, "Object Files". pyelftools reads them too, but a census looks into tens
of thousands of cubins, and there it takes minutes where this takes seconds.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from mmap import mmap

MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little endian
NO_BYTES = (0, 8)  # SHT_NULL, SHT_NOBITS: nothing in the file
SYMBOLS = 2  # SHT_SYMTAB
EXECUTABLE = 0x4  # SHF_EXECINSTR
FUNCTION = 2  # STT_FUNC

_HEADER = struct.Struct("<QIHHHHHH")  # e_shoff to e_shstrndx, at 0x28
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A section that has bytes in the file: ``size`` of them at ``offset``."""

    name: str
    kind: int
    flags: int
    offset: int
    size: int
    link: int

    @property
    def executable(self) -> bool:
        """Whether it holds code of the host."""
        return bool(self.flags & EXECUTABLE)


def is_elf(buffer: bytes | mmap) -> bool:
    """Whether this is an ELF file of the kind that is read here."""
    return buffer[: len(MAGIC)] == MAGIC


def _rows(buffer: bytes | mmap) -> tuple[list[tuple[int, ...]], int]:
    start, _, _, _, _, entry, count, names = _HEADER.unpack_from(buffer, 0x28)
    if start == 0 or entry != _SECTION.size:
        return [], 0
    return [_SECTION.unpack_from(buffer, start + i * entry) for i in range(count)], names


def _text(buffer: bytes | mmap, offset: int) -> str:
    return bytes(buffer[offset : buffer.find(b"\0", offset)]).decode()


def sections(buffer: bytes | mmap) -> list[Section]:
    """The sections with bytes in the file, in the header's order."""
    rows, names = _rows(buffer)
    return [
        Section(
            name=_text(buffer, rows[names][4] + row[0]),
            kind=row[1],
            flags=row[2],
            offset=row[4],
            size=row[5],
            link=row[6],
        )
        for row in rows
        if row[1] not in NO_BYTES
    ]


def functions(buffer: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, ``st_other`` and size in bytes of each function that the symbol table defines."""
    rows, _ = _rows(buffer)
    for row in rows:
        if row[1] != SYMBOLS:
            continue
        names = rows[row[6]][4]
        symbols = buffer[row[4] : row[4] + row[5]]
        for name, info, other, where, _, size in _SYMBOL.iter_unpack(symbols):
            if info & 0xF == FUNCTION and where:
                yield _text(buffer, names + name), other, size
