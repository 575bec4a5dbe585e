"""One image: a pipeline from a plan to a checked OCI layout, each step a value for the next.

The steps are the same for a real run and for a dry run; the runner decides whether they are
done or printed. What is finished is kept under a key of its inputs, so a killed build goes on
where it was, and a changed patch rebuilds one small layer.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from vllm_forge import host
from vllm_forge.errors import ForgeError
from vllm_forge.host.files import inode, remove_foreign
from vllm_forge.images import checks, compile_sources, cubins, layout, store
from vllm_forge.images.bytecode import (
    COMPILER,
    LAYER,
    bytecode_key,
    bytecode_layer,
    kept_bytecode,
)
from vllm_forge.images.content import (
    HEALTH,
    VLLM,
    labels,
    patch_entries,
    patch_key,
    stack_entry,
    stack_record,
)
from vllm_forge.images.engines import BYTECODE
from vllm_forge.images.errors import BuildRecordError, LayoutError
from vllm_forge.images.layer_checks import judge_layers
from vllm_forge.images.layout import ImageLayer
from vllm_forge.images.plan import ImagePlan, require_host, why_rebuild, with_packages
from vllm_forge.images.prewarm import SCRIPT, prewarm_layer
from vllm_forge.images.record import differences, keep_digest
from vllm_forge.images.rootfs import CURRENT
from vllm_forge.images.store import StoredLayer
from vllm_forge.images.system import (
    System,
    build_system,
    load_system,
    require_described,
    system_folder,
)
from vllm_forge.images.wheel_layers import update_record, write_layers
from vllm_forge.images.wheels import Entry
from vllm_forge.kernels.coverage.contract import Contract
from vllm_forge.kernels.coverage.families import AT_START
from vllm_forge.kernels.errors import ContractError
from vllm_forge.kernels.selection.questions import declared_device
from vllm_forge.kernels.selection.record import SelectionRecord
from vllm_forge.matrix import ImageCell
from vllm_forge.patches import check_line, kept_wheel
from vllm_forge.patches.wheel import PatchedWheel, python_blobs
from vllm_forge.project import Project
from vllm_forge.sources import SourceRepo, Wheelhouse
from vllm_forge.sources.debian import read_base_lock
from vllm_forge.sources.errors import LockFileError


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An image that is complete and not checked."""

    image: layout.Image
    system: System
    # Name and layer of what is above the system, lowest first, empty ones included.
    written: list[tuple[str, StoredLayer]]
    stack: dict[str, Any]  # its stack.json
    blobs: dict[str, str]  # hashes of vLLM's Python files in the patched tree
    linked: dict[str, list[int]]  # digest -> ``inode`` of a written layer's blob in the layout
    hashed: dict[str, list[int]]  # those of them that were not touched since they were hashed

    @property
    def folders(self) -> tuple[Path, ...]:
        """Unpacked layers that vllm-forge wrote, lowest first, without that of bytecode."""
        return tuple(layer.files for name, layer in self.written if name != LAYER)

    @property
    def bytecode(self) -> Path | None:
        """The unpacked layer of bytecode, if there is one."""
        return next((layer.files for name, layer in self.written if name == LAYER), None)


def build_image(plan: ImagePlan, runner: host.Runner) -> tuple[layout.Image, bool]:
    """Build and check a cell's image, unless it is there; also whether anything had to be done.

    Raises BusyError: another process builds this cell; DiskSpaceError: before anything is written.
    """
    with host.exclusive(f"build-{plan.cell.name}", wait=False):
        if known := plan.up_to_date():
            return known, False
        require_host(plan.target)
        if plan.record_path.exists():  # else nothing can be up to date, and they come with wheels
            plan = with_packages(plan)
            if known := plan.up_to_date():  # once more on current packages
                return known, False
        with suppress(BuildRecordError):
            state = why_rebuild(plan)[0]
            if state in {"changed", "not in the cache"}:
                host.console.print(f"{plan.target}: {state}; it is built again", markup=False)
        plan.require_disk()
        build_steps(plan, runner)
        return layout.read_image(plan.target), True


def build_steps(plan: ImagePlan, runner: host.Runner) -> None:
    """All steps, in order; the system image is built while the wheel layers are written."""
    cell, engine, started = plan.cell, plan.engine, time.monotonic()
    dry = isinstance(runner, host.RecordingRunner)
    engine.check(runner)
    selection = runner.act(
        f"read what vLLM selects on {cell.sku_name}",
        lambda: checks.recorded_selection(plan.project, cell),
    )
    with ThreadPoolExecutor(1) as pool:
        system_job = pool.submit(_based, plan, runner, dry=dry)
        wheel = runner.act(
            f"fetch {len(plan.lock.wheels)} wheels of {cell.line.lock}, write "
            f"{len(plan.groups)} layers, apply the series, write the patched wheel",
            lambda: write_layers(plan, lambda: patched_wheel(plan.project, cell)),
        )
        plan = system_job.result()
    if plan.carries:
        what = f"fetch FlashInfer's kernel archives: {', '.join(plan.downloads)}"
        runner.act(what, lambda: cubins.kernel_layer(plan))
    compiled = compile_inside(plan, runner, wheel) if plan.options.prewarm is not None else None
    candidate = runner.act(
        f"assemble the image in {plan.work}",
        lambda: assemble(plan, load_system(plan.system_key), wheel(), compiled and compiled()),
    )
    as_image_user, as_any_user = plan.checks_inside()
    with (
        host.report("check the image inside"),
        _forgetting_damage(plan),
        nullcontext()
        if dry or as_image_user.bytecode is None
        else kept_bytecode(as_image_user.bytecode),
        ThreadPoolExecutor(1) as pool,
        engine.loaded(runner, plan.candidate, plan.candidate_name),
    ):
        inside = pool.submit(engine.run_in_image, runner, as_image_user)
        if dry:
            inside.result()  # so that its command is printed first
        # Beside it, on another core. Its error counts first: it deletes damaged layers of the runs.
        judged = runner.act(
            "check the kernel contract, the layout and every blob",
            lambda: check_outside(plan, selection(), candidate()),
        )
        outputs = [engine.run_in_image(runner, as_any_user), inside.result()]
        verdicts = runner.act(
            "read the verdicts; check the size budget",
            lambda: accept(plan, candidate(), outputs, *judged()),
        )
    runner.act(
        f"give the image its name: {plan.target}",
        lambda: publish(plan, candidate(), verdicts(), judged()[0], time.monotonic() - started),
    )


def _based(plan: ImagePlan, runner: host.Runner, *, dry: bool) -> ImagePlan:
    """Build the system image; return the plan with the packages that could be had."""
    if not dry:
        plan = with_packages(plan)
    build_system(plan, runner)
    return plan


def patched_wheel(project: Project, cell: ImageCell) -> PatchedWheel:
    """Apply the series; write the line's one patched wheel, in the cache."""
    repo, wheelhouse = SourceRepo(), Wheelhouse()
    published = project.lock(cell.line_name).find(VLLM)
    with repo.mending():
        applied = check_line(project, cell.line_name, repo)
        wheelhouse.fetch([published])
        key, path = f"{published.sha256}-{applied.result}", wheelhouse.verify(published)
        folder = host.cache_root() / "patched" / key
        with host.exclusive(f"patched-{key}", wait=True):  # two SKUs of a line may be built at once
            for other in folder.glob("*"):
                remove_foreign(other)
            return kept_wheel(repo, applied, path, cell.line.vllm, folder)


def compile_inside(
    plan: ImagePlan, runner: host.Runner, wheel: Callable[[], PatchedWheel]
) -> Callable[[], StoredLayer]:
    """Compile all Python sources of the image inside it, unless that was done; the layer."""
    plain, epoch = plan.unbaked, plan.cell.base.source_date_epoch
    candidate = runner.act(
        f"assemble the image without what is compiled in {plan.work}",
        lambda: assemble(plain, load_system(plan.system_key), wheel()),
    )

    def prepare() -> None:
        host.remove(plan.compiled)
        plan.compiled.mkdir()
        plan.compiled.chmod(0o777)  # whoever the image's user is here
        script = plan.work / "inputs" / COMPILER.name
        shutil.copyfile(COMPILER, script)
        script.chmod(0o755)

    dry = isinstance(runner, host.RecordingRunner)
    key = "" if dry else bytecode_key(candidate().image.layers, epoch)
    if dry or store.usable(key) is None:
        runner.act(f"make the folder {plan.compiled}", prepare)
        with plan.engine.loaded(runner, plan.candidate, plan.candidate_name):
            plan.engine.run_in_image(runner, plain.compiling_inside())
    layer = runner.act(
        "write the layer of bytecode",
        lambda: bytecode_layer(key, plan.compiled / compile_sources.NAME, epoch),
    )
    runner.act(f"delete {plan.compiled}", lambda: host.remove(plan.compiled))
    return layer


def assemble(
    plan: ImagePlan, system: System, wheel: PatchedWheel, compiled: StoredLayer | None = None
) -> Candidate:
    """Write the upper layers, the candidate's layout, and what the checks inside must find.

    ``compiled``: the layer of bytecode of an image that carries compiled kernels.
    """
    cell, prewarm, written = plan.cell, plan.options.prewarm, wheel_layers(plan)
    epoch = cell.base.source_date_epoch
    removed = {path: row for _, layer in written for path, row in layer.removed.items()}
    slim = {path: row for path, row in sorted(removed.items()) if row["bytes"]}
    stack = stack_record(plan, wheel, system, slim)
    if plan.carries:
        archives, stack["kernels"] = cubins.kernel_layer(plan)
        written.append(("kernel archives", archives))
    patch = write_patch_layer(plan, wheel, stack)
    written.append((cell.line.series, patch))
    if prewarm is not None and compiled is not None:
        written.append((LAYER, compiled))
        written.append(("compiled kernels", prewarm_layer(prewarm, epoch)))
    layers = [
        *system.layers,
        *(ImageLayer(blob=row.blob, name=name) for name, row in written if not row.empty),
    ]
    config = image_config(plan, system.config, stack, layers)
    before = {row.blob.digest: store.hashed_blob(row) for _, row in written if not row.empty}
    image = layout.write_image(
        plan.candidate, layers=layers, config=config, epoch=epoch, name=plan.candidate_name
    )
    # A link changes a file's ctime, and nothing else.
    linked = {name: inode(image.blob(name).lstat()) for name in before}
    hashed = {name: now for name, now in linked.items() if now[:-1] == before[name][:-1]}
    checks.write_inputs(plan.work / "inputs", expectation(cell, stack))
    links = {plan.patch_files: patch, plan.bytecode_files: compiled}
    for link, layer in links.items():
        host.remove(link)
        if layer is not None:
            link.symlink_to(layer.files)
    blobs = python_blobs(SourceRepo(), wheel.tree)
    return Candidate(
        image=image,
        system=system,
        written=written,
        stack=stack,
        blobs=blobs,
        linked=linked,
        hashed=hashed,
    )


def wheel_layers(plan: ImagePlan) -> list[tuple[str, StoredLayer]]:
    """Name and layer of all groups, lowest first; written by now, empty ones included."""
    of_lock, layers = f"of {plan.cell.line.lock}", []
    for group in plan.groups:
        layers.append(
            (f"{group.name} wheels {of_lock}", store.require_stored(group.key, checked=True))
        )
        if group.slim_key is not None:
            name = f"{group.name} libraries for {plan.cell.sku.arch} {of_lock}"
            layers.append((name, store.require_stored(group.slim_key, checked=True)))
    return layers


def write_patch_layer(plan: ImagePlan, wheel: PatchedWheel, stack: dict[str, Any]) -> StoredLayer:
    """Changed files, metadata, stack.json, the health check.

    RECORD has the hashes of slim libraries.
    """
    cell, published = plan.cell, plan.lock.find(VLLM)
    health = Entry(path=f"opt/vllm-forge/{HEALTH.name}", content=HEALTH.read_bytes())
    entries = [health, stack_entry(stack)]
    for entry in patch_entries(Wheelhouse().path(published), wheel.path, cell.line.python):
        content = entry.content
        if content is not None and entry.path.endswith(".dist-info/RECORD"):
            content = update_record(content, entry.path, stack["slim"])
        entries.append(replace(entry, content=content))
    entries.sort(key=lambda entry: entry.path)
    return store.write_layer(
        patch_key(cell, published, stack), entries, cell.base.source_date_epoch
    )


def image_config(
    plan: ImagePlan, system: dict[str, Any], stack: dict[str, Any], layers: Sequence[ImageLayer]
) -> dict[str, Any]:
    """The ``config`` object: the system's, with the SKU's variables, labels, and the prewarming."""
    prewarm = plan.options.prewarm
    variables, config = dict(sorted(plan.cell.sku.env.items())), dict(system)
    if prewarm is None:  # else bytecode is beside the sources, where Python does not look with it
        variables[BYTECODE] = bytecode_place(layers)
    else:
        variables |= dict(sorted(prewarm.environment().items()))
        config["Entrypoint"] = [SCRIPT, *config["Entrypoint"]]
    more = {}
    if plan.carries:
        variables |= cubins.ENVIRONMENT
        more["io.vllm-forge.kernels"] = " ".join(stack["kernels"])
    elif plan.downloads:
        more["io.vllm-forge.network"] = f"{AT_START}: {' '.join(plan.downloads)}"
    env = [*config["Env"], *(f"{name}={value}" for name, value in variables.items())]
    created = layout.timestamp(plan.cell.base.source_date_epoch)
    return config | {"Env": env, "Labels": labels(stack, created) | more}


def bytecode_place(layers: Sequence[ImageLayer]) -> str:
    """Where Python keeps what it compiles: the image has none, and its user cannot write there.

    Separate for each image. All sources have one time, and Python asks only for time and size: two
    images that share a volume would run each other's code.
    """
    return f"/cache/python/{host.hash_of([layer.blob.diff_id for layer in layers])[:16]}"


def expectation(cell: ImageCell, stack: dict[str, Any]) -> dict[str, Any]:
    """What image_checks.py must find."""
    return {
        "vllm": stack["packages"][VLLM],
        "torch": stack["packages"]["torch"],
        "arch": stack["arch"],
        "compiler": "nvidia-cuda-nvcc" in stack["packages"],
        "device": declared_device(cell.sku, count=1).model_dump(),
        "unimportable": list(cell.line.unimportable),
        "kernels": list(stack.get("kernels", ())),
    }


@contextmanager
def _forgetting_damage(plan: ImagePlan) -> Iterator[None]:
    """When a check fails, delete unpacked copies that are damaged: what ships are the blobs.

    Bytecode has nothing to compare it with. Code of an image wrote it, so it goes as a whole.
    """
    try:
        yield
    except ForgeError:
        host.remove(host.cache_root() / "bytecode")
        if plan.bytecode_files.is_symlink():
            host.remove(plan.bytecode_files.resolve().parent)
        system = load_system(plan.system_key)
        if not system.root_intact:
            store.forget(system_folder(plan.system_key))
        for path in plan.checks_inside()[0].lower_dirs[:-1]:
            layer = store.stored(path.resolve().parent.name)
            if layer is not None and not store.intact(layer):
                store.forget(layer.folder)
        raise


def check_outside(
    plan: ImagePlan, selection: SelectionRecord | None, candidate: Candidate
) -> tuple[Contract | None, dict[str, Any]]:
    """What needs no running: the contract; config, labels, hashes of blobs; the layers' files."""
    system, image, contract = candidate.system, candidate.image, None
    require_described(plan, system.config)
    if selection is not None:
        contract = checks.image_contract(
            plan.cell, selection, checks.contents_of(candidate.folders, plan.cell.line.python)
        )
        contract.check()
        if contract.downloads != set(() if plan.carries else plan.downloads):
            raise ContractError(
                "other kernels than recorded are downloaded at the first start: "
                f"{', '.join(sorted(contract.downloads)) or 'none'}",
                where=f"{checks.COVERAGE}/{plan.cell.line_name}.json",
                remedy="run: nox -s forge -- kernels coverage --record",
            )
    try:
        config = image_config(plan, system.config, candidate.stack, image.layers)
        checks.check_layout(image, config, candidate.hashed)
    except LayoutError:
        # The cache was touched: forget what is damaged, so that the next build is whole.
        store.forget_damaged(layer.blob for layer in system.layers)
        store.forget_damaged(layer.blob for _, layer in candidate.written)
        raise
    for _, layer in candidate.written:
        if stamp := candidate.linked.get(layer.blob.digest):
            store.note_hashed(layer.folder, layer.blob, stamp)
    return contract, judge_layers(plan, candidate)


def accept(
    plan: ImagePlan,
    candidate: Candidate,
    outputs: Sequence[str],
    contract: Contract | None,
    layers: dict[str, Any],
) -> dict[str, Any]:
    """Read and return all verdicts. Raises ImageCheckError, SizeBudgetError: a check failed."""
    compiler = "nvidia-cuda-nvcc" in candidate.stack["packages"]
    verdicts = checks.judge([json.dumps(layers), *outputs], checks.check_names(compiler=compiler))
    for note in contract.notes if contract is not None else ():
        host.console.print(f"  [yellow]contract[/] {escape(note)}")
    checks.check_sizes(
        candidate.image.layers, len(candidate.system.layers),
        plan.cell.line.budget_mb, plan.cell.base.budget_mb,
    )  # fmt: skip
    return verdicts


def _show_other_packages(plan: ImagePlan, installed: dict[str, str]) -> None:
    """Say which packages are not those of the lock, if there is one for these rows."""
    try:
        lock = read_base_lock(plan.project.root, plan.cell.base)
    except LockFileError as error:  # this build does not use it
        host.console.print(f"  [yellow]base[/] {escape(str(error))}")
        return
    locked = {package.name: package.version for package in (lock.packages if lock else ())}
    for change in differences(locked, installed) if locked not in ({}, installed) else ():
        host.console.print(f"  [yellow]base[/] {escape(change)}")


def publish(
    plan: ImagePlan,
    candidate: Candidate,
    verdicts: dict[str, Any],
    contract: Contract | None,
    seconds: float,
) -> None:
    """Rename the candidate to its final name, then write its record."""
    if plan.base.label == CURRENT:
        _show_other_packages(plan, candidate.stack["debian"])
    systems = len(candidate.system.layers)
    record: dict[str, Any] = {
        "digest": f"sha256:{candidate.image.digest}",
        "size": candidate.image.size,
        "wheels": sum(wheel.size for wheel in plan.lock.wheels),
        "seconds": round(seconds, 1),
        "engine": plan.engine.name,
        "inputs": plan.inputs(),
        "stack": candidate.stack,
        "layers": [
            {"name": layer.name, "size": layer.blob.size, "system": number < systems}
            for number, layer in enumerate(candidate.image.layers)
        ],
        "checks": verdicts,
        "contract": contract.record() if contract is not None else None,
        "blobs": layout.blob_times(candidate.image),
    }
    plan.record_path.unlink(missing_ok=True)
    keep_digest(plan.record_path, record["inputs"], record["digest"])
    with host.atomic_path(plan.target) as aside:
        shutil.move(candidate.image.path, aside)
        layout.set_name(aside, candidate.image.digest, plan.name)
    host.write_json(plan.record_path, record)  # the order of inputs counts
