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
import tempfile
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.gpu.harness import plugin
from tests.gpu.harness.bootlog import parse
from vllm_forge.errors import ForgeError
from vllm_forge.gputest import caches
from vllm_forge.gputest.device import ask_gpus, require_sku
from vllm_forge.receipts import packages as environment
from vllm_forge.receipts.errors import GpuSuiteError
from vllm_forge.receipts.packages import environment_text
from vllm_forge.receipts.suite import RACE_FOLDER, read_tiers, suite_hash

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.gputest.device import Gpu
    from vllm_forge.receipts.suite import Tier

PACKAGES = ("vllm", "torch", "triton", "flashinfer-python", "compressed-tensors")
BOOT_LOGS = "boot"
COMPILED = "VLLM_FORGE_COMPILED_FILES"
GREEN = {"passed", "other GPU"}
# What the host does not set itself.
DEFAULTS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
RACE = "VLLM_FORGE_RACE_KIT"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run.

    Attributes:
        gpus: what there is.
        minutes: per tier; None is what the suite says.
        pytest: further arguments.
        variables: for all that compiles.
        compiled: files that it had compiled before; 0 is a cold start.
    """

    gpus: list[Gpu]
    minutes: float | None = None
    pytest: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    compiled: int = 0


def run_tier(root: Path, plan: dict[str, Any], tier: Tier, output: Path, options: Options) -> bool:
    """Run one tier; whether it is green. Writes ``<tier>.json`` and ``<tier>.xml``."""
    folder = output / tier.name
    (folder / BOOT_LOGS).mkdir(parents=True, exist_ok=True)
    raw = folder / "pytest.json"
    raw.unlink(missing_ok=True)
    started = datetime.now(UTC)
    deadline = time.time() + 60 * (options.minutes or tier.minutes)
    code = _pytest(
        root,
        [
            *tier.folders,
            f"--tier={tier.name}",
            f"--junitxml={output / f'{tier.name}.xml'}",
            *options.pytest,
        ],
        {
            plugin.RESULTS: str(raw),
            plugin.DEADLINE: str(deadline),
            "VLLM_FORGE_GPU_FOLDER": str(folder),
            "VLLM_FORGE_GPU_PLAN": json.dumps(plan),
            COMPILED: str(options.compiled),
            **options.variables,
        },
    )
    said = json.loads(raw.read_text()) if raw.is_file() else {"exit": code, "tests": {}}
    result = {
        "schema": 1,
        "plan": plan,
        "tier": tier.name,
        "suite_sha256": suite_hash(root, tier),
        "started": started.isoformat(timespec="seconds"),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "exit": code,
        "gpus": [gpu.record() for gpu in options.gpus],
        "host": host_record(),
        "configurations": {
            path.stem: parse(path.read_text(errors="replace")).record()
            for path in sorted((folder / BOOT_LOGS).glob("*.log"))
        },
        "tests": said["tests"],
    }
    (output / f"{tier.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result), flush=True)
    return code == 0 and bool(said["tests"]) and not red_tests(result)


def red_tests(result: dict[str, Any]) -> list[str]:
    """Tests that forbid a receipt: failed, or for this GPU and not run."""
    return [name for name, row in result["tests"].items() if row["outcome"] not in GREEN]


def host_record() -> dict[str, Any]:
    """Versions of what the tests ran on."""
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
        env={**DEFAULTS, RACE: str(race_folder(root)),
             "VLLM_FORGE_RELEASE_SOURCE": str(root / "source"), **os.environ,
             **variables, "PYTHONPATH": path},
    )  # fmt: skip
    # A host that ends the run gets the verdicts so far, and pytest ends what tests started.
    before = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)


def race_folder(root: Path) -> Path:
    """Where the race suite's helpers lie compiled, or a folder in which they can be."""
    brought = root / RACE_FOLDER
    return brought if brought.is_dir() else Path(tempfile.gettempdir()) / "forge-race"


def main(argv: Sequence[str] | None = None) -> int:
    """Run; exit 0 if all tiers are green, else the code of an error class."""
    parser = argparse.ArgumentParser(prog="tests.gpu.harness.run", allow_abbrev=False)
    parser.add_argument("plan", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[3])
    parser.add_argument("--tier", action="append", help="default: every tier but soak")
    parser.add_argument("--minutes", type=float, help="budget per tier")
    parser.add_argument("-n", dest="workers", help="xdist workers: a number, or auto (one a GPU)")
    parser.add_argument("--caches", type=Path, help="folder for what JIT compilers make")
    parser.add_argument("--only", action="append", default=[], help="pytest -k expression")
    args = parser.parse_args(argv)
    try:
        plan = json.loads(args.plan.read_text())
        gpus = ask_gpus()
        require_sku(gpus, plan["sku"], plan["compute_capability"], plan["device"])
        tiers = read_tiers(args.root)
        names = args.tier or [name for name in tiers if name != "soak"]
        if unknown := [name for name in names if name not in tiers]:
            raise GpuSuiteError(
                f"no tier {unknown[0]!r}", remedy=f"tiers: {', '.join(sorted(tiers))}"
            )
        workers = str(len(gpus)) if args.workers == "auto" else args.workers
        extra = ["-n", workers, "--dist", "loadgroup"] if workers else []
        extra += [word for expression in args.only for word in ("-k", expression)]
        args.output.mkdir(parents=True, exist_ok=True)
        text = ""
        if plan["subject"]["kind"] == "environment":
            text = environment_text()
            (args.output / environment.FILE).write_text(text, encoding="utf-8")
            plan["subject"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        options = Options(gpus=gpus, minutes=args.minutes, pytest=tuple(extra))
        if args.caches is not None:
            found = caches.open_caches(args.caches.resolve(), caches.stack_key(plan, text))
            options = replace(options, variables=found, compiled=caches.count_files(args.caches))
        green = [run_tier(args.root, plan, tiers[name], args.output, options) for name in names]
        if not all(green):
            raise GpuSuiteError(
                "red: " + ", ".join(n for n, ok in zip(names, green, strict=True) if not ok),
                where=str(args.output),
                remedy="the table above says which tests, and why",
            )
    except ForgeError as error:
        print(f"{type(error).__name__} (exit {error.exit_code})\n{error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
