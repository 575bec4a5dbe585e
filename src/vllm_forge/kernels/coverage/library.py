"""The kernels of a library and their targets, cached by what the file system says of the file.

Kernels are found by their names, and a name alone says little: FlashMLA compiles its sm_90 kernels
for sm_100f too, as a body that prints "unsupported" and traps. So a body counts only if it is not a
stub next to the kernel's other bodies (without_stubs).

Reading the names in a library costs a second or two; looking them up in the cache costs a stat.
"""

import mmap
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import zstandard

from vllm_forge.host import cache_root, hash_of
from vllm_forge.host.files import inode, read_sealed, write_sealed
from vllm_forge.kernels.coverage.device_code import (
    Code,
    Kind,
    Target,
    device_code,
    functions,
    is_elf,
    readable_elf,
    sections,
)
from vllm_forge.kernels.errors import UnknownFatbinError
from vllm_forge.matrix import FrozenModel

MOST_UNPACKED = 1 << 30  # bytes of a payload; the largest known have 1e8
# Raise when the same file would get another record.
FORMAT = 2
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


class KernelGroup(FrozenModel):
    """Kernels of one pattern that have code, without stubs, for the same targets."""

    code: tuple[str, ...]
    kernels: int


class LibraryCode(FrozenModel):
    code: dict[str, int]  # cubin 120f -> bytes of all such payloads, as they are in the file
    patterns: dict[str, tuple[KernelGroup, ...]]  # by what they were compiled for


@contextmanager
def mapped(path: Path) -> Iterator[bytes | mmap.mmap]:
    """The bytes of a file, read on access."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            yield buffer


def kernels(
    buffer: bytes | mmap.mmap, name: str = "", codes: Iterable[Code] | None = None
) -> dict[str, list[Body]]:
    """Bodies by the kernel's mangled name, including stubs.

    ``codes``: the library's ``device_code``, if already known. UnknownFatbinError for a payload
    that cannot be read, or is for another target than its entry says.
    """
    bodies: dict[str, list[Body]] = defaultdict(list)
    unpacker = zstandard.ZstdDecompressor()
    for code in device_code(buffer, name) if codes is None else codes:
        if code.kind == "lto":
            continue  # has no names that can be read
        payload = _payload(buffer, code, unpacker, name)
        if code.kind == "ptx":
            for match in PTX_ENTRY.finditer(payload):
                bodies[match[1].decode()].append(Body(kind="ptx", target=code.target, size=0))
        else:
            if not is_elf(payload):
                raise _unreadable("a cubin that is not an ELF file", code, name)
            with readable_elf(name):
                stated = CUDA_ABI_FLAGS.unpack_from(payload, 48)[1]
                symbols = list(functions(payload))
            if payload[8] == CUDA_ABI and stated != code.target.major * 10 + code.target.minor:
                raise _unreadable(f"a cubin for sm_{stated}", code, name)
            for symbol, other, size in symbols:
                if other & ENTRY:
                    bodies[symbol].append(Body(kind="cubin", target=code.target, size=size))
    return dict(bodies)


def without_stubs(bodies: list[Body]) -> list[Body]:
    """The bodies that do the kernel's work.

    A stub is machine code of less than 1 KiB and less than a twentieth of the kernel's largest.
    """
    limit = min(STUB_BYTES, max(body.size for body in bodies) * STUB_SHARE)
    return [body for body in bodies if body.kind == "ptx" or body.size >= limit]


def compiled_for(cubin: bytes | mmap.mmap, name: str = "") -> Target | None:
    """The ``-arch`` that ptxas noted in a cubin, e.g. ``sm_100f``; None without a note.

    A cubin's ELF flags hold the architecture without its suffix; only this note has it whole.
    """
    with readable_elf(name):
        found = sections(cubin) if is_elf(cubin) else []
    for section in found:
        if section.name == TOOL_NOTE:
            note = bytes(cubin[section.offset : section.offset + section.size])
            if match := NOTED.search(note):
                return Target.parse(match[1].decode())
    return None


def code_sizes(codes: Iterable[Code]) -> dict[str, int]:
    """``cubin 120f`` -> bytes of all such payloads, sorted."""
    sizes: Counter[str] = Counter()
    for code in codes:
        sizes[f"{code.kind} {code.target}"] += code.size
    return dict(sorted(sizes.items()))


def library_code(path: Path, patterns: Sequence[str] = ()) -> LibraryCode:
    """The device code of a file, from the cache if it was not touched since it was read.

    ``patterns``: regular expressions to count kernels by, searched for in mangled names.
    """
    stamp = inode(path.stat())  # from before it is read
    name = hash_of([FORMAT, sorted(patterns), str(path.resolve()), stamp])
    record = cache_root() / "coverage" / f"{name}.json"
    with suppress(OSError, ValueError):
        return LibraryCode.model_validate(read_sealed(record))
    code = _read(path, patterns)
    write_sealed(record, code.model_dump(mode="json"))
    return code


def _read(path: Path, patterns: Sequence[str]) -> LibraryCode:
    with mapped(path) as buffer:
        # A slim library keeps headers of foreign code, with zeros behind them. Zeros cannot run,
        # so dropping them can only make a contract stricter.
        codes = [
            code
            for code in device_code(buffer, str(path))
            if buffer[code.offset : code.offset + code.size] != bytes(code.size)
        ]
        names = kernels(buffer, str(path), codes) if patterns else {}
    groups = {}
    for pattern in sorted(patterns):
        counts: Counter[tuple[tuple[Kind, Target], ...]] = Counter()
        for name in filter(re.compile(pattern).search, names):
            bodies = without_stubs(names[name])
            counts[tuple(sorted({(body.kind, body.target) for body in bodies}))] += 1
        groups[pattern] = tuple(
            KernelGroup(code=tuple(f"{kind} {target}" for kind, target in targets), kernels=count)
            for targets, count in sorted(counts.items())
        )
    return LibraryCode(code=code_sizes(codes), patterns=groups)


def _payload(
    buffer: bytes | mmap.mmap, code: Code, unpacker: zstandard.ZstdDecompressor, name: str
) -> bytes:
    packed = bytes(buffer[code.offset : code.offset + code.stored])
    if not code.compression:
        return packed
    if code.compression != "zstd" or code.unpacked > MOST_UNPACKED:
        raise _unreadable(f"{code.compression}-compressed {code.kind}", code, name)
    try:
        payload = unpacker.decompress(packed, max_output_size=code.unpacked)
    except zstandard.ZstdError as error:
        raise _unreadable(f"a {code.kind} that zstd cannot read: {error}", code, name) from error
    if len(payload) != code.unpacked:
        raise _unreadable(f"a {code.kind} of {len(payload)} bytes", code, name)
    return payload


def _unreadable(what: str, code: Code, name: str) -> UnknownFatbinError:
    return UnknownFatbinError(
        f"cannot read device code: {what}, where its entry says {code.kind} for "
        f"{code.target}, {code.unpacked} bytes",
        where=f"{name or 'a library'}, section {code.section}, byte {code.header:#x}",
        remedy="download the library again; if its hash is right, support the form in "
        "kernels/coverage/library.py",
    )
