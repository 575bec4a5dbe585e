"""The image's stub of the driver has the functions that cuda.h declares."""

from __future__ import annotations

import re
import zipfile
from typing import TYPE_CHECKING

from tests.toolkit.conftest import ROOT
from vllm_forge.project import Project
from vllm_forge.sources import Wheelhouse

if TYPE_CHECKING:
    from collections.abc import Iterator

DECLARED = re.compile(r"CUresult\s+CUDAAPI\s+(cu[A-Z]\w*)\s*\(")
VERSIONED = re.compile(r"(?m)^\s*#\s*define\s+cu[A-Z]\w*\s+(?:__CUDA_API_P\w+\()?(cu[A-Z]\w*)")
PER_THREAD = re.compile(r"__CUDA_API_P(?:TSZ|TDS)\((cu[A-Z]\w*)\)")


def functions(header: str) -> Iterator[str]:
    """All names that a program compiled with the header can need of libcuda."""
    yield from DECLARED.findall(header)
    yield from VERSIONED.findall(header)
    for name in PER_THREAD.findall(header):
        yield from (name, f"{name}_ptsz", f"{name}_ptds")


def test_stub_has_the_functions_of_the_header() -> None:
    project = Project(ROOT)
    wheel = project.lock(project.matrix.default_line).find("nvidia-cuda-runtime")
    wheelhouse = Wheelhouse()
    wheelhouse.fetch([wheel])
    with zipfile.ZipFile(wheelhouse.verify(wheel)) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/include/cuda.h")]
        header = archive.read(name).decode()
    listed = (ROOT / "docker" / "libcuda-functions.txt").read_text().splitlines()
    assert [row for row in listed if not row.startswith("#")] == sorted(set(functions(header)))
