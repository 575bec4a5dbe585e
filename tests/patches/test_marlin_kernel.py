"""The Marlin MoE kernel as the release has it: the reference model agrees with its own text.

And, on that text, what is claimed of it. vllm-project/vllm#36889, refiled as #43730, says that
c_tmp is too small and launches with less shared memory; an installer's patch makes the workspace
four times as large. What would be changed is fine, what would be put there is not.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.gpu.reference import marlin_kernel, marlin_schedule
from tests.gpu.reference.marlin_kernel import (
    LARGE_BATCH,
    SMALL_BATCH,
    Kernel,
    ThreadConfig,
)
from tests.gpu.reference.marlin_schedule import Launch, Part, schedule
from tests.support import marlin_host, marlin_protocol
from tests.support.marlin_host import LAUNCH_SLACK, faults

from .marlin_source import Ran, Release, marlin_files, pieces

CITED = re.compile(r"Cited: ``(?P<text>.+?)`` at (?P<file>[\w.]+) (?P<lines>(?: ?[\d.]+:\d+)+)")
SIZES = (8, 16, 32, 48, 64)
SMS = (132, 148, 188)  # H200; B200 and B300; RTX PRO 6000


@pytest.fixture(scope="module")
def files(source: Path) -> dict[str, Path]:
    return marlin_files(source)


@pytest.fixture(scope="module")
def release(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Release:
    return Release(pieces(files), tmp_path_factory.mktemp("marlin"))


@pytest.fixture(scope="module")
def kernels(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """Every instance that the release's own script generates, for GPUs that have them all."""
    text = (source / "CMakeLists.txt").read_text(encoding="utf-8")
    (path,) = re.findall(r"MOE_MARLIN_GEN_SCRIPT\s+\S+SOURCE_DIR}/(\S+\.py)\)", text)
    folder = tmp_path_factory.mktemp("generated")
    script = shutil.copy(source / path, folder)
    subprocess.run([sys.executable, script, "12.0"], check=True)
    selector = (folder / "kernel_selector.h").read_text(encoding="utf-8")
    found = [_kernel(row) for row in re.findall(r"if \((a_type == .*)\)\n", selector)]
    return sorted({kernel for kernel in found if kernel}, key=repr)


def _kernel(conditions: str) -> Kernel | None:
    """A row of kernel_selector.h; None for one with activation order."""
    has = dict(condition.split(" == ") for condition in conditions.split(" && "))
    types = {name: has[name].removeprefix("vllm::k") for name in ("a_type", "b_type", "s_type")}
    if has["group_blocks"] == "0":
        return None
    half = has["m_block_size_8"] == "true"
    return Kernel(
        config=ThreadConfig(
            k=16 * int(has["thread_k_blocks"]),
            n=16 * int(has["thread_n_blocks"]),
            threads=int(has["threads"]),
        ),
        block=8 if half else 16 * int(has["thread_m_blocks"]),
        group_size=-1 if has["group_blocks"] == "-1" else 16 * int(has["group_blocks"]),
        weight_bits={"U4": 4, "U4B8": 4, "FE2M1f": 4, "U8B128": 8, "FE4M3fn": 8}[types["b_type"]],
        activation_bytes={"Float16": 2, "BFloat16": 2, "S8": 1, "FE4M3fn": 1}[types["a_type"]],
        scale_bytes={"Float16": 2, "BFloat16": 2, "FE4M3fn": 1, "FE8M0fnu": 1}[types["s_type"]],
        zero_points=types["b_type"] == "U4",
        stages=int(has["stages"]),
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    launch: Launch
    sms: int


def _cases() -> list[Case]:
    """Sizes of this model's experts for TP 1 to 8 and others, few and many tokens, all grids."""
    shapes = [(4096, 4096), (4096, 2048), (1024, 4096), (4096, 512), (2560, 512), (192, 7168)]
    found = []
    for (size_n, size_k), block, group, sms, share, blocks in itertools.product(
        shapes, (8, 16, 64), (-1, 16, 128), (13, *SMS), (1, 2, 4), (3, 17)
    ):
        for config in LARGE_BATCH if block > 16 else SMALL_BATCH:
            if size_n % config.n or size_k % config.k:
                continue
            kernel = Kernel(
                config=config,
                block=block,
                group_size=group,
                activation_bytes=1 if block > 8 and blocks == 3 else 2,
            )
            launch = Launch(
                kernel=kernel,
                size_n=size_n,
                size_k=size_k,
                tokens=blocks * block,
                grid=sms * share,
            )
            found.append(Case(launch=launch, sms=sms))
    return found[::37]


CASES = _cases()


# --- the model is the release's text --------------------------------------------------------------


def test_tiles_to_choose_from(release: Release) -> None:
    for configs, large in ((SMALL_BATCH, False), (LARGE_BATCH, True)):
        assert release.configs(large=large) == [(c.k, c.n, c.threads) for c in configs]


def test_every_kernel_uses_what_the_model_says(release: Release, kernels: list[Kernel]) -> None:
    assert len(kernels) > 200
    for kernel in kernels:
        assert release.cache_size(kernel) == marlin_host.cache_size(kernel), kernel
        assert release.layout_size(kernel) == marlin_host.layout_size(kernel), kernel


def test_buffers_have_the_size_that_the_model_says(release: Release) -> None:
    for block, size_n, blocks, sms in itertools.product(SIZES, (64, 4096), (1, 9, 900), SMS):
        kernel = Kernel(config=SMALL_BATCH[0], block=block, group_size=128)
        sizes = (size_n, blocks * block, sms)
        assert release.c_tmp_size(*sizes, block) == marlin_kernel.c_tmp_size(kernel, *sizes)
        assert release.least_workspace(*sizes, block) == marlin_host.least_workspace(kernel, *sizes)


def _differs(release: Release, launch: Launch) -> bool:
    """Whether the release schedules, locks or reduces otherwise than the model."""
    for modelled, blocks in zip(schedule(launch), release.blocks(launch), strict=True):
        if [_ran(launch, part) for part in modelled] != blocks:
            return True
    return False


def _ran(launch: Launch, part: Part) -> Ran:
    """What a part does, by the model."""
    kernel, split = launch.kernel, part.count > 1
    columns = 32 if kernel.activation_bytes == 1 else 64
    return Ran(
        **{name: getattr(part, name) for name in Part.__dataclass_fields__},
        acquired=part.lock if split else -1,
        c_tmp_end=marlin_kernel.reduce_end(kernel, part.lock) if split else 0,
        writers=32 * kernel.config.n // columns if split else 0,
    )


def test_every_block_does_what_the_model_says(release: Release) -> None:
    launches = [case.launch for case in CASES]
    assert sum(marlin_schedule.locks_used(schedule(launch)) > 0 for launch in launches) > 50
    assert [launch for launch in launches if _differs(release, launch)] == []


@pytest.mark.parametrize(
    ("piece", "text", "other"),
    [
        ("partition", "part2_mn_tiles * 3 <= gridDim.x", "part2_mn_tiles * 2 <= gridDim.x"),
        ("partition", "if (col_off > 0) slice_count++;", ""),
        ("partition", "slice_count > 1 && slice_idx == slice_count - 1", "slice_count > 1"),
        ("reduce", "active_threads = 32 * tb_n_warps", "active_threads = threads"),
        ("turn", "&locks[locks_off]", "&locks[locks_off + 1]"),
        ("advance", "slice_col_par += gridDim.x", "slice_col_par += 1"),
    ],
)
def test_a_release_that_does_otherwise_is_noticed(
    files: dict[str, Path], tmp_path: Path, piece: str, text: str, other: str
) -> None:
    texts = pieces(files)
    assert text in texts[piece]
    texts[piece] = texts[piece].replace(text, other)
    drifted = Release(texts, tmp_path)
    assert any(_differs(drifted, case.launch) for case in CASES)


@pytest.mark.parametrize("module", [marlin_kernel, marlin_schedule, marlin_host, marlin_protocol])
def test_the_lines_that_the_model_cites_are_there(files: dict[str, Path], module: object) -> None:
    import vllm

    model = Path(module.__file__).read_text(encoding="utf-8")  # type: ignore[attr-defined]
    cited = list(CITED.finditer(model))
    assert len(cited) == model.count("Cited: ") > 0
    for citation in cited:
        lines = dict(item.split(":") for item in citation["lines"].split())
        text = files[citation["file"]].read_text(encoding="utf-8").splitlines()
        assert citation["text"] in text[int(lines[vllm.__version__.partition("+")[0]]) - 1]


# --- what is claimed ------------------------------------------------------------------------------


def test_a_launch_with_the_counted_size_is_too_small_for_8_bit_activations(
    files: dict[str, Path], release: Release, kernels: list[Kernel]
) -> None:
    """#36889 and #43730 put sh_cache_size, what the host counts, where the release has all it got.

    The host's count lacks the activations' scales, one float per row of the tile. Where scales of
    the weights are counted too large (8-bit ones, as if they had 16), that makes up for it.
    """
    assert "kernel<<<blocks, num_threads, max_shared_mem, stream>>>" in files["ops.cu"].read_text()
    short = {
        kernel: missing
        for kernel in kernels
        if (missing := release.layout_size(kernel) - release.cache_size(kernel)) > 0
    }
    assert set(short) == {k for k in kernels if k.activation_bytes == 1 and k.scale_bytes == 2}
    assert all(missing == 64 * kernel.m_blocks for kernel, missing in short.items())
    assert {kernel.m_blocks for kernel in short} == {1, 2, 3, 4}


def test_the_releases_own_launch_is_large_enough(
    files: dict[str, Path], release: Release, kernels: list[Kernel]
) -> None:
    """It leaves 512 bytes when it chooses a tile, whether one or more blocks share an SM."""
    text = files["ops.cu"].read_text(encoding="utf-8")
    assert f"max_shared_mem - {LAUNCH_SLACK}))" in text
    assert f"max_shared_mem / (cache_size + {1024 + LAUNCH_SLACK})" in text
    assert "max_shared_mem = max_shared_mem / exec_cfg.blocks_per_sm - 1024;" in text
    for kernel in kernels:
        assert release.layout_size(kernel) <= release.cache_size(kernel) + LAUNCH_SLACK


def test_the_reported_overrun_of_c_tmp_does_not_exist(release: Release) -> None:
    """The report's own example: RTX A6000, one token, w2 of Qwen3.5-35B-A3B.

    It counts `159 * 512 + 256 * 6 + 255`, 256 threads that take part; with that tile 64 do. And
    no tile of it is in two parts, so that nothing of c_tmp is used at all.
    """
    kernel = Kernel(config=SMALL_BATCH[0], block=8, group_size=128)
    launch = Launch(kernel=kernel, size_n=2560, size_k=512, tokens=64, grid=168)
    assert launch.tiles == 160
    c_tmp = release.c_tmp_size(2560, 64, 84, 8)
    assert c_tmp == 4 * 81_920
    assert c_tmp < 4 * (159 * 512 + 256 * 6 + 255)
    assert marlin_kernel.reduce_end(kernel, 159) == 4 * (159 * 512 + 64 * 6 + 63 + 1) <= c_tmp
    assert {part.c_tmp_end for block in release.blocks(launch) for part in block} == {0}


def test_no_launch_leaves_its_workspace_or_c_tmp(release: Release) -> None:
    """So neither a larger c_tmp nor a workspace four times as large changes anything.

    The buffers are the least that the release allows: no token of padding beyond the last block.
    """
    used = 0
    for case in CASES:
        launch, kernel = case.launch, case.launch.kernel
        sizes = (launch.size_n, launch.tokens, case.sms, kernel.block)
        workspace, c_tmp = release.least_workspace(*sizes), release.c_tmp_size(*sizes)
        assert faults(launch, schedule(launch), workspace=workspace, c_tmp=c_tmp) == []
        for part in (part for block in release.blocks(launch) for part in block):
            assert part.acquired < workspace
            assert part.c_tmp_end <= c_tmp
            used = max(used, part.acquired)
    assert used > 100
