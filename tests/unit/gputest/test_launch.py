"""The suite in an image: how it is run there, and what comes along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.wheels import Member, write_wheel
from vllm_forge.gputest import launch as gpu
from vllm_forge.gputest.errors import SuiteRedError, SuiteUndecidedError, WrongGpuError
from vllm_forge.gputest.launch import (
    SuiteImage,
    container_command,
    make_plan,
    require_green,
    require_sku,
    unpack_tools,
)
from vllm_forge.host.probe import Reply
from vllm_forge.images.prewarm import SCRIPT
from vllm_forge.project import Project
from vllm_forge.receipts.errors import ReceiptSubjectError
from vllm_forge.sources import Index, Wheelhouse
from vllm_forge.sources.errors import LockFileError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@pytest.mark.parametrize(
    ("engine", "gpus"), [("docker", "--gpus=all"), ("podman", "--device=nvidia.com/gpu=all")]
)
def test_the_run_has_gpus_and_no_network(engine: str, gpus: str) -> None:
    argv = container_command(engine, "image", Path("/b"), Path("/o"), ["--tier=kernel"])
    assert argv[:2] == [engine, "run"]
    assert {gpus, "--network=none", "--volume=/b:/forge:ro", "--volume=/o:/output"} <= set(argv)
    assert argv[argv.index("image") :][:2] == ["image", "-c"]
    assert argv[argv.index("-c") + 2 :] == [
        "sh",
        "/opt/venv/bin/python", "-m", "tests.gpu.harness.run", "/forge/plan.json", "/output",
        "--tier=kernel",
    ]  # fmt: skip


@pytest.mark.parametrize("caches", [None, (Path("/c"), "/cache/jit/0")])
@pytest.mark.parametrize("prewarmed", [True, False])
def test_the_image_finds_the_sanitizer_and_the_arguments_stay_whole(
    tmp_path: Path, caches: tuple[Path, str] | None, *, prewarmed: bool
) -> None:
    """Kernels of the image are put to their place first, where no others are brought to."""
    argv = container_command(
        "docker", "image", Path("/b"), Path("/o"), ["--only", "a or $HOME"], caches=caches
    )
    script, args = argv[argv.index("-c") + 1], argv[argv.index("-c") + 3 :]
    fill = tmp_path / "prewarmed"
    if prewarmed:
        fill.write_text('#!/bin/sh\necho filled\nexec "$@"\n')
        fill.chmod(0o755)
    script = script.replace(SCRIPT, str(fill))
    said = "import os, sys; print(os.environ['PATH'].split(':')[0], *sys.argv[1:], sep='|')"
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-c", said, *args[1:]],
        capture_output=True,
        text=True,
        check=True,
    )
    *filled, line = done.stdout.splitlines()
    assert filled == (["filled"] if prewarmed and caches is None else [])
    place, *rest = line.split("|")
    assert place == f"/forge/{gpu.SANITIZER.parent}"
    assert rest == args[1:]


class Wheels(Wheelhouse):
    """A wheelhouse of files that are there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fetch(self, wheels: Sequence[Any], index: Index | None = None) -> dict[Path, list[int]]:
        return {}

    def verify(self, wheel: Any, hashed: Mapping[Path, list[int]] | None = None) -> Path:
        return self.folder / str(wheel)


def wheel(path: Path, name: str, mode: int) -> None:
    member = Member(path=name, content=b"#!/bin/sh\necho ran\n", mode=mode)
    write_wheel(path, path.stem, "1", [member])


def test_programs_of_tools_can_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "Wheelhouse", lambda: Wheels(tmp_path))
    wheels = {"tools": ["a.whl"], "upstream/tools": [], "sanitizer": ["b.whl", "c.whl"]}
    monkeypatch.setattr(gpu, "suite_wheels", lambda _, folder: wheels[folder])
    wheel(tmp_path / "a.whl", "pytest/__init__.py", 0o644)
    program = gpu.SANITIZER.relative_to("sanitizer")
    wheel(tmp_path / "b.whl", str(program), 0o744)
    wheel(tmp_path / "c.whl", str(program.with_name(gpu.LAUNCHER)), 0o744)
    bundle = tmp_path / "bundle"
    unpack_tools(tmp_path, bundle)
    done = subprocess.run([bundle / gpu.SANITIZER], capture_output=True, check=True)
    assert done.stdout == b"ran\n"
    assert (bundle / gpu.SANITIZER).stat().st_mode & 0o777 == 0o755
    assert not (bundle / "tools" / "pytest" / "__init__.py").stat().st_mode & 0o111
    assert not (bundle / "tools" / "nvidia").exists(), "it would be imported as a part of nvidia"


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("nvidia/cuda_sanitizer/bin/compute-sanitizer", "compute-sanitizer"),
        ("other", "compute-sanitizer"),
        ("nvidia/cu13/compute-sanitizer/compute-sanitizer", "TreeLauncherSubreaper"),
    ],
)
def test_an_incomplete_sanitizer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, missing: str
) -> None:
    """Else its tests would fail on the GPU, minutes after its start (wheels of CUDA 13.0-13.4)."""
    monkeypatch.setattr(gpu, "Wheelhouse", lambda: Wheels(tmp_path))
    monkeypatch.setattr(gpu, "suite_wheels", lambda _, folder: ["b.whl"] * (folder == "sanitizer"))
    wheel(tmp_path / "b.whl", name, 0o755)
    with pytest.raises(LockFileError, match=f"have no nvidia/cu13/compute-sanitizer/{missing}"):
        unpack_tools(tmp_path, tmp_path / "bundle")


def test_images_get_the_sanitizer_and_hosts_have_theirs(root: Path) -> None:
    name = "nvidia-cuda-sanitizer-api"
    assert name in {wheel.name for wheel in gpu.suite_wheels(root, "sanitizer")}
    assert name not in {wheel.name for wheel in gpu.suite_wheels(root, "tools")}


def test_who_asks_for_it_gives_the_image_the_network() -> None:
    """FlashInfer downloads the experts' kernels of some GPUs at their first start."""
    without = container_command("docker", "image", Path("/b"), Path("/o"), [])
    argv = container_command("docker", "image", Path("/b"), Path("/o"), [], network=True)
    assert [arg for arg in without if arg not in argv] == ["--network=none"]


def test_caches_are_mounted_and_named(tmp_path: Path) -> None:
    """Triton keeps absolute paths of its results, so they are compiled where they will serve."""
    place = "/cache/jit/0123456789abcdef"
    argv = container_command(
        "docker", "image", Path("/b"), Path("/o"), [], caches=(tmp_path, place)
    )
    assert f"--volume={tmp_path}:{place}" in argv
    assert argv[-1] == f"--caches={place}"


def test_images_and_kits_get_what_n_needs(root: Path) -> None:
    """``-n auto`` is one process per GPU: pytest-xdist, which no image has."""
    assert {wheel.name for wheel in gpu.suite_wheels(root, "tools")} == {
        "execnet", "iniconfig", "pluggy", "pytest", "pytest-xdist",
    }  # fmt: skip


def test_pytest_is_one_that_keeps_groups_together(root: Path) -> None:
    """See tests/gpu/requirements.txt: engines of one name would be started by several workers."""
    (pytest_wheel,) = [wheel for wheel in gpu.suite_wheels(root, "tools") if wheel.name == "pytest"]
    assert tuple(map(int, pytest_wheel.version.split(".")[:2])) < (9, 2)


@pytest.mark.parametrize("label", ["sku", "line", "tree", "lock"])
def test_image_of_another_cell_is_refused(root: Path, label: str) -> None:
    """A B300 image on an H200 host too: kits and engines ask this before anything is run."""
    project = Project(root)
    cell, lock = project.cell("h200", "0.26"), project.lock("0.26").digest
    labels = {"sku": "h200", "line": "0.26", "tree": "2" * 40, "lock": f"sha256:{lock}"}

    def plan(**other: str) -> dict[str, object]:
        named = {f"io.vllm-forge.{name}": value for name, value in (labels | other).items()}
        image = SuiteImage(name="x", digest="1" * 64, labels=named)
        return make_plan(project, cell, "2" * 40, image)

    assert plan()["subject"] == {"name": "x", "sha256": "1" * 64}
    with pytest.raises(ReceiptSubjectError, match=f"the image's {label} is other"):
        plan(**{label: "other"})


class Smi:
    """A host whose nvidia-smi prints this."""

    def __init__(self, *names: str, code: int = 0) -> None:
        rows = [f"0, {name}, 9.0, 580.159.04, 143771, Disabled, N/A, N/A" for name in names]
        self.reply = Reply(code=code, text="\n".join(rows))

    def ask(self, name: str, argv: Sequence[str]) -> Reply:
        assert argv[0] == name == "nvidia-smi"
        return self.reply


@pytest.mark.parametrize(
    ("host", "message"),
    [
        (Smi("NVIDIA H100"), r"h200 is NVIDIA H200 .* this host has NVIDIA H100"),
        (Smi("NVIDIA H200", "NVIDIA H100"), "this host has NVIDIA H100"),
        (Smi(), "no GPU to test"),
        (Smi("NVIDIA H200", code=127), "no GPU to test: nvidia-smi is not installed"),
    ],
)
def test_another_gpu_is_refused_before_anything_is_run(root: Path, host: Smi, message: str) -> None:
    with pytest.raises(WrongGpuError, match=message):
        require_sku(host, Project(root).cell("h200", "0.26"))


def test_gpu_of_the_sku_is_accepted(root: Path) -> None:
    require_sku(Smi("NVIDIA H200"), Project(root).cell("h200", "0.26"))
    with pytest.raises(WrongGpuError, match="with compute capability 10"):
        require_sku(Smi("NVIDIA B200"), Project(root).cell("b200", "0.26"))


def test_a_red_suite_and_an_undecided_one_are_different_errors(tmp_path: Path) -> None:
    require_green(0, tmp_path)
    with pytest.raises(SuiteRedError):
        require_green(91, tmp_path)
    for code in (1, 2, 90, 92, 93, 125):
        with pytest.raises(SuiteUndecidedError, match=f"exited with {code}"):
            require_green(code, tmp_path)
