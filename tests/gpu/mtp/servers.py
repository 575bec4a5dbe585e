"""HTTP servers of the exact model, each asked all that its test reads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.gpu.harness.server import Server
from tests.gpu.models import exact_mtp
from tests.gpu.mtp.engines import last

if TYPE_CHECKING:
    from pathlib import Path

    from tests.gpu.harness.spec_metrics import Reading

K, CLIENTS = 2, 8
COUNTS = [64, 97, 128, 200, 256, 301, 400, 512]  # clients end at different times
ALONE = 64
ARGUMENTS = [
    "--max-model-len=2048", "--max-num-seqs=8", "--kv-cache-memory-bytes=268435456",
    "--gpu-memory-utilization=0.05", "--enforce-eager", "--no-enable-prefix-caching",
    "--attention-backend=TRITON_ATTN",
]  # fmt: skip
# Server -> its further arguments.
SERVERS = {
    "serve-mtp": [f'--speculative-config={{"method":"mtp","num_speculative_tokens":{K}}}'],
    "serve-plain": [],
}


@dataclass(frozen=True, kw_only=True)
class Served:
    """Tokens of a request ``alone``, counters after it; of those ``together``, and after them."""

    alone: list[int]
    before: Reading | None
    together: list[list[int]]
    after: Reading | None


def serve(name: str, work: Path, logs: Path) -> Served:
    """Start a server, ask it, end it.

    Raises:
        ServerEndedError: it did not come up.
        NotStartedError: there was no time for that.
        OSError: it ended while it was asked.
    """
    model = exact_mtp.write(work / f"{name}-model", "fraction")
    server = Server(model=model, arguments=[*ARGUMENTS, *SERVERS[name]], log=logs / f"{name}.log")
    with server:
        # Counters do not start at zero on a server that lives: only what is added counts.
        alone = server.complete([200, last(0)], ALONE)
        before = server.reading(len(alone))
        if not SERVERS[name]:
            return Served(alone=alone, before=before, together=[], after=None)
        prompts = [[200 + number, last(number)] for number in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            together = list(pool.map(server.complete, prompts, COUNTS))
        after = server.reading(len(alone) + sum(COUNTS))
    return Served(alone=alone, before=before, together=together, after=after)
