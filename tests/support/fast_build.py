"""Builds of the small project in this process, by an engine that only pretends: tenths of seconds.

Wheels, layers, patches, layouts and records are real; the rootfs and the system are small tars, and
every check inside passes, so that nothing but the build itself can find damage.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tests.support.flashinfer import GLOB
from vllm_forge.host import Runner, atomic_path
from vllm_forge.images import (
    BuildOptions,
    build_image,
    compile_sources,
    plan,
    resolve,
    rootfs,
    wheel_layers,
)
from vllm_forge.images.bytecode import COMPILER
from vllm_forge.images.checks import check_names
from vllm_forge.images.engines import SystemOutput
from vllm_forge.images.plan import ImagePlan
from vllm_forge.images.system import dockerfile_config
from vllm_forge.project import Project
from vllm_forge.sources import cubins
from vllm_forge.sources.debian import DebianPackage, write_base_lock

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    import pytest

    from tests.support.project import Project as MiniProject
    from vllm_forge.images.engines import ContainerRun, Engine
    from vllm_forge.images.layout import Image
    from vllm_forge.images.prewarm import Prewarm

OUTSIDE = {"packages", "tree", "stack", "hygiene", "system", "wheel-files", "bytecode"}
COMPILED = b"bytecode of the checks"
WRITING = threading.Lock()
STATUS = b"Package: python3\nStatus: install ok installed\nVersion: 3.13.5-1\n"


def write_tar(path: Path, files: Mapping[str, bytes]) -> str:
    """A plain tar; returns its SHA-256."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compile_module(run: ContainerRun, foreign: bytes) -> str:
    """What ``compile_sources`` does, of one source of the image."""
    assert run.output is not None
    module, script = f"{run.argv[-1]}/vllm/__init__.py", run.inputs / COMPILER.name
    assert f"/mnt/{COMPILER.name}" in run.argv and script.read_bytes() == COMPILER.read_bytes()
    source = next(path for folder in run.lower_dirs if (path := folder / module[1:]).exists())
    aside = run.output / "module.py"
    aside.write_bytes(foreign or source.read_bytes())
    name = f"{module[1:].rpartition('/')[0]}/__pycache__/__init__.cpython-313.pyc"
    content = compile_sources.compiled(str(aside))
    assert content is not None
    write_tar(run.output / compile_sources.NAME, {name: content})
    return ""


class FastRunner(Runner):
    """Runs nothing but what the test may: mmdebstrap gives a small tar."""

    def run(self, argv: Sequence[str], **_: Any) -> str:
        self.commands.append(list(argv))
        if argv[0] == "mmdebstrap":
            target = next(Path(word) for word in argv if word.endswith("/rootfs.tar"))
            write_tar(target, {"var/lib/dpkg/status": STATUS, "bin/sh": b"#!" * 2000})
        return ""


class FastEngine:
    """Stands for buildah."""

    name = "buildah"
    tools: tuple[str, ...] = ()
    reads_plain_layers = True

    def __init__(self, foreign: bytes = b"", **config: Any) -> None:
        """``config``: what it says of the image beside what the Dockerfile does.

        ``foreign``: compiled in place of vLLM's source.
        """
        self.config, self.foreign, self.compiled = config, foreign, 0
        self.verdict: dict[str, Any] = {"passed": True, "detail": "pretended", "seconds": 0.0}

    def present(self) -> bool:
        return True

    def check(self, runner: Runner) -> None:
        del runner

    def build_system(
        self, runner: Runner, plan: ImagePlan, secrets: Mapping[str, Path], work: Path
    ) -> None:
        del secrets, work
        runner.run(["buildah", "bud", str(plan.dockerfile)])
        described = dockerfile_config(plan.dockerfile.read_text(), plan.build_arguments())
        self.config = described | self.config

    def system_output(self, work: Path) -> SystemOutput:
        rootfs = work.parent / "unpacked.tar"
        write_tar(rootfs, {"var/lib/dpkg/status": STATUS, "bin/sh": b"#!" * 2000})
        top = work / "top.tar"
        digests = [hashlib.sha256(rootfs.read_bytes()).hexdigest()]
        digests.append(write_tar(top, {"opt/venv/pyvenv.cfg": b"home = /usr/bin\n" * 300}))
        root = work / "root"
        (root / "bin").mkdir(parents=True)
        (root / "bin" / "sh").write_bytes(b"#!" * 2000)
        return SystemOutput(
            tars=(rootfs, top), diff_ids=tuple(digests), config=self.config, root=root
        )

    def loaded(self, *_: object) -> AbstractContextManager[None]:
        return nullcontext()

    def run_in_image(self, runner: Runner, run: ContainerRun) -> str:
        del runner
        if run.output is not None:
            self.compiled += 1
            return compile_module(run, self.foreign)
        if run.bytecode is not None:
            kept = run.bytecode / "module.pyc"
            assert not kept.exists() or kept.read_bytes() == COMPILED, "nobody wrote code that ran"
            with WRITING, atomic_path(kept) as aside:  # both runs write it at a time
                aside.write_bytes(COMPILED)
        any_user = run.argv[-1] == "user"
        inside = check_names(compiler=False) - OUTSIDE
        names = [name for name in inside if name.startswith("any-user") == any_user]
        return json.dumps(dict.fromkeys(names, self.verdict))

    def load(self, runner: Runner, layout: Path, name: str) -> None:
        runner.run(["skopeo", "copy", f"oci:{layout}", name])


def fast_build(
    mini: MiniProject,
    sku: str,
    engine: FastEngine | None = None,
    base: str = "rootfs",
    *,
    kernels: bool = False,
    prewarm: Prewarm | None = None,
) -> tuple[Image, bool]:
    """Build a cell of the small project; the environment has its cache, see ``use``."""
    project = Project(mini.root)
    options = BuildOptions(output=mini.root / "dist", base=base, kernels=kernels, prewarm=prewarm)
    engine = engine or FastEngine()
    return build_image(
        resolve(project, project.cell(sku), options, cast("Engine", engine)), FastRunner()
    )


def tiny_deb(archive: Path) -> DebianPackage:
    """Build a package of no files into an archive."""
    tree = archive / "tree" / "DEBIAN"
    tree.mkdir(parents=True)
    (tree / "control").write_text(
        "Package: tiny\nVersion: 1:2-3\nArchitecture: amd64\nMaintainer: nobody <n@example>\n"
        "Essential: yes\nDescription: a package\n of two lines\n"
    )
    deb = archive / "pool" / "tiny_2-3_amd64.deb"
    deb.parent.mkdir()
    argv = ["dpkg-deb", "--build", str(tree.parent), str(deb)]
    subprocess.run(argv, check=True, capture_output=True)
    content = deb.read_bytes()
    return DebianPackage(
        name="tiny", version="1:2-3", architecture="amd64", size=len(content),
        sha256=hashlib.sha256(content).hexdigest(), path="pool/tiny_2-3_amd64.deb",
    )  # fmt: skip


def lock_packages(mini: MiniProject, package: DebianPackage, snapshot: str) -> None:
    """Let the small project lock one package, which a snapshot has."""
    matrix = mini.root / "matrix.toml"
    rows = f'[base]\nlock = "docker/locks/debian.txt"\nsnapshots = ["{snapshot}"]\n'
    matrix.write_text(matrix.read_text().replace("[base]\n", rows))
    base = Project(mini.root).matrix.base
    write_base_lock(mini.root / "docker/locks/debian.txt", base, "20261130T000000Z", [package])


def need_kernels(mini: MiniProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a preset of each SKU need the archive that the project's index serves."""
    monkeypatch.setenv(cubins.MIRROR, f"{mini.index.base}/files/")
    monkeypatch.setattr(ImagePlan, "downloads", {"generated": GLOB})


def use(mini: MiniProject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``fast_build`` use a project's cache and index, and threads instead of processes."""
    for name in ("VLLM_FORGE_CACHE", "VLLM_FORGE_ROOT", "UV_DEFAULT_INDEX", "no_proxy"):
        monkeypatch.setenv(name, mini.environment[name])
    monkeypatch.setattr(plan, "SYSTEM_BYTES", 0)
    monkeypatch.setattr(rootfs, "host_sources", lambda _: "")  # Debian packages of snapshots only
    monkeypatch.setattr(wheel_layers, "worker_pool", lambda *_: ThreadPoolExecutor(2))
