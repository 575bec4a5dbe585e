"""What the cache holds that no line of the matrix needs any more."""

from contextlib import ExitStack
from itertools import product
from pathlib import Path

from vllm_forge.host import cache_root, exclusive, remove, tree_bytes
from vllm_forge.images.engines import ENGINES
from vllm_forge.images.plan import BuildOptions, resolve
from vllm_forge.images.rootfs import rootfs_key
from vllm_forge.patches import read_tree_lock
from vllm_forge.project import Project
from vllm_forge.sources.debian import read_base_lock

# Small, or made again in a minute; and what earlier versions have left.
ALWAYS = (
    "work", "bytecode", "buildah", "checkpoints", "contents", "coverage", "facts", "inspect",
    "mirror", "proofs", "selection", "toolkit", "upstream", "uv", "census", "installer",
    "installers", "oracle",
)  # fmt: skip
# Of work that must not lose its files; a line's name follows.
LOCKS = ("prove", "selection", "inspect", "upstream")


def clean(project: Project, *, everything: bool) -> int:
    """Delete what no line needs, or everything, downloads included; return the bytes freed.

    Images in dist/ are not touched: their blobs are links of their own. Raises BusyError: a build
    or a proof is running; LockFileError: what a line needs is not known.
    """
    cache, matrix = cache_root(), project.matrix
    builds = [
        f"build-vllm-{line.vllm}-{sku}" for sku in matrix.sku for line in matrix.line.values()
    ]
    with ExitStack() as held:
        for name in [*builds, *(f"{kind}-{line}" for kind in LOCKS for line in matrix.line)]:
            held.enter_context(exclusive(name, wait=False))
        if everything:
            doomed = [path for path in _children(cache) if path.name != "locks"]
        else:
            needed = _needed(project)
            doomed = [cache / name for name in ALWAYS if (cache / name).exists()]
            for folder, keys in needed.items():
                doomed += [path for path in _children(cache / folder) if path.name not in keys]
        freed = sum(map(tree_bytes, doomed))
        for path in doomed:
            remove(path)
    return freed


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _needed(project: Project) -> dict[str, set[str]]:
    """Folder of the cache -> names in it that a build of some line would use."""
    base, lock = project.matrix.base, read_base_lock(project.root, project.matrix.base)
    folders = ("debs", "layers", "patched", "rootfs", "sdists", "systems", "wheels")
    needed: dict[str, set[str]] = {folder: set() for folder in folders}
    needed["rootfs"].update({rootfs_key(base, lock), rootfs_key(base, None)})
    needed["debs"].update(package.sha256 for package in (lock.packages if lock else ()))
    for name, line in project.matrix.line.items():
        tree = read_tree_lock(project.root / line.series, name)
        needed["sdists"].add(tree.sha256)
        options = BuildOptions(output=project.root / "dist")
        for sku, make in product(line.skus, ENGINES.values()):
            plan = resolve(project, project.cell(sku, name), options, make())
            needed["systems"].add(plan.system_key)
            needed["layers"].update(key for group in plan.groups for key in group.keys)
        needed["wheels"].update(wheel.sha256 for wheel in plan.lock.wheels)
        needed["patched"].add(f"{plan.lock.find('vllm').sha256}-{tree.result}")
    return needed | {"cubins": needed["wheels"]}  # of a locked FlashInfer
