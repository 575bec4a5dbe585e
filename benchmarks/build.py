"""Times a full build and its parts, in one run, on this machine.

    nox -s bench -- build [--line 0.26] [--scratch DIR] [--rounds 3] [--baseline COMMIT]

Each figure is the wall time of one command with a cache of its own, after a sync, so that no
stage pays for the writes of the one before. Prints a table and writes it, with what it ran on,
to benchmarks/results/. Needs about 35 GB below --scratch, an engine, and a network.

``download`` and ``layers`` are the floor: the wheels of the lock fetched into an empty cache,
and the wheel layers written from them. ``cold`` is the whole build from an empty cache:
rootfs, system image, wheels, layers, patched wheel, checks. Floor and cold take turns, ``rounds``
times. With ``--baseline``, an older commit's code writes the layers: then slower layers do not
lower the ratio. ``cold, one core``: once, on one CPU.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import shlex
import shutil
import statistics
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

LARGE = 1 << 16  # bytes; the smaller files of a build have about 1 GB in all
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
    write_layers(plan, lambda: patched_wheel(plan.project, plan.cell))
"""


class Bench:
    """One run: commands timed one after the other. ``seconds``: stage -> of each round."""

    def __init__(self, project: Project, scratch: Path, line: str, skus: list[str]) -> None:
        self.scratch = scratch
        self.line = line
        self.skus = skus
        self.seconds: dict[str, list[float]] = {}
        self.load = round(os.getloadavg()[0], 1)
        self.root = scratch / "checkout"
        self.root.mkdir()
        for name in ("docker", "patches", "records"):
            if (project.root / name).is_dir():
                shutil.copytree(project.root / name, self.root / name)
        shutil.copy(project.root / "matrix.toml", self.root)

    def time(
        self, name: str, cache: str, *argv: str, source: Path | None = None, cores: str = ""
    ) -> str:
        """Run Python once and note its seconds; returns its stdout.

        ``source``: checkout whose code and rows it uses; default: this code, the copied rows.
        """
        os.sync()
        env = {
            **os.environ,
            "VLLM_FORGE_CACHE": str(self.scratch / cache),
            "VLLM_FORGE_ROOT": str(source or self.root),
        }
        if source is not None:
            env["PYTHONPATH"] = str(source / "src")
        bound = ["taskset", "--cpu-list", cores] if cores else []
        start = time.monotonic()
        done = subprocess.run(
            [*bound, sys.executable, *argv],
            env=env, check=False, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{name} failed with exit code {done.returncode}: see its output above")
        self.seconds.setdefault(name, []).append(round(time.monotonic() - start, 1))
        return done.stdout

    def build(self, name: str, cache: str, sku: str, cores: str = "") -> str:
        """Time one build; returns the digest."""
        words = ("build", sku, "--line", self.line)
        out = self.time(name, cache, "-m", "vllm_forge", *words, cores=cores)
        digest: str = json.loads(out.strip().splitlines()[-1])["digest"]
        return digest

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

    def floor(self, baseline: Path | None) -> None:
        """Time what every build has to do at least, with an empty cache."""
        self.time("download", "floor", "-m", "vllm_forge", "wheels", "fetch", "--line", self.line)
        script = self.scratch / "layers.py"
        script.write_text(LAYERS if baseline is None else layers_script(baseline))
        self.time("layers", "floor", str(script), self.skus[0], self.line, source=baseline)
        self.discard("floor")

    def discard(self, cache: str) -> None:
        """Put a cache aside and delete its large files, for their space; the others at the end.

        For minutes, ext4 passes over each deleted inode when it looks for a free one: the stage
        after 100,000 deletions would pay for them with 10 s and more (recently_deleted, ialloc.c).
        """
        aside = (self.scratch / cache).rename(Path(tempfile.mkdtemp(dir=self.scratch)) / cache)
        for folder, _, names in os.walk(aside):
            for path in (Path(folder, name) for name in names):
                if path.lstat().st_size >= LARGE:
                    path.unlink()

    def run(self, series: str, rounds: int, baseline: Path | None) -> dict[str, str]:
        """All stages; returns the digests of the images."""
        first = self.skus[0]
        self.build("cold, one core", "one", first, cores="0")
        self.discard("one")
        for number in range(rounds):
            if number:
                self.discard("cold")
            self.floor(baseline)
            digests = {first: self.build("cold", "cold", first)}
        for _ in range(rounds):
            self.build("no-op", "cold", first)
        for sku in self.skus[1:]:
            digests[sku] = self.build(f"next SKU: {sku}", "cold", sku)
        self.change_a_patch(series)
        self.build("patch-only", "cold", first)
        return digests


def extract(root: Path, commit: str, folder: Path) -> Path:
    """The files of a commit of this repository."""
    folder.mkdir()
    archive = folder.with_suffix(".tar")
    done = subprocess.run(
        ["git", "-C", str(root), "archive", f"--output={archive}", commit], check=False
    )
    if done.returncode:
        sys.exit(f"cannot read commit {commit}: see git's output above; a shallow clone lacks it")
    shutil.unpack_archive(archive, folder, filter="data")
    return folder


def layers_script(source: Path) -> str:
    """The constant LAYERS of a checkout's own edition of this file."""
    for node in ast.parse((source / "benchmarks" / "build.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS":
            return str(ast.literal_eval(node.value))
    sys.exit(f"{source} has no benchmark that writes layers")


def report(bench: Bench, digests: dict[str, str], command: str) -> dict[str, Any]:
    """Print the table; return what goes into the result file."""
    seconds = {name: statistics.median(values) for name, values in bench.seconds.items()}
    cold, floor = seconds["cold"], seconds["download"] + seconds["layers"]
    ratios = {
        "cold / (download + layers)": (cold / floor, 1.3),
        "cold, one core / cold": (seconds["cold, one core"] / cold, None),
        **{f"{sku} / cold": (seconds[f"next SKU: {sku}"] / cold, 0.1) for sku in bench.skus[1:]},
    }
    table = Table("stage", "s, median", "s, each", title=f"line {bench.line}")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.1f}", " ".join(map(str, bench.seconds[name])))
    goals = Table("ratio", "value", "goal")
    for name, (value, goal) in ratios.items():
        goals.add_row(name, f"{value:.2f}", "" if goal is None else f"<= {goal}")
    goals.add_row("no-op, s", f"{seconds['no-op']:.1f}", "<= 0.6")
    Console().print(table, goals)
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {
            "cpus": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "kernel": platform.release().partition("-")[0],
            "python": platform.python_version(),
            "load_before": bench.load,
        },
        "seconds": bench.seconds,
        "ratios": {name: round(value, 2) for name, (value, _) in ratios.items()},
        "digests": digests,
    }


def main() -> None:
    """Parse arguments, run, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--line")
    parser.add_argument("--scratch", type=Path, help="default: a folder below /var/tmp")
    parser.add_argument("--rounds", type=int, default=3, help="of floor and cold (3)")
    parser.add_argument("--baseline", metavar="COMMIT", help="whose code writes the floor's layers")
    args = parser.parse_args()
    project = Project.find()
    line_name, line = project.line(args.line)
    scratch = args.scratch or Path("/var/tmp")  # noqa: S108
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        bench = Bench(project, Path(folder), line_name, list(line.skus[:3]))
        baseline = args.baseline and extract(project.root, args.baseline, Path(folder) / "baseline")
        digests = bench.run(line.series, args.rounds, baseline)
        words = [f"--line={line_name}", f"--rounds={args.rounds}"]
        words += [f"--baseline={args.baseline}"] if args.baseline else []
        result = report(bench, digests, shlex.join(["nox", "-s", "bench", "--", "build", *words]))
    path = project.root / "benchmarks" / "results" / f"build-{line_name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")  # not by rich, which folds a long path
    print("next: nox -s docs, which writes the pages of it")


if __name__ == "__main__":
    main()
