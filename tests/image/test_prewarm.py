"""An image that carries compiled kernels, by a real engine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.gpu.harness.run import open_caches
from vllm_forge.images.layer import ZSTD, members
from vllm_forge.images.layout import read_image
from vllm_forge.images.prewarm import FOLDERS, SCRIPT, place_of
from vllm_forge.images.wheels import site_packages

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.project import Project

pytestmark = pytest.mark.engine
ALPHA = "vllm-0.1.0-alpha"


def compiled(built: Project, folder: Path, **other: str) -> Path:
    """What a run of the GPU suite in the image of alpha would leave."""
    stack = built.record(ALPHA)["stack"]
    key = {
        "compute_capability": "10.0",
        "tree": stack["tree"],
        "kind": "image",
        "stack": stack["lock"]["sha256"],
    }
    plan = {"caches": {"key": key | other, "folders": FOLDERS}}
    open_caches(folder, plan)
    (folder / "triton" / "kernel.cubin").write_bytes(b"compiled for 10.0")
    return folder


def test_kernels_are_the_last_layer_and_the_entrypoint_finds_them(
    sibling: Project, tmp_path: Path
) -> None:
    folder = compiled(sibling, tmp_path / "caches")
    sibling.run("build", "alpha", f"--prewarm={folder}", f"--output={tmp_path / 'out'}")
    plain = read_image(sibling.root / "dist" / ALPHA)
    made = read_image(tmp_path / "out" / ALPHA)
    # The layers below are those of the image without, but for the record in the last of them.
    assert made.manifest["layers"][:-3] == plain.manifest["layers"][:-1]
    config = made.config["config"]
    assert config["Entrypoint"] == [SCRIPT, "vllm", "serve"]
    record = json.loads((tmp_path / "out" / f"{ALPHA}.json").read_text())
    place = place_of(record["stack"]["prewarm"]["key"])
    assert f"TRITON_CACHE_DIR={place}/triton" in config["Env"]
    assert config["Labels"]["io.vllm-forge.prewarm"] == record["stack"]["prewarm"]["sha256"]
    assert made.manifest["layers"][-1]["mediaType"] == ZSTD
    assert record["stack"]["prewarm"]["key"]["compute_capability"] == "10.0"
    # The image's own Python compiled its library and the environment, which it finds as they are.
    names = {name for name, info, _ in members(made.layers[-2].blob) if info.isreg()}
    assert f"{site_packages('3.13')}/vllm/__pycache__/__init__.cpython-313.pyc" in names
    assert "usr/lib/python3.13/__pycache__/os.cpython-313.pyc" in names
    assert record["checks"]["bytecode"]["detail"] == f"{len(names)} files"
    assert not [row for row in config["Env"] if row.startswith("PYTHONPYCACHEPREFIX=")]
    assert all(verdict["passed"] for verdict in record["checks"].values())


@pytest.mark.parametrize("name", ["compute_capability", "tree", "stack"])
def test_kernels_of_another_stack_are_refused(sibling: Project, tmp_path: Path, name: str) -> None:
    folder = compiled(sibling, tmp_path / "caches", **{name: "other"})
    done = sibling.run(
        "build", "alpha", f"--prewarm={folder}", f"--output={tmp_path / 'out'}", code=90
    )
    assert f"{name} is other" in done.stderr
    assert not (tmp_path / "out").exists()
