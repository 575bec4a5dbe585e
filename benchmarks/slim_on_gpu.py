"""Shows on a GPU that a slim torch computes what the whole one does, bit for bit.

    python benchmarks/slim_on_gpu.py --output results.json

Needs a GPU, an environment with torch and room for a copy of it; nothing of this project but
kernels.coverage is used, so it runs from a checkout with PYTHONPATH=src. Three runs of the same
operations: torch as it is, a copy without foreign device code, and, as control, that copy without
the code *for* this GPU, which must fail.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_forge.kernels.coverage.device_code import device_code, runs_on

LEAST = 1 << 20
OPERATIONS = Path(__file__).with_name("slim_operations.py")


def zero(folder: Path, capability: tuple[int, int], *, native: bool) -> dict[str, int]:
    """Overwrite device code below ``folder``: foreign code, or the native one.

    Returns:
        Bytes per kind and target.
    """
    removed: dict[str, int] = {}
    for path in sorted(folder.rglob("*.so*")):
        if path.is_symlink() or path.stat().st_size < LEAST:
            continue
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
            for code in device_code(content, path.name):
                if runs_on(code.target, code.kind, capability) == native:
                    content[code.offset : code.offset + code.size] = bytes(code.size)
                    name = f"{code.kind} {code.target}"
                    removed[name] = removed.get(name, 0) + code.size
    return dict(sorted(removed.items()))


def run(site: Path | None) -> dict[str, str] | None:
    """Digest of each operation's result, by torch as it is or the copy in ``site``.

    None where the process died.
    """
    path = [str(site)] if site else []
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONWARNINGS": "ignore"}
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        argv = [sys.executable, str(OPERATIONS), out.name]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
            return None
        result: dict[str, str] = json.loads(Path(out.name).read_text())
    return result


def driver() -> str:
    """Version of the GPU's driver."""
    argv = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()[0]


def main() -> int:
    """Run all three and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    import torch  # noqa: PLC0415 - this process needs only its place and the GPU's name

    capability = torch.cuda.get_device_capability()
    found: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "capability": list(capability),
        "driver": driver(),
        "torch": torch.__version__,
        "operations_sha256": hashlib.sha256(OPERATIONS.read_bytes()).hexdigest(),
    }
    before = run(None)
    again = run(None)
    if before is None or again is None:
        sys.exit("torch as it is does not run the operations: see its output above")
    site = Path(torch.__file__).parents[1]
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("torch", "nvidia"):
            shutil.copytree(site / name, Path(scratch) / name, symlinks=True)
        found["removed_bytes"] = zero(Path(scratch), capability, native=False)
        after = run(Path(scratch))
        zero(Path(scratch) / "torch", capability, native=True)
        control = run(Path(scratch))
    found["operations"] = {
        name: {
            "repeats": before[name] == again[name],
            "slim": "same" if after is not None and after[name] == before[name] else "different",
        }
        for name in before
    }
    found["control"] = "failed" if control is None else "ran"
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    bad = [name for name, row in found["operations"].items() if row["slim"] != "same"]
    removed = sum(found["removed_bytes"].values()) / 1e6
    print(f"{len(before)} operations, {len(bad)} differ {bad}; {removed:.0f} MB zeroed; "
          f"control {found['control']}")  # fmt: skip
    return 1 if bad or control is not None else 0


if __name__ == "__main__":
    sys.exit(main())
