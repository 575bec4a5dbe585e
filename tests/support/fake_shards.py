"""Stands for ``tests.gpu.tensor_parallel.shards``: an emulator instead of a GPU for each rank.

The first rank writes what all of them give; the others end at once.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tests.gpu.reference.marlin_layout import bfloat16
from tests.gpu.tensor_parallel.shards import CELLS, Fault, cell_of, shard
from tests.support import emulators

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.gpu.reference.nvfp4_moe_cells import Cell


def give(cell: Cell) -> NDArray[np.float64]:
    return emulators.nvfp4_experts(cell.experts, cell.rows, cell.experts_of, cell.router)


def main(folder: Path, rank: int, count: int, backend: str) -> None:
    if rank:
        return
    for routed in CELLS:
        cell = cell_of(routed, backend)
        np.save(folder / f"{routed}-whole.npy", give(cell))
        for fault in Fault:
            total = np.zeros_like(cell.rows)
            for one in range(count):
                part = replace(cell, experts=shard(cell.experts, one, count, fault))
                total = bfloat16((total + give(part)).astype(np.float32))
            np.save(folder / f"{routed}-{fault.name}.npy", total)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
