"""Experts cut into shards: each rank computes its own on a GPU of its own, and NCCL adds them up.

    python -m tests.gpu.tensor_parallel.shards FOLDER RANK RANKS BACKEND

Writes ``FOLDER/<cell>-<fault>.npy``, the sum that all ranks have, and ``FOLDER/<cell>-whole.npy``.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tests.gpu.harness import limits, processes
from tests.gpu.harness.device import parallel_variables, ranks
from tests.gpu.numerics.selected import quantizes
from tests.gpu.reference import nvfp4_moe_cells as cells
from tests.gpu.reference.marlin_reference import U_BFLOAT16, Sums
from tests.gpu.reference.nvfp4_moe import Experts, expected

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.gpu.reference.nvfp4_moe_cells import Cell

JOB = "tests.gpu.tensor_parallel.shards"
# Name of a cell: its tokens.
CELLS = {"even": 9, "hot": 17}


class Fault(Enum):
    """What is wrong with the shards of a layer."""

    NONE = "nothing"
    WRONG_SHARD = "the first rank has the last one's"
    SWAPPED_SHARDS = "the first and the last rank have each other's down projections"
    FOREIGN_SCALES = "the first rank has the last one's scales"


@cache
def cell_of(routed: str, backend: str) -> Cell:
    """A layer, and rows for it."""
    return cells.dense(
        experts=4, hidden=512, intermediate=1024, tokens=CELLS[routed], top_k=2, routed=routed,
        quantized=quantizes(backend),
    )  # fmt: skip


def shard(experts: Experts, rank: int, count: int, fault: Fault) -> Experts:
    """What a rank has of a layer, of ``count`` ranks."""
    own, opposite = experts.shard(rank, count), experts.shard(count - 1 - rank, count)
    if fault is Fault.WRONG_SHARD and rank == 0:
        return opposite
    if fault is Fault.SWAPPED_SHARDS and rank in {0, count - 1}:
        return replace(own, down=opposite.down)
    if fault is Fault.FOREIGN_SCALES and rank == 0:
        return replace(
            own,
            gate_up=replace(own.gate_up, scales=opposite.gate_up.scales),
            down=replace(own.down, scales=opposite.down.scales),
        )
    return own


@cache
def due(routed: str, backend: str, count: int) -> Sums:
    """What the ranks' results add up to: their bounds' sum, and a rounding for each addition."""
    cell = cell_of(routed, backend)
    parts = [
        expected(shard(cell.experts, rank, count, Fault.NONE), cell.rows, cell.experts_of,
                 cell.router)
        for rank in range(count)
    ]  # fmt: skip
    exact, bound = sum(part.exact for part in parts), sum(part.bound for part in parts)
    size = sum(np.abs(part.exact) + part.bound for part in parts)
    turns = (count - 1) * U_BFLOAT16 * (1 + U_BFLOAT16) ** count
    return Sums(exact=np.asarray(exact), bound=np.asarray(bound + turns * size))


def run(backend: str, work: Path) -> dict[str, NDArray[np.float64]]:
    """Run all ranks of the tier; what they wrote, by name.

    Raises:
        RuntimeError: a rank wrote nothing.
        NotStartedError: there was no time for that.
    """
    folder, count = work / f"shards-{backend}", ranks()
    folder.mkdir()
    env = {**os.environ, **parallel_variables()}

    def one(rank: int) -> None:
        argv = [sys.executable, "-m", JOB, str(folder), str(rank), str(count), backend]
        log = folder / f"{rank}.log"
        processes.run(argv, log, env, limits.limit("shards"))

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(one, range(count)))
    found = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    if len(found) < len(CELLS) * (len(Fault) + 1):
        logs = [path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("*.log"))]
        raise RuntimeError("\n".join(logs))
    return found


def main(folder: Path, rank: int, count: int, backend: str) -> None:
    import torch
    from torch import distributed

    from tests.gpu.numerics.layers import bfloat16_tensor, launch, values

    torch.cuda.set_device(rank)
    partial = {}
    for routed in CELLS:
        whole = cell_of(routed, backend)
        for fault in Fault:
            part = replace(whole, experts=shard(whole.experts, rank, count, fault))
            partial[f"{routed}-{fault.name}"] = bfloat16_tensor(launch(part, backend))
        if rank == 0:
            np.save(folder / f"{routed}-whole.npy", launch(whole, backend))
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("nccl", init_method=meeting, rank=rank, world_size=count)
    for name, total in partial.items():
        distributed.all_reduce(total)
        if rank == 0:
            np.save(folder / f"{name}.npy", values(total))
    distributed.barrier()
    os._exit(0)  # what is to be said is written


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
