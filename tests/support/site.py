"""A site file as a cluster's administrator writes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.dispatch.jobs import JobSpec
from vllm_forge.dispatch.site import Site, read_site

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_forge.project import Project

SLURM_SKUS = """
[slurm.sku.b300]
partition = "b300"
gres = "b300"

[slurm.sku.rtxpro6000]
partition = "rtxpro6000"
gres = "rtxpro6000"
"""
SITE = """
schema_version = 1
runtime = "runc"
registry = "registry.lab:5000/forge/vllm"

[storage]
root = "/shared/forge"

[checkpoints]
flash-nvfp4-fp8-mtp = "/shared/weights/flash"

[slurm]
account = "lab"
"""
SITE += SLURM_SKUS


HEX = "d1" * 32
JOB = JobSpec(
    name="b300-0.26-kernel", sku="b300", line="0.26", work="kernel", cell="c",
    image=f"sha256:{HEX}", runtime="runc", reference=None, command=("true",), environment={},
    workdir="/", gpus=1, minutes=1, exclusive=False, shm_gb=1, volumes=(),
    artifacts=("kernel.json",),
)  # fmt: skip


def make_site(folder: Path, project: Project, old: str = "", new: str = "") -> Site:
    """The site of a file in ``folder``, with ``new`` in place of ``old``."""
    assert old in SITE
    path = folder / "site.toml"
    path.write_text(SITE.replace(old, new) if old else SITE)
    return read_site(path, project.matrix)
