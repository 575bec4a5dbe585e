"""Images built on nodes of a cluster: a job for each line, and a forecast of so many nodes.

A job builds its line's SKUs one after the other, as they share layers, in a cache on its node's own
disk. Downloads come from the folder that hosts share (``sources.shared``), which is filled here
first: then no file is downloaded twice, and nodes need no network.
"""

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from vllm_forge.dispatch.errors import SITE, JobsFaultError, SiteFileError
from vllm_forge.dispatch.runs import Ask, make_own
from vllm_forge.dispatch.site import Site
from vllm_forge.dispatch.slurm import cluster_nodes, head_of, nodes_of, require_accepted
from vllm_forge.host import Runner, printable, read_data, write_whole
from vllm_forge.host.errors import CommandFailedError
from vllm_forge.images.rootfs import fetch_packages
from vllm_forge.matrix import ImageCell
from vllm_forge.matrix.errors import RecordFileError
from vllm_forge.patches import fetch_archive, read_tree_lock
from vllm_forge.project import Project
from vllm_forge.sources import Wheelhouse, verified
from vllm_forge.sources.debian import read_base_lock
from vllm_forge.sources.shared import VARIABLE, give

BUILDS, IMAGES, SHARED = "builds", "built", "shared"  # below the site's storage.root
ROW = "slurm.build"  # of the site file
MEASURED = "benchmarks/results/build-{}.json"
FORECAST_HEAD = ("nodes", "minutes", "downloaded, GB", "copied to nodes, GB")


@dataclass(frozen=True, kw_only=True)
class LineBuild:
    """The job of a line; ``files``: SHA-256 of a download -> its bytes."""

    line: str
    skus: tuple[str, ...]
    files: Mapping[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast one host builds, as measured."""

    bytes_per_s: float  # that come from an index, or from the shared folder
    first_s_per_byte: float  # of a line's downloads: its first image, when they are there
    next_s: float  # each further image


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Time and bytes of all jobs on so many nodes."""

    nodes: int
    seconds: float
    downloaded: int  # into the shared folder, each file once
    copied: int  # from there into the caches of nodes; without the folder: downloaded by them

    @property
    def cells(self) -> list[str]:
        """Of a row below FORECAST_HEAD."""
        gigabytes = (f"{size / 1e9:.1f}" for size in (self.downloaded, self.copied))
        return [str(self.nodes), f"{self.seconds / 60:.1f}", *gigabytes]


def line_builds(project: Project, cells: Iterable[ImageCell]) -> list[LineBuild]:
    """The jobs of some cells."""
    skus: dict[str, list[str]] = {}
    for cell in cells:
        skus.setdefault(cell.line_name, []).append(cell.sku_name)
    base = read_base_lock(project.root, project.matrix.base)
    packages = {row.sha256: row.size for row in (base.packages if base else ())}
    made = []
    for line, names in skus.items():
        wheels = {wheel.sha256: wheel.size for wheel in project.lock(line).wheels}
        tree = read_tree_lock(project.root / project.matrix.line[line].series, line)
        files = packages | wheels | {tree.sha256: tree.size}
        made.append(LineBuild(line=line, skus=tuple(names), files=files))
    return made


def measured_rates(project: Project) -> Rates:
    """Of the committed measurement of the default line. RecordFileError: there is none."""
    line = project.matrix.default_line
    path = project.root / MEASURED.format(line)
    wheels = sum(wheel.size for wheel in project.lock(line).wheels)

    def parse(data: dict[str, Any]) -> Rates:
        seconds = {stage: median(values) for stage, values in data["seconds"].items()}
        further = [value for stage, value in seconds.items() if stage.startswith("next SKU")]
        return Rates(
            bytes_per_s=wheels / seconds["download"],
            first_s_per_byte=(seconds["cold"] - seconds["download"]) / wheels,
            next_s=fmean(further),
        )

    remedy = f"measure it: nox -s bench -- build --line {line}"
    return read_data(path, parse, RecordFileError, what="measurement of builds", remedy=remedy)


def forecast(lines: Sequence[LineBuild], rates: Rates, nodes: int) -> Forecast:
    """Lines go to nodes as they become free, the longest first, when the folder is filled."""
    every = {sha: size for line in lines for sha, size in line.files.items()}
    start = sum(every.values()) / rates.bytes_per_s
    free, caches = [start] * nodes, [set[str]() for _ in range(nodes)]
    copied = 0
    for line in longest_first(lines):
        node = free.index(min(free))
        new = sum(size for sha, size in line.files.items() if sha not in caches[node])
        caches[node].update(line.files)
        copied += new
        free[node] += new / rates.bytes_per_s + line.bytes * rates.first_s_per_byte
        free[node] += rates.next_s * (len(line.skus) - 1)
    return Forecast(nodes=nodes, seconds=max(free), downloaded=sum(every.values()), copied=copied)


def forecasts(project: Project, lines: Sequence[LineBuild]) -> list[Forecast]:
    """By the number of nodes, up to one for each line."""
    rates = measured_rates(project)
    return [forecast(lines, rates, nodes) for nodes in range(1, len(lines) + 1)]


def longest_first(lines: Sequence[LineBuild]) -> list[LineBuild]:
    return sorted(lines, key=lambda line: (-len(line.skus), -line.bytes, line.line))


def fill_folder(project: Project, lines: Sequence[LineBuild], folder: Path) -> None:
    """Have all downloads of the lines in a shared folder; those of this cache are copied there.

    HashMismatchError: one is damaged here; it was deleted, and comes again with the next call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    house, base = Wheelhouse(), read_base_lock(project.root, project.matrix.base)
    if base is not None:
        fetch_packages(project.matrix.base, base)
        for package in base.packages:
            give(verified(package.file, package.sha256), package.sha256, folder)
    for row in lines:
        wheels = project.lock(row.line).wheels
        house.fetch(wheels)
        for wheel in wheels:
            give(house.verify(wheel), wheel.sha256, folder)
        tree = read_tree_lock(project.root / project.matrix.line[row.line].series, row.line)
        give(fetch_archive(tree), tree.sha256, folder)


def script(project: Project, lines: Sequence[LineBuild], site: Site, run: str) -> str:
    """An array of sbatch, whose index is a line. SiteFileError: the site does not say where."""
    if site.slurm is None or site.slurm.build is None:
        what = "missing [slurm.build]: the partition whose nodes build images"
        raise SiteFileError(what, where=SITE, remedy="add the table; it needs no GPUs")
    root, folder = site.storage.root, f"{site.storage.root}/{BUILDS}/{run}"
    options = [
        f"--job-name=forge-build-{run}", f"--array=0-{len(lines) - 1}",
        f"--output={folder}/%A_%a.log",
    ]  # fmt: skip
    head = head_of(site.slurm, ROW, site.slurm.build, options)
    variables = {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "VLLM_FORGE_ROOT": str(project.root),
        VARIABLE: f"{root}/{SHARED}",
    }
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    skus = " ".join(shlex.quote(" ".join(line.skus)) for line in lines)
    return f"""#!/bin/bash
{head}
lines=({" ".join(shlex.quote(line.line) for line in lines)})
skus=({skus})
line=${{lines[SLURM_ARRAY_TASK_ID]}}
own={shlex.quote(site.storage.scratch)}/vllm-forge-$UID
mkdir -m 700 "$own" 2> /dev/null
if [ ! -O "$own" ] || [ -L "$own" ]; then
    echo "$own is of another user: delete it" >&2
    exit 33
fi
export {exports} VLLM_FORGE_CACHE=$own/cache
code=0
for sku in ${{skus[SLURM_ARRAY_TASK_ID]}}; do
    result={shlex.quote(folder)}/$sku-$line.json
    {shlex.quote(sys.executable)} -m vllm_forge build "$sku" --line "$line" --base locked \\
        --output {shlex.quote(root)}/{IMAGES} --json > "$result.part" \\
        && mv "$result.part" "$result" || code=$?
done
exit $code
"""


def prepare(text: str, site: Site, run: str, ask: Ask) -> Path:
    """Write the array's script, and return it. ClusterMismatchError: Slurm would refuse it."""
    if site.slurm is not None and site.slurm.build is not None:
        nodes_of(site.slurm.build.partition, ROW, cluster_nodes(ask))
    make_own(Path(site.storage.root) / BUILDS)
    path = Path(site.storage.root) / BUILDS / run / "builds.sh"
    write_whole(path, text)
    require_accepted(path, ROW, ask)
    return path


def send(path: Path, lines: Sequence[LineBuild], runner: Runner) -> list[str]:
    """Send the array of a script, and wait until it ended; a row for each image.

    JobsFaultError: some were not built, or sbatch failed; the message has its output.
    """
    folder, fault = path.parent, ""

    def parse(built: dict[str, str]) -> str:
        return printable(f"{built['digest']}  {built['image']}")

    try:
        runner.run(["sbatch", "--wait", "--parsable", str(path)])
    except CommandFailedError as error:  # also what one of its jobs ended with
        fault = error.what
    rows, missing, again = [], [], "see the logs in that folder, and send again"
    for line in lines:
        for sku in line.skus:
            path = folder / f"{sku}-{line.line}.json"
            if path.exists():
                rows.append(read_data(path, parse, JobsFaultError, what="result", remedy=again))
            else:
                missing.append(f"{sku} ({line.line})")
    if missing:
        what = "\n".join(filter(None, [f"not built: {', '.join(missing)}", fault]))
        raise JobsFaultError(what, where=folder, remedy=again)
    return rows
