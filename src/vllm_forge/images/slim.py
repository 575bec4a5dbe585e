"""What a SKU cannot run is not in its image: device code for other architectures.

A CUDA library holds its kernels once per architecture. The driver loads the code that runs on
the GPU it finds and never reads the rest (CUDA C++ Programming Guide, "Application
Compatibility"; the census says what runs where). So in the SKU's copy of a library the bytes of
foreign code are zeros: headers, offsets and host code stay, nothing is relinked, and the zeros
compress away. Code in PTX stays where the SKU could compile it.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_forge.kernels.coverage import device_code, runs_on

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from vllm_forge.kernels.coverage import Code

# Smaller libraries have too little to be worth a copy per SKU.
LEAST = 1 << 20
ELF = b"\x7fELF"
CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Foreign code of one library.

    Attributes:
        ranges: (offset, size) of what becomes zeros, ascending, not overlapping.
        targets: what it was compiled for, e.g. ``cubin 80`` -> bytes.
    """

    ranges: tuple[tuple[int, int], ...]
    targets: dict[str, int]

    @property
    def size(self) -> int:
        """Bytes that become zeros."""
        return sum(size for _, size in self.ranges)


def may_hold_code(path: str, size: int) -> bool:
    """Whether to look into a file at all: a shared library of some size."""
    return size >= LEAST and ".so" in path.rpartition("/")[2]


def holds_code(path: Path) -> bool:
    """Whether a library has device code for any architecture.

    Raises:
        UnknownFatbinError: it has some in a layout that we do not know.
    """
    return bool(_codes(path))


def cut(path: Path, capability: tuple[int, int]) -> Cut:
    """What of a library cannot run on a compute capability.

    Raises:
        UnknownFatbinError: as ``holds_code``.
    """
    targets: dict[str, int] = {}
    ranges = []
    for code in _codes(path):
        if not runs_on(code.target, code.kind, capability):
            name = f"{code.kind} {code.target}"
            targets[name] = targets.get(name, 0) + code.size
            ranges.append((code.offset, code.size))
    return Cut(ranges=tuple(sorted(ranges)), targets=dict(sorted(targets.items())))


def pieces(path: Path, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[bytes, bool]]:
    """A library's bytes in order, with zeros for ``ranges``.

    Yields:
        A piece and whether it is one of the zeros.
    """
    with path.open("rb", buffering=0) as file:
        end = path.stat().st_size
        position = 0
        for start, size in [*ranges, (end, 0)]:
            file.seek(position)
            while position < start:
                piece = file.read(min(CHUNK, start - position))
                position += len(piece)
                yield piece, False
            while position < start + size:
                zeros = bytes(min(CHUNK, start + size - position))
                position += len(zeros)
                yield zeros, True


def _codes(path: Path) -> list[Code]:
    with path.open("rb") as file:
        if file.read(len(ELF)) != ELF:
            return []
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
            return device_code(content, path.name)
