"""The patched wheel for one GPU: device code that cannot run there is zeroed, so that it packs.

Offsets stay, and so do the headers of all entries; the driver reads the one entry that it takes.
Libraries whose code no test launches are zeroed whole: they load, as vLLM imports them.
"""

from __future__ import annotations

import fnmatch
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_forge.host import atomic_path
from vllm_forge.kernels.coverage import Capability, device_code, runs_on
from vllm_forge.sources.errors import WheelError
from vllm_forge.sources.wheel_format import record_row, rewrite_record

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LIBRARY = ".so"
LEVEL = 6


@dataclass(frozen=True, kw_only=True)
class Thinned:
    """A wheel with less device code.

    Attributes:
        path: the wheel.
        zeroed: bytes of device code that were zeroed.
        differences: from the wheel as built, each a sentence.
    """

    path: Path
    zeroed: int
    differences: tuple[str, ...]


def thin_wheel(wheel: Path, target: Path, capability: Capability, unused: Sequence[str]) -> Thinned:
    """Write ``target``: the wheel without device code for other GPUs.

    Args:
        wheel: as built.
        target: is written.
        capability: of the GPU.
        unused: patterns of libraries none of whose device code is launched.

    Raises:
        UnknownFatbinError: see census.device_code.
        WheelError: it has no RECORD.
    """
    zeroed, emptied, rows = 0, [], {}
    record = None
    with (
        zipfile.ZipFile(wheel) as source,
        atomic_path(target) as aside,
        zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL) as out,
    ):
        for member in source.infolist():
            if member.filename.endswith(".dist-info/RECORD"):
                record = member
                continue
            content = source.read(member)
            if member.filename.endswith(LIBRARY):
                whole = any(fnmatch.fnmatch(member.filename, pattern) for pattern in unused)
                content, count = thin(content, member.filename, None if whole else capability)
                zeroed += count
                emptied += [member.filename] if whole else []
                rows[member.filename] = record_row(content)
            _write(out, member, content)
        if record is None:
            raise WheelError("the wheel has no RECORD", where=str(wheel))
        new_record = rewrite_record(
            source.read(record), lambda path, *columns: (path, *rows.get(path, columns))
        )
        _write(out, record, new_record)
    told = [f"device code for other GPUs is zeroed in {len(rows)} libraries of vLLM"]
    told += [f"all device code of {name} is zeroed: no test launches it" for name in emptied]
    return Thinned(path=target, zeroed=zeroed, differences=tuple(told))


def thin(content: bytes, name: str, capability: Capability | None) -> tuple[bytes, int]:
    """A library with zeros for what cannot run; None: for all. Also the bytes zeroed."""
    data, count = bytearray(content), 0
    for code in device_code(content, name):
        if capability is None or not runs_on(code.target, code.kind, capability):
            data[code.offset : code.offset + code.size] = bytes(code.size)
            count += code.size
    return bytes(data), count


def _write(out: zipfile.ZipFile, member: zipfile.ZipInfo, content: bytes) -> None:
    info = zipfile.ZipInfo(member.filename, member.date_time)
    info.external_attr = member.external_attr
    info.compress_type = zipfile.ZIP_DEFLATED
    out.writestr(info, content)
