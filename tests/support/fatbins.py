"""Device code made by hand: cubins, fatbins and libraries with them, and code taken out again.

The layout is written down here a second time, on its own: what reads it must not be what writes
it. ``tests/toolkit`` compares the reader with what nvcc writes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence

import zstandard

MAGIC = 0xBA55ED50
BITS_64, LINUX, LZ4, ZSTD, LTO, EXACT, FAMILY, NEW_ABI = (
    1 << bit for bit in (0, 4, 13, 15, 16, 20, 21, 24)
)
KINDS = {"ptx": 1, "cubin": 2, "lto": 8}
TARGET = re.compile(r"(\d+)([af]?)")


def elf(
    sections: Sequence[tuple[str, int, int, bytes, int]], *, abi: int = 0, flags: int = 0
) -> bytes:
    """An ELF file of sections (name, type, flags, content, link)."""
    names = b"\0"
    rows = [(0, 0, 0, b"", 0)]
    for name, kind, section_flags, content, link in [*sections, (".shstrtab", 3, 0, b"", 0)]:
        rows.append((len(names), kind, section_flags, content, link))
        names += name.encode() + b"\0"
    rows[-1] = (*rows[-1][:3], names, 0)
    body, table, at = b"", b"", 64
    for name_at, kind, section_flags, content, link in rows:
        pad = -at % 8
        body += b"\0" * pad + content
        at += pad
        entry = 24 if kind == 2 else 0
        table += struct.pack(
            "<IIQQQQIIQQ",
            name_at, kind, section_flags, 0, at if kind else 0, len(content), link, 0, 8, entry,
        )  # fmt: skip
        at += len(content)
    header = b"\x7fELF\x02\x01\x01" + bytes([0, abi]) + bytes(7)
    header += struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, at, flags, 64, 56, 0, 64, len(rows), len(rows) - 1
    )
    return header + body + table


def _parts(target: str) -> tuple[str, str]:
    match = TARGET.fullmatch(target)
    assert match, target
    return match[1], match[2]


def cubin(target: str, kernels: Mapping[str, int]) -> bytes:
    """Machine code with kernels of these names and sizes in bytes."""
    arch, suffix = _parts(target)
    names, symbols = b"\0", bytes(24)
    for name, size in kernels.items():
        symbols += struct.pack("<IBBHQQ", len(names), 0x12, 0x10, 1, 0, size)
        names += name.encode() + b"\0"
    # A device function, which is no kernel.
    symbols += struct.pack("<IBBHQQ", len(names), 0x12, 0, 1, 0, 64)
    names += b"helper\0"
    note = f"ptxas\0 -arch sm_{arch}{suffix} -m 64 \0".encode()
    return elf(
        [
            (".text", 1, 6, b"", 0),
            (".strtab", 3, 0, names, 0),
            (".symtab", 2, 0, symbols, 2),
            (".note.nv.tkinfo", 7, 0, note, 0),
        ],
        abi=8,
        flags=0x06000002 | int(arch) << 8,
    )


def ptx(target: str, kernels: Sequence[str]) -> bytes:
    """PTX with these kernels."""
    bodies = "".join(f".visible .entry {name}(\n)\n{{ ret; }}\n" for name in kernels)
    return f".version 9.0\n.target sm_{target}\n{bodies}".encode()


def entry(
    kind: str,
    target: str,
    payload: bytes = b"payload!",
    *,
    compress: bool = False,
    version: int = 0x101,
    flags: int = 0,
    number: int | None = None,
) -> bytes:
    """One entry; ``flags`` are set besides the right ones, ``number`` replaces the kind's."""
    arch, suffix = _parts(target)
    flags |= BITS_64 | LINUX | {"a": EXACT, "f": FAMILY, "": 0}[suffix]
    flags |= LTO if kind == "lto" else 0
    flags |= NEW_ABI if kind == "cubin" and int(arch) >= 100 else 0
    unpacked, stored = len(payload), 0
    if compress:
        payload = zstandard.ZstdCompressor().compress(payload)
        stored, flags = len(payload), flags | ZSTD
    payload += bytes(-len(payload) % 8)
    header = struct.pack(
        "<HHIQIIHHIIIQQQ",
        KINDS[kind] if number is None else number, version, 64, len(payload), stored, 0,
        8, 1, int(arch), 0, 0, flags, 0, unpacked if stored else 0,
    )  # fmt: skip
    return header + payload


def fatbin(*entries: bytes, version: int = 1) -> bytes:
    """A fatbin of these entries."""
    body = b"".join(entries)
    return struct.pack("<IHHQ", MAGIC, version, 16, len(body)) + body


def library(*fatbins: bytes, section: str = ".nv_fatbin", flags: int = 2) -> bytes:
    """A library with fatbins in one section."""
    return elf([(".text", 1, 6, b"\xc3", 0), (section, 1, flags, b"".join(fatbins), 0)])


def kernel_library(code: Mapping[str, Mapping[str, int] | Sequence[str]]) -> bytes:
    """A library with one fatbin: ``{"cubin 120f": {"kernel": size}, "ptx 80": ["kernel"]}``."""
    entries = []
    for name, kernels in code.items():
        kind, _, target = name.partition(" ")
        made = cubin(target, kernels) if isinstance(kernels, Mapping) else ptx(target, kernels)
        entries.append(entry(kind, target, made, compress=True))
    return library(fatbin(*entries))


def without(content: bytes, doomed: Callable[[int, int], bool]) -> bytes:
    """The library less the entries whose kind and architecture are doomed.

    In each fatbin the remaining entries move up and zeros follow; nothing else moves.
    """
    out = bytearray(content)
    start = struct.pack("<IHH", MAGIC, 1, 16)
    at = content.find(start)
    while at >= 0:
        (size,) = struct.unpack_from("<Q", content, at + 8)
        kept, here = b"", at + 16
        while here < at + 16 + size:
            kind, _, header, payload = struct.unpack_from("<HHIQ", content, here)
            (arch,) = struct.unpack_from("<I", content, here + 28)
            end = here + header + payload
            kept += b"" if doomed(kind, arch) else content[here:end]
            here = end
        out[at : at + 16 + size] = (
            start + struct.pack("<Q", len(kept)) + kept + bytes(size - len(kept))
        )
        at = content.find(start, at + 16 + size)
    return bytes(out)
