"""Run the GPU suite inside an image with the GPUs of this host.

What goes to a GPU host beside the packages is the suite, its plan, and the sources it needs.
``source/`` has what the race suite's positive controls are compiled from, ``upstream/`` vLLM's own
tests. ``variants/<name>/`` has the Python files that the series changes, as published and with one
patch left out: a test lays them over the installed vLLM to see the error that a patch cures.

What JIT compilers left there goes into kits and images. Triton, TileLang and others compile kernels
when a model first runs; DeepSeek-V4 waits for minutes. Each keeps its results where an environment
variable says. The runner (tests/gpu/harness/run.py) writes a key beside them, of the stack that
they are for.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_forge.gputest import errors
from vllm_forge.host import Probe, gpu_container, parse_json, read_data
from vllm_forge.host.files import write_json
from vllm_forge.host.probe import GPU_QUERY
from vllm_forge.host.run import run_container
from vllm_forge.images.docker_api import inspect_image
from vllm_forge.images.errors import EngineTooOldError, EngineUnreachableError
from vllm_forge.images.layout import hex_digest, read_image
from vllm_forge.images.prewarm import (
    FOLDERS,
    SCRIPT,
    Prewarm,
    PrewarmLock,
    place_of,
    prewarm_lock,
    require_plain,
    tree_digest,
)
from vllm_forge.matrix import ImageCell
from vllm_forge.patches import Applied, Patch, check_line, read_series, read_tree_lock
from vllm_forge.patches.series import without
from vllm_forge.patches.wheel import changed_files
from vllm_forge.project import Project
from vllm_forge.proofs.prove import UPSTREAM_REQUIREMENTS, UPSTREAM_SOURCE
from vllm_forge.receipts.errors import ReceiptSubjectError
from vllm_forge.receipts.suite import CODECS_FOLDER, TESTS, plan_tier, read_suite
from vllm_forge.receipts.verification import read_receipts
from vllm_forge.serve.doctor import listed_gpus
from vllm_forge.serve.errors import NoGpuError
from vllm_forge.sources import LockedWheel, SourceRepo, Wheelhouse, read_wheels
from vllm_forge.sources.errors import LockFileError

SOURCE, VARIANTS = "source", "variants"
PUBLISHED = "published"
KEY = "caches.json"
WARM = "warm-"  # and a tier: a green run of it left its kernels (tests/gpu/harness/run.py)
RUN = ("-m", "tests.gpu.harness.run")
WHEELS = {
    "tools": "tests/gpu/requirements.txt", "sanitizer": "tests/gpu/requirements-image.txt",
    "upstream/tools": UPSTREAM_REQUIREMENTS,
}  # fmt: skip
# In an image: the command without its options, and what is set for it.
SUITE = ("/opt/venv/bin/python", *RUN, "/forge/plan.json", "/output")
# An image does not search the working directory (PYTHONSAFEPATH).
ENVIRONMENT = {"PYTHONPATH": "/forge:/forge/src:/forge/tools"}
# Where its wheel has it; the race suite looks for it on the PATH.
SANITIZER = Path("sanitizer/nvidia/cu13/compute-sanitizer/compute-sanitizer")
LAUNCHER = "TreeLauncherSubreaper"  # beside it: starts the program that is checked
# An image with kernels fills its cache first, unless --caches brings others to their place.
IN_IMAGE = f"""export PATH="/forge/{SANITIZER.parent}:$PATH"
[ ! -x {SCRIPT} ] || set -- {SCRIPT} "$@"
exec "$@\""""
WITH_CACHES = f'PATH="/forge/{SANITIZER.parent}:$PATH" exec "$@"'


@dataclass(frozen=True, kw_only=True)
class SuiteImage:
    """An image that the suite runs in; ``digest`` is the SHA-256 of its manifest, hex."""

    name: str
    digest: str
    labels: Mapping[str, str]


def write_bundle(
    project: Project, cell: ImageCell, image: SuiteImage, folder: Path
) -> dict[str, Any]:
    """Fill ``folder``, which must not exist, for an image of the cell; returns its plan.json."""
    repo = SourceRepo()
    applied = check_line(project, cell.line_name, repo)
    plan = make_plan(project, cell, applied.result, image)
    copy_code(project.root, folder)
    repo.unpack(applied.base, read_suite(project.root).release_sources, folder / SOURCE)
    repo.unpack(applied.base, UPSTREAM_SOURCE, folder / "upstream")
    _write_variants(read_series(project.root / cell.line.series), repo, applied, folder / VARIANTS)
    (folder / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    unpack_tools(project.root, folder)
    return plan


def copy_code(root: Path, folder: Path) -> None:
    """Copy the suite, and what it imports of the project."""
    for name in (TESTS, CODECS_FOLDER):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / name, folder / name, ignore=skip)
    for name in ("tests", "src/vllm_forge", "src/vllm_forge/checkpoints"):
        shutil.copyfile(root / name / "__init__.py", folder / name / "__init__.py")


def make_plan(project: Project, cell: ImageCell, tree: str, image: SuiteImage) -> dict[str, Any]:
    """What the runner tests, and by which tiers; refuses an image of another cell, lock or tree."""
    lock = project.lock(cell.line_name).digest
    expected = {
        "sku": cell.sku_name, "line": cell.line_name, "tree": tree, "lock": f"sha256:{lock}"
    }  # fmt: skip
    for name, value in expected.items():
        if (actual := image.labels.get(f"io.vllm-forge.{name}")) != value:
            what = f"the image's {name} is {actual}, expected {value}"
            remedy = f"build {cell.name} again, or name the right --sku, --line and --image"
            raise ReceiptSubjectError(what, where=image.name, remedy=remedy)
    return {
        "sku": cell.sku_name,
        "device": cell.sku.device,
        "compute_capability": cell.sku.compute_capability,
        "line": cell.line_name,
        "vllm": cell.line.vllm,
        "tree": tree,
        "lock_sha256": lock,
        "subject": {"name": image.name, "sha256": image.digest},
        "caches": {"folders": FOLDERS, "key": cache_key(project, cell, tree)},
        "tiers": {
            name: plan_tier(project, name, cell.sku_name) for name in read_suite(project.root).tier
        },
    }


def _write_variants(
    patches: Sequence[Patch], repo: SourceRepo, applied: Applied, folder: Path
) -> None:
    trees = {PUBLISHED: applied.base}
    for number, patch in enumerate(patches):
        trees[f"without-{patch.name[:4]}"] = without(repo, applied, patches, number).tree
    paths = [file.path for file in changed_files(repo, applied)]
    for name, tree in trees.items():
        repo.unpack(tree, paths, folder / name)


def cache_key(project: Project, cell: ImageCell, tree: str) -> dict[str, str]:
    """What kernels are compiled for: the GPU's architecture, the source's tree, all packages."""
    return {
        "compute_capability": cell.sku.compute_capability,
        "tree": tree,
        "kind": "image",  # of images that carry kernels, the digest depends on it
        "stack": project.lock(cell.line_name).digest,
    }


def require_key(folder: Path, key: Mapping[str, str]) -> None:
    """Refuse a folder of ``test-gpu --caches`` with links, or with kernels of another stack."""
    recorded = read_data(
        folder / KEY,
        lambda data: {name: data[name] for name in key},
        errors.JitCacheError,
        what="key of the caches of a run",
        remedy="take the folder that --caches made",
    )
    if different := [name for name in key if recorded[name] != key[name]]:
        name = different[0]
        what = f"the caches are of another stack: {name} is {recorded[name]}, expected {key[name]}"
        remedy = "run the suite with an empty --caches folder"
        raise errors.JitCacheError(what, where=folder / KEY, remedy=remedy)
    require_plain(folder)  # a link would bring files of this host into an image or a kit


def prewarm_of(project: Project, cell: ImageCell, folder: Path) -> Prewarm:
    """Kernels for a cell's image: what ``test-gpu --caches`` left in ``folder``, of its stack."""
    tree = read_tree_lock(project.root / cell.line.series, cell.line_name).result
    key = cache_key(project, cell, tree)
    require_key(folder, key)
    return Prewarm(folder=folder, key=key, digest=tree_digest(folder))


def lock_prewarm(project: Project, cell: ImageCell, folder: Path) -> Path:
    """Write the lock of the kernels in ``folder``, for releases that carry them; its path.

    Raises JitCacheError: no tier was green with these caches, or its receipt is not committed.
    """
    prewarm = prewarm_of(project, cell, folder)
    tiers = sorted(path.name.removeprefix(WARM) for path in folder.glob(f"{WARM}*"))
    images = {
        detail.tier: row.statement.sha256
        for row in read_receipts(project).valid
        if (detail := row.statement.detail).sku == cell.sku_name and detail.line == cell.line_name
    }
    made_by = {images.get(tier) for tier in tiers}
    if len(made_by) != 1 or None in made_by:
        lacking = [tier for tier in tiers if tier not in images]
        what = (
            "no tier was green with these caches" if not tiers else "the caches are of two images"
        )
        if lacking:
            what = f"no receipt of tier {', '.join(lacking)}, whose run compiled these kernels"
        remedy = "run a tier with --caches until it is green, and commit its receipt"
        raise errors.JitCacheError(what, where=str(folder), remedy=remedy)
    lock = PrewarmLock(
        sha256=prewarm.digest, bytes=prewarm.size, key=dict(prewarm.key),
        image=f"sha256:{made_by.pop()}", tiers=tuple(tiers),
    )  # fmt: skip
    path, _ = prewarm_lock(project.root, cell)
    write_json(path, lock.model_dump(mode="json"))
    return path


def suite_wheels(root: Path, folder: str) -> list[LockedWheel]:
    """Wheels that run the suite, which no image has, by their folder in a bundle."""
    return list(read_wheels(root / WHEELS[folder], "name wheels, sorted, with hashes")[1])


def require_sku(probe: Probe, cell: ImageCell) -> None:
    """Refuse a host without GPUs, or with others than the SKU's, by WrongGpuError.

    The product name matters, as two products of one capability differ in SMs, memory and clocks:
    the driver's name must be that of the SKU's row, or start with it.
    """
    gpus, message = listed_gpus(probe.ask("nvidia-smi", GPU_QUERY))
    if not gpus:
        raise errors.WrongGpuError(
            f"no GPU to test: {message}",
            where="nvidia-smi",
            remedy="run this on a host of the SKU; make a kit for a host without network: "
            "nox -s forge -- gpu kit --sku SKU --output DIR",
        )
    sku = cell.sku
    for gpu in gpus:
        if gpu.capability != sku.compute_capability or not gpu.name.startswith(sku.device):
            raise errors.WrongGpuError(
                f"{cell.sku_name} is {sku.device} with compute capability "
                f"{sku.compute_capability}; this host has {gpu.name} with {gpu.capability}",
                remedy="run on a host of the SKU",
            )


def find_image(probe: Probe, name: str, layout: Path) -> tuple[str, SuiteImage]:
    """The first engine that has an image of this name, and the image; else NoGpuError.

    ``layout`` is of the cell's build, and need not exist. ReceiptSubjectError: docker does not know
    the manifest, and there is no build.
    """
    docker = "docker: no such image"
    try:
        image = inspect_image(name)
    except (EngineUnreachableError, EngineTooOldError) as error:
        image, docker = None, error.what
    if image is not None:
        digest = _manifest(image, name, layout)
        return "docker", SuiteImage(name=name, digest=digest, labels=_labels(image))
    reply = probe.ask("podman-image", ["podman", "image", "inspect", name])
    podman = "not installed" if reply.missing else "no such image"
    if reply.code == 0:
        try:
            (image,) = parse_json(reply.text)
            digest = hex_digest(image["Digest"])
            return "podman", SuiteImage(name=name, digest=digest, labels=_labels(image))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            podman = f"unexpected answer: {error!r}"
    what = f"no container engine has {name}"
    remedy = "build it with --load, or name it with --image"
    raise NoGpuError(what, where=f"{docker}; podman: {podman}", remedy=remedy)


def _labels(image: dict[str, Any]) -> dict[str, str]:
    return (image.get("Config") or {}).get("Labels") or {}


def _manifest(image: dict[str, Any], name: str, layout: Path) -> str:
    """The manifest's digest of an image that docker has.

    containerd's store has it as the descriptor (API 1.48) or the Id. The classic store's Id is the
    configuration's digest; it knows the manifest of what came from a registry.
    """
    if digest := (image.get("Descriptor") or {}).get("digest"):
        return hex_digest(digest)
    stored, known = hex_digest(image["Id"]), image.get("RepoDigests") or []
    digests = {hex_digest(entry.partition("@")[2]) for entry in known}
    own = {hex_digest(entry.partition("@")[2]) for entry in known if _is_of(entry, name)}
    if stored in digests:
        return stored
    for candidates in (own, digests):
        if len(candidates) == 1:
            return candidates.pop()
    if layout.is_dir():
        built = read_image(layout)
        if stored in {built.digest, hex_digest(built.manifest["config"]["digest"])}:
            return built.digest
    what = f"docker reports only the configuration sha256:{stored}; the manifest digest is unknown"
    remedy = f"pull it from a registry, or have the build that it was loaded from in {layout}"
    raise ReceiptSubjectError(what, where=name, remedy=remedy)


def _is_of(entry: str, name: str) -> bool:
    repository = name.partition("@")[0]
    if ":" in repository.rpartition("/")[2]:  # a tag; before it may be a port
        repository = repository.rpartition(":")[0]
    return entry.partition("@")[0] == repository


def run_in_image(
    project: Project,
    cell: ImageCell,
    probe: Probe,
    reference: str | None,
    *,
    output: Path,
    inputs: dict[str, Path],
    args: Sequence[str],
    caches: Path | None = None,
    network: bool = False,
) -> None:
    """Run the suite inside an image, by the engine that has it, with all GPUs of this host.

    ``reference`` names the image; None is the one that a build with ``--load`` left. ``inputs``:
    place in the bundle -> folder with models or prompts. ``args`` are the runner's.
    ``caches`` keeps what JIT compilers make, and with ``network`` what FlashInfer downloads.
    """
    require_sku(probe, cell)
    name = reference or f"localhost/{cell.name}:{cell.line_name}"
    engine, image = find_image(probe, name, project.root / "dist" / cell.name)
    with tempfile.TemporaryDirectory() as work:
        bundle = Path(work) / "bundle"
        plan = write_bundle(project, cell, image, bundle)
        for place in inputs:  # the bundle is mounted read-only: no engine could make them
            (bundle / place).mkdir(parents=True)
        output.mkdir(parents=True, exist_ok=True)
        mounted = None
        if caches is not None:
            caches.mkdir(parents=True, exist_ok=True)
            mounted = (caches, place_of(plan["caches"]["key"]))
        argv = container_command(
            engine, name, bundle, output.resolve(), args,
            inputs=inputs, caches=mounted, network=network,
        )  # fmt: skip
        code = run_container(argv)
    require_green(code, output)


def container_command(
    engine: str,
    image: str,
    bundle: Path,
    output: Path,
    args: Sequence[str],
    *,
    inputs: dict[str, Path] | None = None,
    caches: tuple[Path, str] | None = None,
    network: bool = False,
) -> list[str]:
    """The run of the suite in an image.

    The tests compile kernels and start servers, so the root is writable; sanitizers and the
    driver need no more rights than a server. Of ``caches``, the folder here and its place there:
    where an image that carries them will have them, since compilers keep absolute paths.
    """
    nets = [] if network else ["--network=none"]
    volumes = [f"--volume={path.resolve()}:/forge/{at}:ro" for at, path in (inputs or {}).items()]
    volumes += [f"--volume={caches[0].resolve()}:{caches[1]}"] if caches else []
    program, *command = suite_command(args, caches and caches[1])
    env = [f"--env={name}={value}" for name, value in ENVIRONMENT.items()]
    options = [
        "--rm", *nets, "--ipc=private", "--shm-size=16g", "--user=0",
        f"--volume={bundle}:/forge:ro", f"--volume={output}:/output", *volumes, *env,
        "--workdir=/forge", f"--entrypoint={program}",
    ]  # fmt: skip
    return gpu_container(engine, None, options, image, command)


def suite_command(args: Sequence[str], caches: str | None) -> list[str]:
    """The suite's command in an image; ``args`` are the runner's, ``caches`` a place there."""
    script, last = (IN_IMAGE, []) if caches is None else (WITH_CACHES, [f"--caches={caches}"])
    return ["/bin/sh", "-c", script, "sh", *SUITE, *args, *last]


def unpack_tools(root: Path, bundle: Path) -> None:
    """Unpack into a bundle: what Python imports to ``tools``, the sanitizer beside it.

    There its folder ``nvidia`` is not part of the Python package of that name.
    """
    for folder in WHEELS:
        Wheelhouse().unpack(suite_wheels(root, folder), bundle / folder)
    for path in (SANITIZER, SANITIZER.with_name(LAUNCHER)):
        if not os.access(bundle / path, os.X_OK):
            what = f"these wheels have no {path.relative_to('sanitizer')}"
            remedy = "name a wheel of nvidia-cuda-sanitizer-api that has it"
            raise LockFileError(what, where=WHEELS["sanitizer"], remedy=remedy)


def require_green(code: int, output: Path) -> None:
    """Raise SuiteRedError or SuiteUndecidedError by the exit code of the runner."""
    if code != 0:
        kind = errors.SuiteRedError if code == errors.RED else errors.SuiteUndecidedError
        remedy = "see its output above, and the results in that folder"
        raise kind(f"the suite exited with {code}", where=output, remedy=remedy)
