"""The HTTP server and its Prometheus counters, with requests that come and go together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.gpu.mtp.engines import last
from vllm_forge.gpu import exact_mtp
from vllm_forge.gpu.gate import Band, Traffic, judge
from vllm_forge.gpu.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.tier("server"),
    pytest.mark.xdist_group("mtp"),
    pytest.mark.value(9, 60),
]
K, CLIENTS = 2, 8
COUNTS = [64, 97, 128, 200, 256, 301, 400, 512]  # clients end at different times
ARGUMENTS = [
    "--max-model-len=2048", "--max-num-seqs=8", "--kv-cache-memory-bytes=268435456",
    "--gpu-memory-utilization=0.05", "--enforce-eager", "--no-enable-prefix-caching",
    "--attention-backend=TRITON_ATTN",
]  # fmt: skip
SPECULATION = f'--speculative-config={{"method":"mtp","num_speculative_tokens":{K}}}'


def serve(folder: Path, logs: Path, *more: str) -> Server:
    model = exact_mtp.write(folder / "model", "fraction")
    name = "serve-mtp.log" if more else "serve-plain.log"
    return Server(model=model, arguments=[*ARGUMENTS, *more], log=logs / name)


def test_counters_of_concurrent_requests(
    tmp_path: Path,
    boot_logs: Path,
    margin: Callable[[str, float, float], None],
    record: Callable[..., None],
) -> None:
    with serve(tmp_path, boot_logs, SPECULATION) as server, ThreadPoolExecutor(CLIENTS) as pool:
        # Counters do not start at zero on a server that lives: only what is added counts.
        warm = server.complete([200, last(0)], 32)
        before = server.reading(len(warm))
        prompts = [[200 + n, last(n)] for n in range(CLIENTS)]
        answers = list(pool.map(server.complete, prompts, COUNTS))
        after = server.reading(len(warm) + sum(COUNTS))
    assert before is not None
    assert after is not None
    change = after.since(before)
    sums = [exact_mtp.expected("fraction", last(n), COUNTS[n], K) for n in range(CLIENTS)]
    assert answers == [list(counts.tokens) for counts in sums]
    slack = exact_mtp.allowance(CLIENTS)
    margin("drafts", abs(change.drafts - sum(c.drafts for c in sums)), slack)
    margin("accepted", abs(change.accepted - sum(c.accepted for c in sums)), K * slack)
    rate = sum(c.accepted for c in sums) / sum(c.draft_tokens for c in sums)
    verdict = judge(
        change,
        Traffic(requests=CLIENTS, tokens=sum(COUNTS)),
        Band(sku="any", workload="exact", k=K, low=rate - 0.02, high=rate + 0.02),
    )
    record(acceptance=verdict.rate, computed=rate)
    assert verdict.passed, verdict.problems


def test_server_without_speculation_exports_nothing(tmp_path: Path, boot_logs: Path) -> None:
    with serve(tmp_path, boot_logs) as server:
        tokens = server.complete([200, last(0)], 64)
        reading = server.reading(64)
    assert tokens == exact_mtp.orbit(last(0), 64)
    assert reading is None
