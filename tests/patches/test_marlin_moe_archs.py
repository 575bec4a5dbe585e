"""vllm-project/vllm#40923: which GPUs a build has native Marlin MoE code for.

CMake itself evaluates the release's own CMakeLists.txt and cmake/utils.cmake, for the GPUs that the
release's own pipeline builds its wheel for. Kernels with 16-bit activations only: those with FP8
activations have a list of their own, which has 12.0 on every line.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import cmake
import pytest

from .marlin_source import between

CALL = "cuda_archs_loose_intersection(MARLIN_MOE_ARCHS "


def _wheel_gpus(source: Path) -> str:
    """What the pipeline builds the x86 wheel for, in the form of TORCH_CUDA_ARCH_LIST."""
    text = (source / ".buildkite/release-pipeline.yaml").read_text(encoding="utf-8")
    (found,) = re.findall(r'^  CUDA_ARCH_X86: "([^"]+)"$', text, re.MULTILINE)
    assert isinstance(found, str)
    return found


def _flags(gpus: str) -> str:
    """What torch makes of TORCH_CUDA_ARCH_LIST (torch/utils/cpp_extension.py)."""
    flags = []
    for gpu in gpus.split():
        number = gpu.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if gpu.endswith("+PTX"):
            flags.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return ";".join(flags)


def _statements(source: Path) -> str:
    """From the build's GPUs to MARLIN_MOE_ARCHS."""
    text = (source / "CMakeLists.txt").read_text(encoding="utf-8")
    return "".join(
        (
            between(text, "cmake_minimum_required(", "\n") + "\n",
            between(text, "# Supported NVIDIA architectures.", "endif()") + "endif()\n",
            between(text, "  extract_unique_cuda_archs_ascending(CUDA_ARCHS ", "else()"),
            between(
                text, "  # so we don't need 9.0 for bf16 atomicAdd PTX\n", "  # moe marlin has"
            ),
        )
    )


def _marlin_gpus(
    source: Path, statements: str, gpus: str, folder: Path, cuda: str = "13.0"
) -> list[str]:
    script = folder / "archs.cmake"
    script.write_text(
        f'set(CMAKE_CUDA_COMPILER_VERSION {cuda})\nset(CUDA_ARCH_FLAGS "{_flags(gpus)}")\n'
        f"include({source}/cmake/utils.cmake)\n{statements}\n"
        'message("MARLIN_MOE_ARCHS=${MARLIN_MOE_ARCHS}")\n'
    )
    done = subprocess.run(
        [Path(cmake.CMAKE_BIN_DIR) / "cmake", "-P", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (found,) = re.findall(r"^MARLIN_MOE_ARCHS=(.*)$", done.stderr, re.MULTILINE)
    return sorted(found.split(";"))


@pytest.mark.lines("0.22")
@pytest.mark.parametrize("gpus", [None, "12.0", "12.0a"], ids=["wheel", "12.0", "12.0a"])
def test_no_native_code_for_sm_120(source: Path, tmp_path: Path, gpus: str | None) -> None:
    """Not in the wheel, and not in a build for sm_120 alone: the driver compiles 8.0's PTX."""
    gpus = gpus or _wheel_gpus(source)
    assert "12.0" in gpus
    assert _marlin_gpus(source, _statements(source), gpus, tmp_path) == ["8.0+PTX"]


@pytest.mark.lines("0.22")
def test_the_list_is_what_keeps_sm_120_out(source: Path, tmp_path: Path) -> None:
    """The same function with the list of #40923 takes it."""
    stock = _statements(source)
    merged = stock.replace(f'{CALL}"8.0+PTX"', f'{CALL}"8.0+PTX;12.0f"')
    assert merged != stock
    assert _marlin_gpus(source, merged, _wheel_gpus(source), tmp_path) == ["12.0f", "8.0+PTX"]


@pytest.mark.lines("0.26", "0.33")
def test_the_wheel_has_native_code_for_sm_120(source: Path, tmp_path: Path) -> None:
    """For the whole family, as one 12.0f; CUDA 12 has no such thing and gets 12.0a."""
    statements, gpus = _statements(source), _wheel_gpus(source)
    assert _marlin_gpus(source, statements, gpus, tmp_path) == ["12.0f", "8.0+PTX"]
    assert _marlin_gpus(source, statements, gpus, tmp_path, "12.9") == ["12.0a", "8.0+PTX"]
    assert _marlin_gpus(source, statements, "10.0", tmp_path) == ["8.0+PTX"]
