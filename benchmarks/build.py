"""Times a full build and its parts, in one run, on this machine.

    nox -s bench -- build [--line 0.26] [--scratch DIR]

Each figure is the wall time of one command with a cache of its own, after a sync, so that no
stage pays for the writes of the one before. Prints a table and writes it, with what it ran on,
to benchmarks/results/. Needs about 30 GB below --scratch, an engine, and a network.

``download`` and ``layers`` are the floor: the wheels of the lock fetched into an empty cache,
and the wheel layers written from them. ``cold`` is the whole build from an empty cache:
rootfs, system image, wheels, layers, patched wheel, checks.
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
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_forge.project import Project

# A file, not -c: its worker processes import it again.
LAYERS = """
import sys
from pathlib import Path
from vllm_forge.images import BuildOptions, choose_engine, patched_wheel, resolve, write_layers
from vllm_forge.project import Project

if __name__ == "__main__":
    project = Project.find()
    engine = choose_engine("buildah", dry_run=True)
    options = BuildOptions(output=Path("unused"))
    plan = resolve(project, project.cell(*sys.argv[1:]), options, engine)
    write_layers(plan.cell, plan.groups, lambda: patched_wheel(plan.project, plan.cell))
"""


class Bench:
    """One run: commands timed one after the other."""

    def __init__(self, project: Project, scratch: Path, line: str, skus: list[str]) -> None:
        self.scratch = scratch
        self.line = line
        self.skus = skus
        self.seconds: dict[str, float] = {}
        self.root = scratch / "checkout"
        self.root.mkdir()
        for name in ("docker", "patches", "records"):
            if (project.root / name).is_dir():
                shutil.copytree(project.root / name, self.root / name)
        shutil.copy(project.root / "matrix.toml", self.root)

    def time(self, name: str, cache: str, *argv: str) -> str:
        """Run one command and note its seconds; returns its stdout."""
        os.sync()
        env = {
            **os.environ,
            "VLLM_FORGE_CACHE": str(self.scratch / cache),
            "VLLM_FORGE_ROOT": str(self.root),
        }
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, *argv], env=env, check=False, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            sys.exit(f"{name} failed with exit code {done.returncode}: see its output above")
        self.seconds[name] = round(time.monotonic() - start, 1)
        return done.stdout

    def build(self, name: str, cache: str, sku: str) -> dict[str, Any]:
        """Time one build; returns its result line."""
        out = self.time(name, cache, "-m", "vllm_forge", "build", sku, "--line", self.line)
        result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        return result

    def change_a_patch(self, series: str) -> None:
        """Drop the last patch of the copied series, and lock that.

        The record of the kernel selection is made to name the new tree: it is not under test here.
        """
        path = self.root / series / "series"
        names = path.read_text().split()
        path.write_text("".join(f"{name}\n" for name in names[:-1]))
        (self.root / series / names[-1]).unlink()
        update = ("-m", "vllm_forge", "patch", "lock", "--line", self.line)
        self.time("(write the new tree lock)", "cold", *update)
        record = self.root / "records" / "selection" / f"{self.line}.json"
        if record.exists():
            lock = tomllib.loads((self.root / series / "lock.toml").read_text())
            data = json.loads(record.read_text())
            data["inputs"]["series"] = lock["result"]
            record.write_text(json.dumps(data))

    def run(self, series: str) -> dict[str, str]:
        """All stages; returns the digests of the images."""
        self.time("download", "floor", "-m", "vllm_forge", "wheels", "fetch", "--line", self.line)
        script = self.scratch / "layers.py"
        script.write_text(LAYERS)
        self.time("layers", "floor", str(script), self.skus[0], self.line)
        shutil.rmtree(self.scratch / "floor")
        digests = {self.skus[0]: self.build("cold", "cold", self.skus[0])["digest"]}
        self.build("no-op", "cold", self.skus[0])
        for sku in self.skus[1:]:
            digests[sku] = self.build(f"next SKU: {sku}", "cold", sku)["digest"]
        self.change_a_patch(series)
        self.build("patch-only", "cold", self.skus[0])
        return digests


def report(bench: Bench, digests: dict[str, str]) -> dict[str, Any]:
    """Print the table; return what goes into the result file."""
    seconds = bench.seconds
    floor = seconds["download"] + seconds["layers"]
    table = Table("stage", "s", "ratio", "goal", title=f"line {bench.line}")
    goals = {
        "cold": (seconds["cold"] / floor, "<= 1.5 x (download + layers)"),
        "no-op": (seconds["no-op"], "<= 2 s"),
        "patch-only": (seconds["patch-only"], "<= 15 s"),
    }
    for sku in bench.skus[1:]:
        name = f"next SKU: {sku}"
        goals[name] = (seconds[name] / seconds["cold"], "<= 0.2 x cold")
    for name, value in seconds.items():
        ratio, goal = goals.get(name, (None, ""))
        shown = f"{ratio:.2f}" if ratio is not None and "x" in goal else ""
        table.add_row(name, f"{value:.1f}", shown, goal)
    Console().print(table)
    return {
        "command": "nox -s bench -- build --line " + bench.line,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {
            "cpus": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "kernel": platform.release().partition("-")[0],
            "python": platform.python_version(),
        },
        "seconds": seconds,
        "ratios": {
            "cold / (download + layers)": round(seconds["cold"] / floor, 2),
            **{
                f"{sku} / cold": round(seconds[f"next SKU: {sku}"] / seconds["cold"], 2)
                for sku in bench.skus[1:]
            },
        },
        "digests": digests,
    }


def main() -> None:
    """Parse arguments, run, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--line")
    parser.add_argument("--scratch", type=Path, help="default: a folder below /var/tmp")
    args = parser.parse_args()
    project = Project.find()
    line_name, line = project.line(args.line)
    scratch = args.scratch or Path("/var/tmp")  # noqa: S108
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        bench = Bench(project, Path(folder), line_name, list(line.skus[:3]))
        result = report(bench, bench.run(line.series))
    path = project.root / "benchmarks" / "results" / f"build-{line_name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")  # not by rich, which folds a long path


if __name__ == "__main__":
    main()
