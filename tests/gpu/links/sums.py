"""The ranks' sums of ``tests.gpu.tensor_parallel``, over each link."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.gpu.harness import limits, processes
from tests.gpu.harness.device import parallel_variables, ranks
from tests.gpu.links.link import LINKS
from tests.gpu.tensor_parallel import shards

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Summed:
    """What all ranks gave together, by cell and fault, and all that they printed."""

    sums: dict[str, NDArray[np.float64]]
    log: str


def run(link: str, backend: str, work: Path) -> Summed:
    """Run all ranks of the tier.

    Raises:
        RuntimeError: a rank wrote nothing.
        NotStartedError: there was no time for that.
    """
    folder, count = work / f"sums-{link}-{backend}", ranks()
    folder.mkdir()
    env = {**os.environ, **parallel_variables(), **LINKS[link].variables}

    def one(rank: int) -> str:
        argv = [sys.executable, "-m", shards.JOB, str(folder), str(rank), str(count), backend]
        log, nccl = folder / f"{rank}.log", folder / f"{rank}.nccl"
        # NCCL flushes lines to a file of its own; what it prints is lost with the rank's _exit.
        processes.run(argv, log, {**env, "NCCL_DEBUG_FILE": str(nccl)}, limits.limit("shards"))
        return "".join(path.read_text(errors="replace") for path in (log, nccl) if path.exists())

    with ThreadPoolExecutor(count) as pool:
        logs = list(pool.map(one, range(count)))
    sums = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    if len(sums) < len(shards.CELLS) * (len(shards.Fault) + 1):
        raise RuntimeError("\n".join(text[-2000:] for text in logs))
    return Summed(sums=sums, log="".join(logs))
