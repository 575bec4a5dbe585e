"""Run the kernel tier at once, on a host that has a GPU, torch and a kit.

    python -m tests.gpu.race.run OUTPUT [--limit SECONDS]

Two pytest processes side by side: one looks after experiments in processes of their own, the other
launches the wheel's kernel itself. Neither can lose the other's results. Writes into OUTPUT, of
either: ``NAME.jsonl`` (a row per test), ``NAME.xml`` (JUnit), ``NAME.log``; and ``run.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.gpu.race.kit import REPO, folder, manifest, unpacked

HERE = "tests/gpu/race"
PARTS = {
    "controls": [f"{HERE}/test_controls.py", f"{HERE}/test_red_zones.py",
                 f"{HERE}/test_sanitizer.py"],
    "launches": [f"{HERE}/test_partitions.py", "tests/gpu/numerics", f"{HERE}/test_bitwise.py"],
}  # fmt: skip
QUERY = "name,uuid,driver_version,compute_cap,clocks.max.sm"


def start(name: str, output: Path, extra: list[str]) -> subprocess.Popen[bytes]:
    """Start a part."""
    kit = unpacked()
    paths = [str(REPO), str(REPO / "src"), *([str(kit / "site")] if kit is not None else [])]
    named = os.environ.get("PYTHONPATH")
    environment = {
        # Where the driver keeps what it compiled: the processes share it.
        "CUDA_CACHE_PATH": str(folder() / "jit"),
        # Many processes share the processors; a thread of each on every one only waits.
        "OMP_NUM_THREADS": "6",
        "OPENBLAS_NUM_THREADS": "6",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *([named] if named else [])]),
    }
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={REPO}",
        *PARTS[name], f"--results={output / name}.jsonl", f"--junitxml={output / name}.xml", *extra,
    ]  # fmt: skip
    log = (output / f"{name}.log").open("wb")
    return subprocess.Popen(
        command, cwd=REPO, env=environment, stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def gpu() -> dict[str, str]:
    """The GPU, by the driver; its UUID as a hash."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemExit(f"no GPU here: {error}") from None
    first = (done.stdout.splitlines() or [""])[0]
    row = dict(zip(QUERY.split(","), (part.strip() for part in first.split(",")), strict=False))
    if "uuid" in row:
        row["uuid"] = hashlib.sha256(row["uuid"].encode()).hexdigest()
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.gpu.race.run", description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--limit", type=float, default=420, help="seconds; then both are ended")
    args, extra = parser.parse_known_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    row: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": gpu(),
        "kit": {k: v for k, v in manifest().items() if k != "native"},
        "parts": {},
    }
    processes = {name: start(name, args.output, extra) for name in PARTS}
    for name, process in processes.items():
        left = args.limit - (time.monotonic() - started)
        try:
            code: int | str = process.wait(max(left, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # the process group that was started above
            process.wait()
            code = "not done in time"
        seconds = round(time.monotonic() - started, 1)
        outcomes = [json.loads(line)["outcome"] for line in _lines(args.output / f"{name}.jsonl")]
        green = code == 0 and bool(outcomes) and set(outcomes) == {"passed"}
        row["parts"][name] = {"exit": code, "seconds": seconds, "green": green}
        log = (args.output / f"{name}.log").read_text(errors="replace").splitlines()
        print(f"== {name}: exit {code} after {seconds} s, {'' if green else 'not '}green")
        print("\n".join(log[-25:])[-3500:], flush=True)
    (args.output / "run.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return 0 if all(part["green"] for part in row["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
