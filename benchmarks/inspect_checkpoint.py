"""Time of an inspection at the real size, without the real data.

    .nox/vllm-forge/bin/python benchmarks/inspect_checkpoint.py [--scratch DIR] [--dry-load]

Writes checkpoints with the headers of real artifacts and holes in place of their data: a file
system keeps no bytes for a hole, so 181 GB take 30 MB. Global scales are ones. Each inspection is a
process of its own. With --dry-load (as root, with the lines' layers in the cache) each line's
vLLM also loads them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_forge.checkpoints.inspect.manifest import named
from vllm_forge.checkpoints.tensors import DTYPE_BYTES
from vllm_forge.host import atomic_path
from vllm_forge.matrix import load
from vllm_forge.pages.registry import write_pages
from vllm_forge.project import Project

ROOT = Path(__file__).resolve().parents[1]
RESULT = "benchmarks/results/inspect.json"
CONFIGS = ROOT / "src/vllm_forge/kernels/selection/artifacts"
SHARDS = {"flash-nvfp4-fp8-mtp": 35, "flash-w4a16-fp8-mtp": 4, "nvidia-nvfp4": 35}
ONE = struct.pack("<f", 1.0)
SCALARS = ("_global_scale", "weight_scale_2", "input_scale")


def config_of(artifact: str) -> dict[str, Any]:
    """config.json as far as it is known."""
    row: dict[str, Any] = json.loads((CONFIGS / f"{artifact}.json").read_text())
    base: dict[str, Any] = {} if "base" not in row else config_of(row["base"])
    base |= row["config"]
    return base


def write_sparse(folder: Path, artifact: str) -> int:
    """An artifact with holes for data; returns its bytes."""
    folder.mkdir()
    config = config_of(artifact)
    (folder / "config.json").write_text(json.dumps(config))
    wanted = sorted(named(artifact).wanted(config), key=lambda want: want.name)
    count = SHARDS[artifact]
    size = -(-len(wanted) // count)
    index: dict[str, str] = {}
    total = 0
    for number in range(count):
        rows = wanted[number * size : (number + 1) * size]
        rows.sort(key=lambda want: (-DTYPE_BYTES[want.dtypes[0]], want.name))
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        header, at, ones = {}, 0, []
        for want in rows:
            end = at + math.prod(want.shape) * DTYPE_BYTES[want.dtypes[0]]
            header[want.name] = {
                "dtype": want.dtypes[0],
                "shape": list(want.shape),
                "data_offsets": [at, end],
            }
            if want.name.endswith(SCALARS):
                ones.append(at)
            index[want.name] = name
            at = end
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            start = file.tell()
            for place in ones:
                file.seek(start + place)
                file.write(ONE)
            file.truncate(start + at)
        total += at
    map_ = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(map_))
    return total


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
    size = write_sparse(folder, artifact)
    seconds, report = inspect(folder, "--resolve=rules")
    result: dict[str, Any] = {
        "tensors": report["tensors"],
        "shards": report["shards"],
        "bytes": size,
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
    write_pages(Project(ROOT), "docs/generated/measurements.md")


if __name__ == "__main__":
    main()
