"""Time of an inspection at the real size, without the real data.

    .nox/vllm-forge/bin/python benchmarks/inspect_checkpoint.py [--scratch DIR] [--dry-load]

Makes rehearsals of artifacts (`checkpoint fixtures full`). Each inspection is a process of its own.
With --dry-load (as root, with the lines' layers in the cache) each line's vLLM also loads them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_forge.checkpoints.fixtures.full import make_recipe, write_full
from vllm_forge.host import atomic_path
from vllm_forge.kernels.selection.questions import artifact_config
from vllm_forge.matrix import load

ROOT = Path(__file__).resolve().parents[1]
RESULT = "benchmarks/results/inspect.json"
# That of the last one is not published.
SHARDS = {"flash-nvfp4-fp8-mtp": 35, "flash-w4a16-fp8-mtp": 4, "nvidia-nvfp4": 35}


def inspect(folder: Path, *options: str) -> tuple[float, dict[str, Any]]:
    """Seconds and report of one command."""
    start = time.monotonic()
    done = subprocess.run(
        [
            sys.executable, "-m", "vllm_forge", "checkpoint", "inspect", str(folder), "--json",
            *options,
        ],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - start
    report: dict[str, Any] = json.loads(done.stdout)
    return seconds, report


def measure(artifact: str, scratch: Path, *, dry_load: bool) -> dict[str, Any]:
    """One artifact."""
    folder = scratch / artifact
    recipe = make_recipe(artifact, artifact_config(artifact), SHARDS[artifact])
    write_full(recipe, folder)
    seconds, report = inspect(folder, "--resolve=rules")
    result: dict[str, Any] = {
        "tensors": report["tensors"],
        "shards": report["shards"],
        "bytes": report["bytes"],
        "headers_s": round(seconds, 1),
        "dry_load_s": {},
        "outcomes": {},
    }
    for line in load(ROOT).line if dry_load else ():
        loading, found = inspect(folder, "--resolve=vllm", f"--line={line}")
        result["dry_load_s"][line] = round(loading - seconds, 1)
        result["outcomes"][line] = found["lines"][0]["outcome"]
    shutil.rmtree(folder)
    return result


def main() -> None:
    """Measure, and write the result and the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scratch", type=Path, help="a folder for the sparse files")
    parser.add_argument("--dry-load", action="store_true")
    args = parser.parse_args()
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        artifacts = {name: measure(name, Path(scratch), dry_load=args.dry_load) for name in SHARDS}
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "load": f"The machine's load was {busy:.1f} before it began.",
        "artifacts": artifacts,
    }
    with atomic_path(ROOT / RESULT) as aside:
        aside.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
