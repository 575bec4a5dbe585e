"""Run tiers of the suite on this GPU and write what they said: the entry of images and kits.

    python -m tests.gpu.harness.run PLAN.json OUTPUT [--tier NAME]... [--minutes N] [-n WORKERS]

Stands on the standard library and pytest. ``PLAN.json`` says what is tested (SKU, digests, tree);
the host that wrote it makes receipts of the result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.gpu.harness import limits, plugin
from tests.gpu.harness.bootlog import parse
from tests.gpu.harness.device import RANKS, list_gpus, require_sku
from tests.gpu.harness.errors import (
    HarnessError,
    InputError,
    SuiteRedError,
    SuiteUndecidedError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGES = ("vllm", "torch", "triton", "flashinfer-python", "compressed-tensors")
BOOT_LOGS = "boot"
COMPILED = "VLLM_FORGE_COMPILED_FILES"
GREEN = {"passed", "other GPU"}
# What the host does not set itself.
DEFAULTS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
STEERING = ("PYTEST_", "PYTHON", "FORGE_", "VLLM_FORGE_")
# By these a host's operator says what its links cannot do, and which GPUs a run has; they are
# passed on and recorded.
RECORDED = ("NCCL_", "NVSHMEM_", "TORCH_SYMM_MEM_", "CUDA_VISIBLE_DEVICES")
RACE = "VLLM_FORGE_RACE_FOLDER"
KEY = "caches.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run.

    Attributes:
        gpus: what there is.
        minutes: per tier; None is the plan's.
        pytest: further arguments.
        caches: folder of what JIT compilers make; None: it is not kept.
        variables: for all that compiles.
        compiled: files that it had compiled before.
    """

    gpus: list[dict[str, Any]]
    minutes: float | None = None
    pytest: tuple[str, ...] = ()
    caches: Path | None = None
    variables: dict[str, str] = field(default_factory=dict)
    compiled: int = 0


def suite_hash(root: Path, tier: dict[str, Any]) -> str:
    """SHA-256 in hex of what a tier's verdicts depend on; see vllm_forge.receipts.suite."""
    files = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in tier["files"]}
    text = json.dumps({"files": files, "rows": tier["rows"]}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def run_tier(root: Path, plan: dict[str, Any], name: str, output: Path, options: Options) -> str:
    """Run one tier; its verdict. Writes ``<tier>.json`` and ``<tier>.xml``."""
    tier, folder = plan["tiers"][name], output / name
    (folder / BOOT_LOGS).mkdir(parents=True, exist_ok=True)
    # The race suite runs what it compiles here; in /tmp another user could take the name.
    race = output / "race"
    race.mkdir(exist_ok=True)
    raw = folder / "pytest.json"
    raw.unlink(missing_ok=True)
    started = datetime.now(UTC)
    deadline = time.time() + 60 * (options.minutes or tier["minutes"])
    # It exists once a green run of the tier left its kernels in the caches.
    warm_place = options.caches and options.caches / f"warm-{name}"
    warm = warm_place is not None and warm_place.exists()
    code = _pytest(
        root,
        [
            *tier["folders"],
            f"--tier={name}",
            f"--junitxml={output / f'{name}.xml'}",
            *options.pytest,
        ],
        {
            plugin.RESULTS: str(raw),
            limits.DEADLINE: str(deadline),
            limits.COLD: str(int(not warm)),
            "VLLM_FORGE_GPU_FOLDER": str(folder),
            "VLLM_FORGE_GPU_MATRIX": json.dumps(tier["rows"]["matrix"]),
            COMPILED: str(options.compiled),
            RACE: str(race),
            RANKS: str(tier["rows"]["tier"]["gpus"]),
            **options.variables,
        },
    )
    said = json.loads(raw.read_text()) if raw.is_file() else {"exit": code, "tests": {}}
    result = {
        "schema": 1,
        "plan": {key: value for key, value in plan.items() if key != "tiers"},
        "tier": name,
        "suite_sha256": suite_hash(root, tier),
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "exit": code,
        "gpus": options.gpus,
        "host": host_record(),
        "configurations": {
            path.stem: asdict(parse(path.read_text(errors="replace")))
            for path in sorted((folder / BOOT_LOGS).glob("*.log"))
        },
        "tests": said["tests"],
    }
    (output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result), flush=True)
    word = verdict(result)
    if warm_place is not None and word == "green" and "-k" not in options.pytest:
        warm_place.touch()
    return word


def verdict(result: dict[str, Any]) -> str:
    """``red``, ``green``, or ``undecided``: a test for this GPU did not run, or pytest not all."""
    outcomes = {row["outcome"] for row in result["tests"].values()}
    if "failed" in outcomes:
        return "red"
    return "green" if outcomes and outcomes <= GREEN and result["exit"] == 0 else "undecided"


def host_record() -> dict[str, Any]:
    """What the tests ran on: versions, and variables that choose GPUs or how they talk."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "python": platform.python_version(),
        "packages": versions,
        "cuda": _torch("torch.version.cuda"),
        "nccl": _torch("'.'.join(map(str, torch.cuda.nccl.version()))"),
        "variables": {n: v for n, v in sorted(os.environ.items()) if n.startswith(RECORDED)},
    }


def table(result: dict[str, Any]) -> str:
    """The verdicts as text, margins as measured / bound; red ones first."""
    tests = sorted(result["tests"].items(), key=lambda item: (item[1]["outcome"] in GREEN, item[0]))
    rows = []
    for name, row in tests:
        margins = ", ".join(
            f"{what} {pair['measured']:.4g}/{pair['bound']:.4g}"
            for what, pair in row["margins"].items()
        )
        rows.append(f"{row['outcome']:10} {row['seconds']:7.1f} s  {name}  {margins or row['why']}")
    counts: dict[str, int] = {}
    for _, row in tests:
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    total = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    return "\n".join([*rows, f"tier {result['tier']}: {total or 'no test ran'}"])


def _torch(expression: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import torch; print({expression})"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _pytest(root: Path, arguments: Sequence[str], variables: dict[str, str]) -> int:
    path = os.pathsep.join(filter(None, [str(root / "src"), os.environ.get("PYTHONPATH", "")]))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A script's background job ignores it, and so would pytest, which is ended by it below.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [
            sys.executable, "-m", "pytest", "-p", "tests.gpu.harness.plugin",
            "-p", "no:cacheprovider",
            f"--rootdir={root}", "-v", "-ra", "--tb=short", *arguments,
        ],
        cwd=root,
        env={**DEFAULTS, **host_variables(), **variables, "PYTHONPATH": path,
             "VLLM_FORGE_RELEASE_SOURCE": str(root / "source")},
    )  # fmt: skip
    # A host that ends the run gets the verdicts so far, and pytest ends what tests started.
    before = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def host_variables() -> dict[str, str]:
    """The environment, without what would steer Python, pytest or the suite."""
    return {name: value for name, value in os.environ.items() if not name.startswith(STEERING)}


def open_caches(folder: Path, plan: dict[str, Any]) -> dict[str, str]:
    """Make what is missing; variables for the processes that compile.

    Folders, their variables and the key are the plan's. The key is of the stack that they are for:
    most compilers would notice by themselves that a result is stale, and not all of them do.

    Raises:
        InputError: the folder is of another stack, or not of the suite.
    """
    path, key = folder / KEY, plan["caches"]["key"]
    if folder.is_dir() and any(folder.iterdir()):
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            recorded = f"{type(error).__name__}: {error}"
        if recorded != key:
            raise InputError(
                f"--caches is of another stack, or not of the suite: expected {key}, "
                f"found {recorded}",
                where=str(path),
                remedy="name an empty folder",
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
    for name in plan["caches"]["folders"]:
        (folder / name).mkdir(exist_ok=True)
    return {variable: str(folder / name) for name, variable in plan["caches"]["folders"].items()}


def count_files(folder: Path) -> int:
    """Number of compiled files; those beside the compilers' folders are the suite's."""
    return sum(path.is_file() and path.parent != folder for path in folder.rglob("*"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run; exit 0 if all tiers are green, else see ``harness.errors``."""
    parser = argparse.ArgumentParser(prog="tests.gpu.harness.run", allow_abbrev=False)
    parser.add_argument("plan", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[3])
    parser.add_argument("--tier", action="append", help="default: all that are not on request")
    parser.add_argument("--minutes", type=float, help="budget per tier")
    parser.add_argument("-n", dest="workers", help="xdist workers: a number, or auto (one a GPU)")
    parser.add_argument("--caches", type=Path, help="folder for what JIT compilers make")
    parser.add_argument("--only", action="append", default=[], help="pytest -k expression")
    args = parser.parse_args(argv)
    try:
        run(args)
    except HarnessError as error:
        print(f"{type(error).__name__} (exit {error.exit_code})\n{error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(args: argparse.Namespace) -> None:
    """Run the tiers that were asked for.

    Raises:
        HarnessError: they did not begin, or are not green.
    """
    plan, gpus = json.loads(args.plan.read_text()), list_gpus()
    require_sku(gpus, plan)
    names = args.tier or [
        name for name, row in plan["tiers"].items() if not row["rows"]["tier"]["on_request"]
    ]
    if unknown := [name for name in names if name not in plan["tiers"]]:
        raise InputError(
            f"unknown --tier {unknown[0]!r}", remedy=f"tiers: {', '.join(plan['tiers'])}"
        )
    workers = str(len(gpus)) if args.workers == "auto" else args.workers
    extra = ["-n", workers, "--dist", "loadgroup"] if workers else []
    extra += [word for expression in args.only for word in ("-k", expression)]
    args.output.mkdir(parents=True, exist_ok=True)
    options = Options(gpus=gpus, minutes=args.minutes, pytest=tuple(extra))
    if args.caches is not None:
        variables = open_caches(args.caches.resolve(), plan)
        compiled = count_files(args.caches)
        options = replace(options, caches=args.caches, variables=variables, compiled=compiled)
    verdicts = {name: run_tier(args.root, plan, name, args.output, options) for name in names}
    for kind, word in ((SuiteRedError, "red"), (SuiteUndecidedError, "undecided")):
        if tiers := [name for name in names if verdicts[name] == word]:
            raise kind(
                f"{word}: {', '.join(tiers)}",
                where=str(args.output),
                remedy="see the tables above for the tests, and why",
            )


if __name__ == "__main__":
    sys.exit(main())
