"""The kernels of a library: their names, and for which targets each has a body.

A name alone says little: FlashMLA compiles its sm_90 kernels for sm_100f too, as a body that
prints "unsupported" and traps. So a body counts only where it is not a stub beside the kernel's
other bodies (without_stubs).
"""

from __future__ import annotations

import re
import struct
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zstandard

from vllm_forge.kernels.coverage.elf import functions, is_elf, sections
from vllm_forge.kernels.coverage.fatbin import device_code
from vllm_forge.kernels.coverage.target import Target
from vllm_forge.kernels.errors import UnknownFatbinError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from mmap import mmap

    from vllm_forge.kernels.coverage.fatbin import Code
    from vllm_forge.kernels.coverage.target import Kind

ENTRY = 0x10  # STO_CUDA_ENTRY in st_other: a kernel, not a device function
CUDA_ABI_FLAGS = struct.Struct("<BB")  # e_flags from byte 48; the second is the architecture
CUDA_ABI = 8  # e_ident[8] of cubins since CUDA 12.9
# "sm_90 kernel called on sm_100" costs 768 bytes with printf, 384 without; an empty one 128.
STUB_BYTES = 1024
STUB_SHARE = 0.05
PTX_ENTRY = re.compile(rb"\.entry\s+([\w$]+)")
TOOL_NOTE = ".note.nv.tkinfo"
NOTED = re.compile(rb"-arch[ =](sm_\d+[af]?)\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class Body:
    """One kernel compiled for one target; ``size`` in bytes of machine code, 0 for PTX."""

    kind: Kind
    target: Target
    size: int


def kernels(
    buffer: bytes | mmap, name: str = "", codes: Iterable[Code] | None = None
) -> dict[str, list[Body]]:
    """Bodies by the kernel's mangled name, stubs among them.

    Args:
        buffer: a library.
        name: of it, for the message of an error.
        codes: what device_code says of it, where that is known already.

    Raises:
        UnknownFatbinError: a payload that cannot be read, or is not for the target that its
            entry says.
    """
    found: dict[str, list[Body]] = defaultdict(list)
    unpacker = zstandard.ZstdDecompressor()
    for code in device_code(buffer, name) if codes is None else codes:
        if code.kind == "lto":
            continue  # has no names that can be read
        payload = _payload(buffer, code, unpacker, name)
        if code.kind == "ptx":
            for match in PTX_ENTRY.finditer(payload):
                found[match[1].decode()].append(Body(kind="ptx", target=code.target, size=0))
        else:
            _same_architecture(payload, code, name)
            for symbol, other, size in functions(payload):
                if other & ENTRY:
                    found[symbol].append(Body(kind="cubin", target=code.target, size=size))
    return dict(found)


def without_stubs(bodies: list[Body]) -> list[Body]:
    """The bodies that do the kernel's work.

    A stub is machine code of less than 1 KiB and less than a twentieth of the kernel's largest.
    """
    largest = max(body.size for body in bodies)
    limit = min(STUB_BYTES, largest * STUB_SHARE)
    return [body for body in bodies if body.kind == "ptx" or body.size >= limit]


def compiled_for(cubin: bytes | mmap) -> Target | None:
    """The ``-arch`` that ptxas noted in a cubin, e.g. ``sm_100f``; None where it noted none.

    A cubin's ELF flags hold the architecture without its suffix; only this note has it whole.
    """
    for section in sections(cubin) if is_elf(cubin) else ():
        if section.name == TOOL_NOTE:
            note = bytes(cubin[section.offset : section.offset + section.size])
            if found := NOTED.search(note):
                return Target.parse(found[1].decode())
    return None


def by_bodies(found: Mapping[str, list[Body]]) -> dict[tuple[tuple[Kind, Target], ...], list[str]]:
    """Names of kernels, grouped by what they were compiled for."""
    groups: dict[tuple[tuple[Kind, Target], ...], list[str]] = defaultdict(list)
    for name, bodies in found.items():
        groups[tuple(sorted({(body.kind, body.target) for body in bodies}))].append(name)
    return groups


def _payload(
    buffer: bytes | mmap, code: Code, unpacker: zstandard.ZstdDecompressor, name: str
) -> bytes:
    packed = bytes(buffer[code.offset : code.offset + code.stored])
    if not code.compressed:
        return packed
    if code.compression != "zstd":
        raise _unreadable(f"{code.compression}-compressed {code.kind}", code, name)
    try:
        payload = unpacker.decompress(packed, max_output_size=code.unpacked)
    except zstandard.ZstdError as error:
        raise _unreadable(f"a {code.kind} that zstd cannot read: {error}", code, name) from error
    if len(payload) != code.unpacked:
        raise _unreadable(f"a {code.kind} of {len(payload)} bytes", code, name)
    return payload


def _same_architecture(cubin: bytes, code: Code, name: str) -> None:
    if not is_elf(cubin):
        raise _unreadable("a cubin that is no ELF file", code, name)
    stated = CUDA_ABI_FLAGS.unpack_from(cubin, 48)[1]
    if cubin[8] == CUDA_ABI and stated != code.target.major * 10 + code.target.minor:
        raise _unreadable(f"a cubin for sm_{stated}", code, name)


def _unreadable(what: str, code: Code, name: str) -> UnknownFatbinError:
    return UnknownFatbinError(
        f"device code that cannot be read: {what}, where its entry says {code.kind} for "
        f"{code.target}, {code.unpacked} bytes",
        where=f"{name or 'a library'}, section {code.section}, byte {code.header:#x}",
        remedy="get the library again; if its hash is right, teach census/kernels.py the form",
    )
