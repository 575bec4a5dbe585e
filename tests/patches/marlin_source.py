"""The Marlin MoE kernel's own text, taken from the release's source archive, on a CPU.

The host's functions and the kernel's partition, shared-memory layout and reduction are plain
arithmetic. They are cut out of the text as they are, built into marlin_harness.cpp by the image's
own compiler, and so say themselves what the release does.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.gpu.reference.marlin_kernel import Kernel
    from tests.gpu.reference.marlin_schedule import Launch

HARNESS = Path(__file__).with_name("marlin_harness.cpp")
MOST_PARTS = 4096


def marlin_files(source: Path) -> dict[str, Path]:
    """Name -> path of the kernel's files, wherever the release has them."""
    (folder,) = {path.parent for path in source.glob("csrc/**/marlin_moe_wna16/ops.cu")}
    (constants,) = folder.parents[1].glob("quantization/marlin/marlin.cuh")
    return {path.name: path for path in (*folder.iterdir(), constants)}


def between(text: str, start: str, end: str) -> str:
    """From the only occurrence of ``start`` to the first ``end`` after it."""
    assert text.count(start) == 1, f"{text.count(start)} times in the text: {start}"
    head = text.index(start)
    return text[head : text.index(end, head + len(start))]


def pieces(files: dict[str, Path]) -> dict[str, str]:
    """Name of an .inc file -> what the harness needs of the release's text."""
    host, device, constants = (
        files[name].read_text(encoding="utf-8")
        for name in ("ops.cu", "marlin_template.h", "marlin.cuh")
    )
    return {
        "constants": "namespace MARLIN_NAMESPACE_NAME {\n"
        + between(constants, "static constexpr int min_thread_n", "static constexpr int tile_size")
        + between(constants, "constexpr int div_ceil", "\n")
        + "\n}\nusing namespace MARLIN_NAMESPACE_NAME;\n",
        "host": between(host, "typedef struct {\n  int thread_k;", "typedef struct {\n  int blocks")
        + between(host, "int get_scales_cache_size(", "bool is_valid_config("),
        "c_tmp": between(host, "long max_c_tmp_size", "c_tmp = torch"),
        "workspace": re.split(r"\w*TORCH_CHECK", between(host, "int max_n_tiles", "int dev = "))[0],
        "partition": between(device, "  // parallel: num valid", "  // A sizes/strides"),
        "strides": between(device, "  // A sizes/strides", "  // Global A read index"),
        "shared": between(device, "  // Shared memory storage", "  // Register storage"),
        "reduce": between(device, "  auto global_reduce_fp32", "  // Write out the reduce"),
        "turn": between(device, "      if (slice_count > 1 && !use", "      if (has_bias"),
        "advance": between(device, "      slice_row = 0;\n", "      if (slice_iters) {"),
    }


def for_a_cpu(text: str) -> str:
    """One build for every instance of the template; types that no piece computes with go."""
    text = text.replace("static constexpr", "const").replace("if constexpr", "if")
    text = text.replace("constexpr", "const").replace("b_type.size_bits()", "b_size.size_bits()")
    text = text.replace("global_reduce_fp16(slice_idx == 0, last);", "")
    return text.replace("      is_first_matmul_in_slice = true;\n", "")


class _Case(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "thread_k", "thread_n", "threads", "block", "weight_bits", "group_size",
            "activation_bytes", "scale_bytes", "zero_points", "stages",
            "size_n", "size_k", "tokens", "grid",
        )
    ]  # fmt: skip


class _Part(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "block", "tile", "row", "rows", "count", "index", "lock",
            "acquired", "c_tmp_end", "writers",
        )
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a block did with one part; ``acquired`` is the lock it waited for, -1 for none.

    ``c_tmp_end`` is the float after the last one that it touched, ``writers`` how many of its
    threads touched any.
    """

    block: int
    tile: int
    row: int
    rows: int
    count: int
    index: int
    lock: int
    acquired: int
    c_tmp_end: int
    writers: int


class Release:
    """The compiled pieces of a release.

    Args:
        texts: the pieces.
        folder: where to build.
    """

    def __init__(self, texts: dict[str, str], folder: Path) -> None:
        for name, text in texts.items():
            (folder / f"{name}.inc").write_text(for_a_cpu(text), encoding="utf-8")
        flags = ["-DACT_ORDER"] if "has_act_order" in texts["host"] else []
        done = subprocess.run(
            ["g++", "-std=c++20", "-O1", "-fwrapv", "-w", "-shared", "-fPIC", *flags,
             f"-I{folder}", "-o", folder / "marlin.so", HARNESS],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[:4000]
        self._library = ctypes.CDLL(str(folder / "marlin.so"))
        self._library.host_c_tmp_size.restype = ctypes.c_long
        self._parts = (_Part * MOST_PARTS)()

    def configs(self, *, large: bool) -> list[tuple[int, int, int]]:
        """The host's table of tiles: k, n, threads."""
        found: list[tuple[int, int, int]] = []
        values = [ctypes.c_int() for _ in range(3)]
        pointers = [ctypes.byref(value) for value in values]
        while self._library.host_config(int(large), len(found), *pointers):
            found.append((values[0].value, values[1].value, values[2].value))
        return found

    def cache_size(self, kernel: Kernel) -> int:
        """get_kernel_cache_size."""
        return int(self._library.host_cache_size(ctypes.byref(_case(kernel))))

    def c_tmp_size(self, size_n: int, sorted_ids: int, sms: int, block: int) -> int:
        """max_c_tmp_size."""
        arguments = (ctypes.c_long(size_n), ctypes.c_long(sorted_ids), sms, ctypes.c_long(block))
        return int(self._library.host_c_tmp_size(*arguments))

    def least_workspace(self, size_n: int, sorted_ids: int, sms: int, block: int) -> int:
        """min_workspace_size."""
        arguments = (ctypes.c_long(size_n), ctypes.c_long(sorted_ids), sms, ctypes.c_long(block))
        return int(self._library.host_least_workspace(*arguments))

    def layout_size(self, kernel: Kernel) -> int:
        """Bytes of the device's layout."""
        config = kernel.config
        case = _case(kernel)
        case.size_n, case.size_k, case.tokens, case.grid = config.n, config.k, kernel.block, 1
        return self._run(case, 0)[1]

    def blocks(self, launch: Launch) -> Iterator[list[Ran]]:
        """What each thread block does."""
        case = _case(launch.kernel)
        case.size_n, case.size_k = launch.size_n, launch.size_k
        case.tokens, case.grid = launch.tokens, launch.grid
        for block in range(launch.grid):
            yield self._run(case, block)[0]

    def _run(self, case: _Case, block: int) -> tuple[list[Ran], int]:
        shared = ctypes.c_int()
        count = self._library.device_block(
            ctypes.byref(case), block, self._parts, MOST_PARTS, ctypes.byref(shared)
        )
        assert count >= 0, "a block has more parts than there is room for"
        names = [field[0] for field in _Part._fields_]
        parts = [
            Ran(**{name: getattr(part, name) for name in names}) for part in self._parts[:count]
        ]
        return parts, shared.value


def _case(kernel: Kernel) -> _Case:
    return _Case(
        thread_k=kernel.config.k, thread_n=kernel.config.n, threads=kernel.config.threads,
        block=kernel.block, weight_bits=kernel.weight_bits, group_size=kernel.group_size,
        activation_bytes=kernel.activation_bytes, scale_bytes=kernel.scale_bytes,
        zero_points=int(kernel.zero_points), stages=kernel.stages,
    )  # fmt: skip
