"""One image: a pipeline from a plan to a checked OCI layout, each step a value for the next.

The steps are the same for a real run and for a dry run; the runner decides whether they are
done or printed. What is finished is kept under a key of its inputs, so a killed build goes on
where it was, and a changed patch rebuilds one small layer.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from vllm_forge.host import atomic_path, console, exclusive, move, report
from vllm_forge.images.assembly import (
    Candidate,
    PatchedSource,
    assemble,
    make_wheel,
    write_patch_layer,
)
from vllm_forge.images.base import make_rootfs, write_host_sources
from vllm_forge.images.checks import (
    LayerShare,
    check_layout,
    check_names,
    check_sizes,
    image_contract,
    judge,
    recorded_selection,
)
from vllm_forge.images.errors import LayoutError
from vllm_forge.images.layer_jobs import write_layers
from vllm_forge.images.layout import Image, blob_times, read_image, set_name
from vllm_forge.images.plan import hashes
from vllm_forge.images.store import forget_damaged
from vllm_forge.images.system import host_secrets, load_system, make_system

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.host import Runner
    from vllm_forge.images.plan import ImagePlan
    from vllm_forge.kernels.coverage.contract import Contract
    from vllm_forge.kernels.selection.record import SelectionRecord


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """A finished image and whether anything had to be done for it."""

    image: Image
    fresh: bool


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What the checks of an image that passed have found."""

    verdicts: dict[str, Any]
    shares: tuple[LayerShare, ...]
    contract: Contract | None


def build_image(plan: ImagePlan, runner: Runner) -> BuildResult:
    """Build and check a cell's image, unless it is there.

    Raises:
        BusyError: this cell is being built by another process.
        DiskSpaceError: before anything is written.
    """
    with exclusive(f"build-{plan.cell.name}", wait=False):
        if not plan.options.refresh_base and (known := plan.up_to_date()):
            return BuildResult(image=known, fresh=False)
        plan.require_disk()
        build_steps(plan, runner)
        return BuildResult(image=read_image(plan.target), fresh=True)


def build_steps(plan: ImagePlan, runner: Runner) -> None:
    """All steps, in order; the system image is built while the wheel layers are written."""
    cell, started = plan.cell, time.monotonic()
    plan.engine.check(runner)
    selection = runner.act(
        f"read what vLLM selects on {cell.sku_name}", lambda: recorded_selection(plan.project, cell)
    )
    with ThreadPoolExecutor(1) as pool:
        system_job = pool.submit(build_system, plan, runner)
        source = runner.act(
            f"fetch {len(plan.lock.wheels)} wheels of {cell.line.lock}, write "
            f"{len(plan.groups)} layers, apply the series, write the patched wheel",
            lambda: build_layers(plan),
        )
        system_key = system_job.result()
    patch = runner.act(
        "write the layer of the patches",
        lambda: write_patch_layer(plan, load_system(system_key), source()),
    )
    candidate = runner.act(
        f"assemble the image in {plan.work}", lambda: assemble(plan, source(), patch())
    )
    with report("check the image inside"), ThreadPoolExecutor(1) as pool:
        outside = pool.submit(
            runner.act,
            "check the kernel contract, the layout and every blob",
            lambda: check_outside(plan, selection(), candidate()),
        )
        as_image_user, as_any_user = plan.checks_inside()
        outputs = [plan.engine.run_in_image(runner, as_image_user)]
        contract = outside.result()  # first: it deletes a damaged layer, which the next run mounts
        outputs.append(plan.engine.run_in_image(runner, as_any_user))
    checks = runner.act(
        "read the verdicts; check the size budget",
        lambda: accept(plan, candidate(), outputs, contract()),
    )
    runner.act(
        f"give the image its name: {plan.target}",
        lambda: publish(plan, candidate(), checks(), seconds=time.monotonic() - started),
    )


def build_system(plan: ImagePlan, runner: Runner) -> str:
    """Rootfs and docker/Dockerfile, by the engine; returns the key of the result.

    One process at a time: engines keep one store, and lines share the system image.
    """
    refresh, base = plan.options.refresh_base, plan.cell.base
    with runner.exclusive("system"):
        secrets = host_secrets()
        if plan.base.image is None:
            make_rootfs(runner, base, plan.work, refresh=refresh)
        else:
            # A registry image may lack packages: apt in it uses this host's mirrors.
            secrets["apt-sources"] = plan.work / "sources.list"
            write_host_sources(runner, base.suite, secrets["apt-sources"])
        return make_system(runner, plan, secrets=secrets, refresh=refresh)


def build_layers(plan: ImagePlan) -> PatchedSource:
    """Download and write the wheel layers; meanwhile apply the series and write its wheel."""
    return write_layers(plan.cell, plan.groups, lambda: make_wheel(plan))


def check_outside(
    plan: ImagePlan, selection: SelectionRecord | None, candidate: Candidate
) -> Contract | None:
    """What needs no running: the contract; config, labels, and the hash of every blob."""
    contract = None
    if selection is not None:
        contract = image_contract(plan.cell, selection, candidate.folders)
        contract.check()
    try:
        prewarmed = plan.options.prewarm is not None
        check_layout(candidate.image, candidate.labels, prewarmed=prewarmed)
    except LayoutError:
        # The cache was touched: forget what is damaged, so that the next build is whole.
        for folder in forget_damaged(layer.blob for layer in candidate.layers):
            console.print(f"  deleted: {folder} is damaged", style="dim")
        raise
    return contract


def accept(
    plan: ImagePlan, candidate: Candidate, outputs: Sequence[str], contract: Contract | None
) -> CheckReport:
    """Read all verdicts.

    Raises:
        ImageCheckError, SizeBudgetError: a check failed.
    """
    compiler = "nvidia-cuda-nvcc" in candidate.stack["packages"]
    verdicts = judge(outputs, check_names(compiler=compiler))
    for note in contract.notes if contract is not None else ():
        console.print(f"  [yellow]contract[/] {escape(note)}")
    check_sizes(candidate.shares, plan.cell.line.budget_mb, plan.cell.base.budget_mb)
    return CheckReport(verdicts=verdicts, shares=candidate.shares, contract=contract)


def publish(plan: ImagePlan, candidate: Candidate, checks: CheckReport, *, seconds: float) -> None:
    """Rename the candidate to its final name, then write its record."""
    inputs = plan.inputs()
    record = {
        "digest": f"sha256:{candidate.image.digest}",
        "size": candidate.image.size,
        "wheels": sum(wheel.size for wheel in plan.lock.wheels),
        "seconds": round(seconds, 1),
        "inputs": hashes(inputs),
        "details": inputs,
        "stack": candidate.stack,
        "layers": [asdict(share) for share in checks.shares],
        "checks": checks.verdicts,
        "contract": checks.contract.record() if checks.contract is not None else None,
        "blobs": blob_times(candidate.image),
    }
    plan.record_path.unlink(missing_ok=True)
    with atomic_path(plan.target) as aside:
        move(candidate.image.path, aside)
        set_name(aside, plan.name)
    with atomic_path(plan.record_path) as aside:
        aside.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
