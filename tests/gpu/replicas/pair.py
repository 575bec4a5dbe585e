"""Two servers side by side, each on its share of the tier's GPUs.

``serve --replica 1`` and ``--replica 2`` start containers: an engine gives each its GPUs by number,
and they share the volume of compiled kernels. Here CUDA_VISIBLE_DEVICES stands for the engine; a
unit test holds the shares to those of ``serve``. Sums go over PCIe, as on hosts that need replicas.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tests.gpu.harness.device import NAMED, parallel_variables, query, ranks, visible
from tests.gpu.harness.server import Server
from tests.gpu.links.link import LINKS, NCCL_ALONE
from tests.gpu.links.servers import LEVELS, ask
from tests.gpu.models import exact_moe
from tests.gpu.race_server.arms import Arm, Asked

if TYPE_CHECKING:
    from pathlib import Path

REPLICAS = (1, 2)
ARM = Arm(graphs=True, speculate=True, levels=LEVELS)


@dataclass(frozen=True, kw_only=True)
class Replica:
    """What came of one; ``grown``: MiB that each of its GPUs holds more than before the start."""

    asked: Asked
    grown: dict[str, int]


def share(number: int) -> list[str]:
    """GPUs of the Nth replica."""
    gpus = visible()[: ranks()]
    size = len(gpus) // len(REPLICAS)
    return gpus[(number - 1) * size : number * size]


def run(work: Path, logs: Path) -> dict[int, Replica]:
    """Start both, ask both at the same time, and end them; raises what ``Server`` does."""
    model = exact_moe.write(work / "replicas-model", ARM.scheme)
    servers = {number: _server(number, model, logs) for number in REPLICAS}
    before, begun = _used(), time.monotonic()
    with contextlib.ExitStack() as running, ThreadPoolExecutor(len(REPLICAS)) as pool:
        list(pool.map(running.enter_context, servers.values()))
        ready, after = time.monotonic() - begun, _used()
        asked = list(pool.map(partial(ask, arm=ARM, ready=ready), servers.values()))
    return {
        number: Replica(asked=found, grown={gpu: after[gpu] - before[gpu] for gpu in share(number)})
        for number, found in zip(servers, asked, strict=True)
    }


def _server(number: int, model: Path, logs: Path) -> Server:
    own = share(number)
    return Server(
        model=model,
        arguments=[*ARM.arguments, f"--tensor-parallel-size={len(own)}", NCCL_ALONE],
        log=logs / f"replica-{number}.log",
        variables={**parallel_variables(), **LINKS["pcie"].variables, NAMED: ",".join(own)},
    )


def _used() -> dict[str, int]:
    """MiB of each GPU that are taken."""
    return {gpu: int(query("memory.used", gpu=gpu)[0][0]) for gpu in visible()[: ranks()]}
