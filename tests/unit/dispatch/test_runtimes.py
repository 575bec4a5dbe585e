"""Each runtime's command: image, volumes, variables, GPUs, and no more rights than it needs."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.site import make_site
from vllm_forge.dispatch import node
from vllm_forge.dispatch.errors import SiteFileError
from vllm_forge.dispatch.jobs import cell_image, job_specs, suite_works
from vllm_forge.dispatch.runtimes import find_runtime, node_job
from vllm_forge.project import Project

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = "sha256:" + "d1" * 32
BUNDLE = "/shared/forge/runs/r1/vllm-0.26.0-b300"
WEIGHTS = "/shared/weights/flash", "/forge/checkpoints/flash-nvfp4-fp8-mtp"
KNOWN = {
    "WORK": "/w", "SCRATCH": "/s", "OUTPUT": "/o", "IMAGE": "/i", "ATTEMPT": "7_0", "CUDA": "0,1",
    "GPUS": "4,5",
}  # fmt: skip
VOLUMES = {
    "docker": [f"--volume={BUNDLE}:/forge:ro", "--volume=/o:/output"],
    "podman": [f"--volume={BUNDLE}:/forge:ro", "--volume=/o:/output"],
    "enroot": [f"{BUNDLE}:/forge:none:x-create=dir,bind,ro", "/o:/output:none:x-create=dir,bind"],
    "pyxis": [f"--container-mounts={BUNDLE}:/forge:ro,{':'.join(WEIGHTS)}:ro,/o:/output"],
    "apptainer": [f"{BUNDLE}:/forge:ro", "/o:/output"],
    "kit": [f"{BUNDLE}:/forge", "/o:/output"],
}
GPUS = {
    "docker": ['--gpus="device=4,5"'],
    "podman": ["--device=nvidia.com/gpu=4", "--device=nvidia.com/gpu=5"],
    "enroot": ["NVIDIA_VISIBLE_DEVICES=0,1"],
    "apptainer": ["--env=CUDA_VISIBLE_DEVICES=0,1"],
}
IMAGES = {
    "docker": f"registry.lab:5000/forge/vllm@{DIGEST}",
    "apptainer": "/i",
    "enroot": "forge-7_0",
}


def job(root: Path, folder: Path, runtime: str, new: str = "") -> dict[str, Any]:
    project = Project(root)
    site = make_site(folder, project, 'runtime = "runc"', f'runtime = "{runtime}"{new}')
    image = cell_image(project, project.cell("b300", "0.26"), DIGEST)
    (spec,) = job_specs([image], [suite_works(project)["soak"]], site, "r1")
    return node_job(spec, site, {"Env": ["A=1"]})


@pytest.mark.parametrize("runtime", VOLUMES)
def test_command_has_volumes_gpus_and_the_suite(root: Path, tmp_path: Path, runtime: str) -> None:
    argv = node.words(job(root, tmp_path, runtime)["argv"], KNOWN)
    assert not [word for word in argv if re.search(r"@[A-Z]+@|\{[a-z]+\}", word)]
    assert [word for word in argv if word in VOLUMES[runtime]] == VOLUMES[runtime]
    assert [word for word in argv if word in GPUS.get(runtime, [])] == GPUS.get(runtime, [])
    assert IMAGES.get(runtime, argv[0]) in argv
    start = argv.index("/usr/bin/env")
    assert "PYTHONPATH=/forge:/forge/src:/forge/tools" in argv[start:]
    assert argv[argv.index("/bin/sh", start) :][:2] == ["/bin/sh", "-c"]
    assert argv[-1] == "--tier=soak"


@pytest.mark.parametrize("runtime", ["docker", "podman", "enroot", "apptainer"])
def test_without_gpus_nothing_is_said_of_them(root: Path, tmp_path: Path, runtime: str) -> None:
    argv = node.words(job(root, tmp_path, runtime)["argv"], KNOWN | {"CUDA": "", "GPUS": ""})
    options = argv[: argv.index("/usr/bin/env")]
    assert not [word for word in options if "DEVICES" in word or "gpu" in word]


def test_bundle_of_runc(root: Path, tmp_path: Path) -> None:
    made = job(root, tmp_path, "runc", '\nprogram = "/opt/nvidia-container-runtime"')
    assert made["argv"][0] == "/opt/nvidia-container-runtime"
    config = json.loads(node.fill(made["files"]["config.json"], KNOWN))
    mounts = {row["destination"]: row for row in config["mounts"]}
    assert mounts["/forge"]["options"] == ["rbind", "ro"]
    assert mounts["/output"] == {
        "destination": "/output", "type": "bind", "source": "/o", "options": ["rbind", "rw"]
    }  # fmt: skip
    assert config["process"]["env"] == ["A=1", "NVIDIA_VISIBLE_DEVICES=0,1"]
    assert "CAP_SYS_ADMIN" not in config["process"]["capabilities"]["bounding"]
    assert {row["type"] for row in config["linux"]["namespaces"]} >= {"pid", "network", "mount"}


@pytest.mark.parametrize(("name", "hint"), [("enrot", "enroot"), ("pod", "podman")])
def test_unknown_runtime_is_refused(root: Path, tmp_path: Path, name: str, hint: str) -> None:
    """A pod is Kubernetes' own, and not for a site file."""
    with pytest.raises(SiteFileError, match=f"did you mean '{hint}'"):
        job(root, tmp_path, name)


def test_engine_without_registry_is_refused(root: Path, tmp_path: Path) -> None:
    site = make_site(tmp_path, Project(root), 'registry = "registry.lab:5000/forge/vllm"\n', "")
    with pytest.raises(SiteFileError, match="missing registry"):
        find_runtime(site.model_copy(update={"runtime": "docker"}))
