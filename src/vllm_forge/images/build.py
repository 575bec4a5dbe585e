"""One image: from a plan to a checked OCI layout.

The steps are the same for a real run and for a dry run; the runner decides whether they are
done or printed. What is finished is kept under a key of its inputs, so a killed build goes on
where it was, and a changed patch rebuilds one small layer.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from vllm_forge.host import (
    atomic_path,
    console,
    exclusive,
    move,
    report,
)
from vllm_forge.images.assembly import (
    NamedLayers,
    Top,
    expectation,
    image_config,
    image_layers,
    image_shares,
    patched_wheel,
    slimmed,
    top_entries,
    trial_name,
    wheel_layers,
)
from vllm_forge.images.base import make_rootfs, write_host_sources
from vllm_forge.images.checks import (
    TRIAL_ARGV,
    check_layout,
    check_sizes,
    judge,
    write_inputs,
)
from vllm_forge.images.content import (
    VLLM,
    labels,
    patch_key,
    stack_record,
)
from vllm_forge.images.contract import image_contract, recorded_selection
from vllm_forge.images.engine import Trial
from vllm_forge.images.errors import LayoutError
from vllm_forge.images.layer_jobs import write_layers
from vllm_forge.images.layout import (
    Image,
    blob_times,
    read_image,
    set_name,
    write_image,
)
from vllm_forge.images.prewarm import prewarm_layer
from vllm_forge.images.store import forget_damaged, write_layer
from vllm_forge.images.system import host_secrets, load_system, make_system
from vllm_forge.patches import check_line
from vllm_forge.sources import SourceRepo, Wheelhouse

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_forge.host import Runner
    from vllm_forge.images.plan import ImagePlan


@dataclass(frozen=True, kw_only=True)
class Built:
    """A finished image and whether anything had to be done for it."""

    image: Image
    fresh: bool


def build_image(plan: ImagePlan, runner: Runner) -> Built:
    """Build and check a cell's image, unless it is there.

    Raises:
        BusyError: this cell is being built by another process.
        DiskSpaceError: before anything is written.
        ForgeError: as each step says.
    """
    with exclusive(f"build-{plan.cell.name}", wait=False):
        if not plan.options.refresh_base and (known := plan.up_to_date()):
            return Built(image=known, fresh=False)
        plan.require_disk()
        Build(plan, runner).steps()
        return Built(image=read_image(plan.target), fresh=True)


class Build:
    """The steps of one build."""

    def __init__(self, plan: ImagePlan, runner: Runner) -> None:
        self.plan = plan
        self.cell = plan.cell
        self.runner = runner
        self.epoch = plan.cell.base.source_date_epoch
        self.started = time.monotonic()

    def steps(self) -> None:
        """All steps, in order; the system image is made beside the wheel layers."""
        run = self.runner
        plan = self.plan
        plan.engine.check(run)
        run.act(f"read what vLLM selects on {self.cell.sku_name}", self.read_selection)
        with ThreadPoolExecutor(1) as beside:
            system = beside.submit(self.make_system)
            run.act(
                f"fetch {len(plan.lock.wheels)} wheels of {self.cell.line.lock}, write "
                f"{len(plan.groups)} layers, apply the series, write the patched wheel",
                lambda: self.make_layers(self.make_wheel),
            )
            key = system.result()
        run.act("write the layer of the patches", lambda: self.make_top(key))
        run.act(f"assemble the image in {plan.work}", self.assemble)
        with report("check the image inside"), ThreadPoolExecutor(1) as beside:
            outside = beside.submit(
                run.act, "check the kernel contract, the layout and every blob", self.check_outside
            )
            output = plan.engine.try_image(run, self.trial())
            outside.result()
        run.act("read the verdicts; check the size budget", lambda: self.accept(output))
        run.act(f"give the image its name: {plan.target}", self.publish)

    def read_selection(self) -> None:
        """Before anything is made: the contract cannot be checked without."""
        self.selection = recorded_selection(self.cell)

    def make_system(self) -> str:
        """Rootfs and docker/Dockerfile, by the engine; returns the key of the result.

        One process at a time: engines keep one store, and lines share the system image.
        """
        with self.runner.exclusive("system"):
            return self._make_system(refresh=self.plan.options.refresh_base)

    def _make_system(self, *, refresh: bool) -> str:
        plan = self.plan
        secrets = host_secrets()
        if plan.base.image is None:
            make_rootfs(self.runner, self.cell.base, plan.work, refresh=refresh)
        else:
            # A registry image may lack packages: apt in it uses this host's mirrors.
            sources = plan.work / "sources.list"
            write_host_sources(self.runner, self.cell.base.suite, sources)
            secrets["apt-sources"] = sources
        return make_system(
            self.runner, plan.engine, self.cell, plan.base, plan.work,
            secrets=secrets, refresh=refresh,
        )  # fmt: skip

    def make_layers(
        self, meanwhile: Callable[[], None] = lambda: None, *, slim: bool = True
    ) -> None:
        """Download and write the wheel layers; see ``write_layers``."""
        write_layers(self.cell, self.plan.groups, meanwhile, slim=slim)

    def make_wheel(self) -> None:
        """Apply the series; write the line's patched wheel."""
        repo = SourceRepo()
        self.applied = check_line(self.cell.root, self.cell.line_name, self.cell.line, repo)
        self.wheel = patched_wheel(self.cell, self.plan.lock, self.applied, repo, Wheelhouse())

    def make_top(self, system_key: str) -> None:
        """The last, small layer: changed files, metadata, stack.json."""
        system = load_system(system_key)
        lock, prewarm = self.plan.lock, self.plan.options.prewarm
        stack = stack_record(
            cell=self.cell,
            lock=lock,
            patches=self.plan.patches,
            wheel=self.wheel,
            base={"system": system.digest, "engine": self.plan.engine.name},
            debian=system.debian,
            slim=slimmed(self.wheel_layers()),
            prewarm=prewarm.record() if prewarm is not None else None,
        )
        published = lock.find(VLLM)
        entries = top_entries(
            Wheelhouse().path(published), self.wheel.path, stack, self.cell.line.python
        )
        layer = write_layer(patch_key(self.cell, published, stack), entries, self.epoch)
        compiled = None if prewarm is None else prewarm_layer(prewarm, self.epoch)
        self.top = Top(system=system, stack=stack, layer=layer, prewarm=compiled)

    def wheel_layers(self) -> NamedLayers:
        """The layers of the lock, lowest first."""
        return wheel_layers(self.cell, self.plan.groups)

    def assemble(self) -> None:
        """Write the candidate layout, and what the checks inside must find."""
        top = self.top
        created = datetime.fromtimestamp(self.epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.labels = labels(top.stack, created)
        self.layers = image_layers(self.cell, top, self.wheel_layers())
        self.candidate = write_image(
            self.plan.work / "candidate",
            layers=self.layers,
            config=image_config(
                self.cell, top, self.labels, self.layers, self.plan.options.prewarm
            ),
            epoch=self.epoch,
            name=trial_name(self.cell),
        )
        write_inputs(self.plan.work / "inputs", expectation(self.cell, self.applied, top.stack))

    def trial(self) -> Trial:
        """The checks inside, as a command; known before there is an image (dry run)."""
        if hasattr(self, "top"):
            wheels = [layer.files for _, layer in reversed(self.wheel_layers())]
            root = [self.top.system.root] if self.top.system.root is not None else []
            compiled = [self.top.prewarm.files] if self.top.prewarm is not None else []
            lowers = [*compiled, self.top.layer.files, *wheels, *root]
            image = self.candidate
        else:
            slim = [group for group in self.plan.groups if group.slim_key is not None]
            compiled = [] if self.plan.options.prewarm is None else [Path()]
            lowers = [Path()] * (len(self.plan.groups) + len(slim) + len(compiled) + 2)
            image = Image(path=self.plan.work / "candidate", digest="", config={}, manifest={})
        return Trial(
            image=image,
            name=trial_name(self.cell),
            lowers=tuple(lowers),
            inputs=self.plan.work / "inputs",
            argv=TRIAL_ARGV,
            work=self.plan.work,
        )

    def check_outside(self) -> None:
        """What needs no running: the contract; config, labels, and the hash of every blob."""
        self.contract = None
        if self.selection is not None:
            folders = [layer.files for _, layer in self.wheel_layers()]
            folders.append(self.top.layer.files)
            self.contract = image_contract(self.cell, self.selection, folders)
            self.contract.check()
        try:
            prewarmed = self.plan.options.prewarm is not None
            check_layout(self.candidate, self.labels, prewarmed=prewarmed)
        except LayoutError:
            # The cache was touched: forget what is damaged, so that the next build is whole.
            for folder in forget_damaged(layer.blob for layer in self.layers):
                console.print(f"  deleted: {folder} is damaged", style="dim")
            raise

    def accept(self, output: str) -> None:
        """All verdicts, or no image."""
        self.verdicts = judge(output)
        for note in self.contract.notes if self.contract is not None else ():
            console.print(f"  [yellow]contract[/] {escape(note)}")
        self.shares = image_shares(self.top, self.layers)
        check_sizes(self.shares, self.cell.line.budget_mb, self.cell.base.budget_mb)

    def publish(self) -> None:
        """Rename the candidate to its final name, then write the record beside it."""
        plan = self.plan
        record = {
            "digest": f"sha256:{self.candidate.digest}",
            "size": self.candidate.size,
            "wheels": sum(wheel.size for wheel in plan.lock.wheels),
            "seconds": round(time.monotonic() - self.started, 1),
            "inputs": plan.inputs(),
            "details": plan.details(),
            "stack": self.top.stack,
            "layers": [asdict(share) for share in self.shares],
            "checks": self.verdicts,
            "contract": self.contract.record() if self.contract is not None else None,
        }
        plan.record_path.unlink(missing_ok=True)
        record["blobs"] = blob_times(self.candidate)
        with atomic_path(plan.target) as aside:
            move(self.candidate.path, aside)
            set_name(aside, plan.name)
        with atomic_path(plan.record_path) as aside:
            aside.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
