"""Positive controls: the release's own kernel with one fault each, built beside the real op.

A mutant is the release's ``ops.cu`` and ``marlin_template.h`` with one text replaced, compiled as
one file with two instances of the template (NVFP4 and W4A16, 8 rows, tile 128 x 128) and
registered as ``torch.ops.forge_<name>.moe_wna16_marlin_gemm``. A text that is not there exactly
once is an error: a mutant that is no mutant would prove the opposite.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

TEMPLATE, HOST = "marlin_template.h", "ops.cu"
FOLDER = "csrc/libtorch_stable/moe/marlin_moe_wna16"
BINDINGS = "csrc/libtorch_stable/moe/torch_bindings.cpp"
REGISTRATION = "STABLE_TORCH_LIBRARY_IMPL(_moe_C, CUDA, m)"
SCHEMA = re.compile(
    r'm\.def\(\s*((?:"[^"]*"\s*)*"moe_wna16_marlin_gemm\([^"]*"\s*(?:"[^"]*"\s*)*)\)'
)
ACQUIRE = "        barrier_acquire(&locks[locks_off], slice_idx);\n        if (use_fp32_reduce) {"
RELEASE = (
    "        barrier_release(&locks[locks_off], last);\n      }\n\n      if (has_bias && last) {"
)
END = "}\n\n}  // namespace MARLIN_NAMESPACE_NAME\n\n#endif\n"
# b_type, s_type, group_blocks of each instance.
INSTANCES = (("kFE2M1f", "kFE4M3fn", 1), ("kU4B8", "kBFloat16", 8))


@dataclass(frozen=True)
class Mutant:
    """A fault; its op is in ``torch.ops.forge_<name>``.

    Attributes:
        edits: texts that are there once, and what replaces each.
        file: in which.
    """

    name: str
    what: str
    edits: tuple[tuple[str, str], ...] = ()
    file: str = TEMPLATE


def _mutant(name: str, what: str, *edits: tuple[str, str], file: str = TEMPLATE) -> Mutant:
    return Mutant(name, what, edits, file)


MUTANTS = (
    _mutant("clean", "no fault"),
    _mutant(
        "early_release",
        "the lock is released before the sum is read and written",
        (
            ACQUIRE,
            ACQUIRE.replace(
                "\n",
                "\n        barrier_release(&locks[locks_off], last);\n        if (!last) {\n"
                "          long long start = clock64();\n"
                "          while (clock64() - start < 4000) {}\n        }\n",
                1,
            ),
        ),
        (RELEASE, RELEASE.split("\n", 1)[1]),
    ),
    _mutant(
        "no_acquire",
        "a block does not wait for its turn",
        (
            ACQUIRE,
            ACQUIRE.replace("barrier_acquire(&locks[locks_off], slice_idx);", "__syncthreads();"),
        ),
    ),
    _mutant(
        "no_reset",
        "the last part leaves the lock as it is",
        ("      lock[0] = 0;\n      return;", "      return;"),
    ),
    _mutant(
        "lock_alias",
        "two tiles use one lock",
        (ACQUIRE, ACQUIRE.replace("locks[locks_off]", "locks[locks_off / 2]")),
        (RELEASE, RELEASE.replace("locks[locks_off]", "locks[locks_off / 2]")),
    ),
    _mutant(
        "slot_overlap",
        "slots of c_tmp overlap by half",
        (
            "    int c_cur_offset = locks_off * c_size;",
            "    int c_cur_offset = locks_off * (c_size / 2);",
        ),
    ),
    _mutant(
        "short_c_tmp",
        "c_tmp has as many floats as C_TMP_FLOATS says",
        (
            "    if (moe_block_size == 8) max_c_tmp_size *= 2;\n",
            "    if (moe_block_size == 8) max_c_tmp_size *= 2;\n"
            '    if (const char* floats = std::getenv("C_TMP_FLOATS"))\n'
            "      max_c_tmp_size = std::atol(floats);\n",
        ),
        file=HOST,
    ),
    _mutant(
        "skipped_write",
        "the first column tile of the result is not written",
        (
            "      if (last || use_atomic_add)\n",
            "      if ((last || use_atomic_add) && slice_col != 0)\n",
        ),
    ),
    _mutant(
        "no_release_barrier",
        "the lock is released before all warps have written",
        ("bool reset = false) {\n  __syncthreads();\n", "bool reset = false) {\n"),
    ),
    _mutant(
        "no_stage_barrier",
        "warps do not wait for each other's copies to shared memory",
        (
            "    cp_async_wait<stages - 2>();\n    __syncthreads();\n",
            "    cp_async_wait<stages - 2>();\n",
        ),
    ),
    _mutant(
        "half_barrier",
        "only half a warp comes to the barrier after the lock",
        (
            "    while (state != count);\n  }\n  __syncthreads();\n",
            "    while (state != count);\n  }\n  if (threadIdx.x % 32 < 16) __syncthreads();\n",
        ),
    ),
    _mutant(
        "foreign_mask",
        "a lane outside a mask waits with those in it, at the end",
        (END, "  if (threadIdx.x % 32 <= 16) __syncwarp(0x0000ffffu);\n" + END),
    ),
    _mutant(
        "no_fence",
        "the lock is released without a fence",
        ('    asm volatile("fence.acq_rel.gpu;\\n");\n', ""),
    ),
    _mutant(
        "weak_acquire",
        "the lock is read without acquire semantics",
        (
            'asm volatile("ld.global.acquire.gpu.b32 %0, [%1];\\n"\n'
            '                   : "=r"(state)\n'
            '                   : "l"(lock));\n'
            "    while (state != count);",
            'asm volatile("ld.volatile.global.b32 %0, [%1];\\n"\n'
            '                   : "=r"(state)\n'
            '                   : "l"(lock));\n'
            "    while (state != count);",
        ),
    ),
)
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}


class AnchorError(Exception):
    """The release's text is not what a mutant was written for."""


def replace_once(text: str, old: str, new: str, file: str) -> str:
    """The text of a file with an edit.

    Raises:
        AnchorError: what it replaces is not there exactly once.
    """
    if (count := text.count(old)) != 1:
        raise AnchorError(f"{count} times in {file}, not once: {old!r}")
    return text.replace(old, new)


def lay_out(mutant: Mutant, source: Path, folder: Path) -> Path:
    """Write a mutant's text.

    Args:
        mutant: which.
        source: the release's tree, or what of it suite.toml names.
        folder: an empty one.

    Returns:
        The file to compile; ``folder`` and ``source``/csrc have to be on the include path.

    Raises:
        AnchorError: see replace_once.
    """
    texts = {
        name: (source / FOLDER / name).read_text(encoding="utf-8")
        for name in (TEMPLATE, HOST, "kernel.h")
    }
    for old, new in mutant.edits:
        texts[mutant.file] = replace_once(texts[mutant.file], old, new, mutant.file)
    space = f"forge_{mutant.name}"
    own = REGISTRATION.replace("_moe_C", space)
    host = replace_once(texts[HOST], REGISTRATION, own, HOST)
    schemas = SCHEMA.findall((source / BINDINGS).read_text(encoding="utf-8"))
    if len(schemas) != 1:
        raise AnchorError(f"{len(schemas)} schemas of the op in {BINDINGS}")
    (folder / TEMPLATE).write_text(texts[TEMPLATE], encoding="utf-8")
    (folder / "kernel.h").write_text(texts["kernel.h"], encoding="utf-8")
    (folder / "kernel_selector.h").write_text(_selector(), encoding="utf-8")
    whole = folder / f"{mutant.name}.cu"
    whole.write_text(
        "#include <cstdlib>\n"
        f"#define MARLIN_NAMESPACE_NAME marlin_{mutant.name}\n"
        f'#include "kernel.h"\n#include "{TEMPLATE}"\n{host}\n'
        f"STABLE_TORCH_LIBRARY_FRAGMENT({space}, m) {{ m.def({schemas[0]}); }}\n",
        encoding="utf-8",
    )
    return whole


def _selector() -> str:
    """kernel_selector.h for the instances, in the words of the release's generate_kernels.py."""
    rows = []
    for b_type, s_type, group in INSTANCES:
        rows.append(
            f"if (a_type == vllm::kBFloat16 && b_type == vllm::{b_type} && "
            f"s_type == vllm::{s_type} && threads == 256 && thread_m_blocks == 1 && "
            f"thread_n_blocks == 8 && thread_k_blocks == 8 && m_block_size_8 && stages == 4 && "
            f"group_blocks == {group})\n"
            f"  kernel = Marlin<vllm::kBFloat16.id(), vllm::{b_type}.id(), vllm::kBFloat16.id(), "
            f"vllm::{s_type}.id(), 256, 1, 8, 8, true, 4, {group}, false>;\n"
        )
    return "else ".join(rows)
