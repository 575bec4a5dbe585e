"""Whether the lock protocol is still in a kernel's machine code: its audit, without running it.

The wheel has the kernel as PTX for most GPUs, which the driver compiles. What must be left of
``ld.acquire``, ``fence.acq_rel`` and the barriers around them, in SASS of sm_80 to sm_120:

    acquire   LDG.STRONG.GPU, then CCTL.IVALL (no stale line of L1) and BAR before data is loaded
    release   BAR, MEMBAR at GPU scope, then RED; no store between MEMBAR and RED
    data      no 128-bit load by the path that is not coherent (LDG.CONSTANT)
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

KERNEL = re.compile(r"^\s*Function : (\S*6MarlinI\S*)|^\s*\.text\.(\S*6MarlinI\S*):", re.M)
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)")
ACQUIRE_WINDOW, RELEASE_WINDOW = 48, 32
ACQUIRES = 2  # barrier_acquire, and wait_negative_and_add of the sum by atomics
TIMEOUT = 120


def audit(operations: list[str]) -> list[str]:
    """What a kernel's protocol lacks; empty if nothing.

    Args:
        operations: opcodes with their modifiers, in order.
    """
    found = []
    acquires = [i for i, op in enumerate(operations) if op.startswith("LDG") and "STRONG" in op]
    if len(acquires) < ACQUIRES:
        found.append(f"{len(acquires)} loads with acquire, not {ACQUIRES}")
    for at in acquires:
        after = operations[at + 1 : at + ACQUIRE_WINDOW]
        invalidate = _first(after, lambda op: op.startswith("CCTL.IVALL"))
        load = _first(after, lambda op: op.startswith("LDG") and "STRONG" not in op)
        if invalidate is None or (load is not None and load < invalidate):
            found.append("data is loaded before the cache is invalidated")
        if _first(after, lambda op: op.startswith("BAR")) is None:
            found.append("no barrier after acquire")
    fences = [i for i, op in enumerate(operations) if op.startswith("MEMBAR") and "GPU" in op]
    adds = [i for i, op in enumerate(operations) if re.match(r"REDG?\b.*ADD", op)]
    if not adds:
        found.append("no release")
    for at in adds:
        fence = max((i for i in fences if i < at), default=None)
        if fence is None or at - fence > RELEASE_WINDOW:
            found.append("no fence before release")
            continue
        if any(op.startswith("STG") for op in operations[fence:at]):
            found.append("a store between fence and release")
        if not any(
            op.startswith("BAR") for op in operations[max(0, fence - RELEASE_WINDOW) : fence]
        ):
            found.append("no barrier before the fence")
    if any(op.startswith("LDG") and "CONSTANT" in op and "128" in op for op in operations):
        found.append("a load of 128 bits that is not coherent")
    return sorted(set(found))


def _first(operations: list[str], wanted) -> int | None:  # type: ignore[no-untyped-def]
    return next((i for i, op in enumerate(operations) if wanted(op)), None)


def kernels(text: str) -> dict[str, list[str]]:
    """Mangled name -> opcodes, from the output of ``cuobjdump -sass`` or ``nvdisasm -c``."""
    starts = [(match.start(), match[1] or match[2]) for match in KERNEL.finditer(text)]
    ends = [at for at, _ in starts[1:]] + [len(text)]
    return {
        name: INSTRUCTION.findall(text[at:end])
        for (at, name), end in zip(starts, ends, strict=True)
    }


def disassembler(torch: Path) -> Path | None:
    """cuobjdump of the toolkit, or the one that Triton's wheel brings."""
    beside = torch.parent / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
    named = shutil.which("cuobjdump") or "/usr/local/cuda/bin/cuobjdump"
    return next((path for path in (Path(named), beside) if path.is_file()), None)


def audit_library(library: Path, torch: Path) -> dict[str, list[str]] | str:
    """Kernel -> what it lacks; a sentence where there is no disassembler."""
    if (tool := disassembler(torch)) is None:
        return "not run: no cuobjdump"
    done = subprocess.run(
        [str(tool), "-sass", str(library)],
        capture_output=True, text=True, timeout=TIMEOUT, check=True,
    )  # fmt: skip
    return {name: audit(ops) for name, ops in kernels(done.stdout).items()}
