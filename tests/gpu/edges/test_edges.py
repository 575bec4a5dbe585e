"""Claims of presets that shape alone decides, and what a server of an artifact's size survives.

The checkpoint is a rehearsal: nothing here says anything of the artifact's numerics, acceptance or
quality. Kernels are those of this host's GPU, not of the declared card's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.gpu.edges import load
from tests.gpu.edges.conftest import run_limited
from tests.gpu.edges.rows import (
    CARD,
    FULL_BATCH,
    GRAPHS,
    REFUSALS,
    REFUSED,
    SERVED,
    SOAK,
    Refusal,
    Start,
)
from tests.gpu.rehearsal import measured

if TYPE_CHECKING:
    from tests.gpu.conftest import Margin, Record
    from tests.gpu.edges.conftest import Soaked, Started
    from tests.gpu.harness.server import Server

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.tier("edges"),
    pytest.mark.xdist_group("edges"),
    pytest.mark.value(1, 1),  # all alike: in this order
]
OFF = 0.05  # what may be off of memory that was foretold
AROUND_MIB = 1024  # of the card's memory, below and above which is allocated
HELD_S = 120  # until pending requests run


def _utilization(start: Start) -> str:
    return f"{CARD['preset']} on {CARD['mib']} MiB, utilization {start.utilization}"


def test_allocator_ends_where_the_card_does(gpu_bytes: int, record: Record) -> None:
    """The declared limit is in force: without it, the host's GPU would have room."""
    within = run_limited(gpu_bytes, CARD["mib"] - AROUND_MIB)
    beyond = run_limited(gpu_bytes, CARD["mib"] + AROUND_MIB)
    record(card_mib=CARD["mib"], beyond=beyond[-300:])
    assert not within, within
    assert "OutOfMemoryError" in beyond
    assert (CARD["mib"] + AROUND_MIB) << 20 < gpu_bytes


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.name.replace(" ", "-"))
def test_configuration_is_refused(
    row: Refusal, refusals: dict[str, Started], record: Record
) -> None:
    start = refusals[row.name]
    record(edge=row.name, foretold=row.foretold or "nothing", measured=_outcome(start, row.says))
    assert not start.serves, "it serves"
    assert row.says in start.log


def test_weights_beyond_the_utilization_are_refused(too_small: Started, record: Record) -> None:
    foretold = f"{REFUSED.verdict}: {REFUSED.requested_gib} GiB"
    outcome = _outcome(too_small, REFUSED.says)
    record(edge=_utilization(REFUSED), foretold=foretold, measured=outcome, **too_small.facts)
    assert not too_small.serves, "it serves"
    assert REFUSED.says in too_small.log


def test_weights_within_the_utilization_are_served(
    served: tuple[Server, Started], margin: Margin, record: Record
) -> None:
    """On the same card; vLLM takes what the card would give it."""
    start = served[1]
    weights, cache = (start.facts[name][0] for name in ("weights_gib", "kv_cache_gib"))
    record(
        edge=_utilization(SERVED),
        foretold=f"{SERVED.verdict}: {SERVED.requested_gib} GiB, of which {CARD['weights_gib']} "
        f"weights and {CARD['kv_cache_gib']} a request of {CARD['max_model_len']} tokens",
        measured=f"serves: {weights} weights, {cache} left for requests",
        **start.facts,
    )
    margin("weights", abs(weights / CARD["weights_gib"] - 1), OFF)
    assert f"{SERVED.requested_gib:.2f} GiB). Actual usage is" in start.log
    assert start.facts["max_model_len"] == [CARD["max_model_len"]]
    assert cache >= CARD["kv_cache_gib"] * (1 - OFF)


def test_batches_beyond_the_graphs_run_eager(decoded: str, record: Record) -> None:
    """As lint says of more sequences than the largest graph holds; smaller ones have graphs."""
    largest, few = max(GRAPHS["sizes"]), GRAPHS["few"] * GRAPHS["tokens_per_sequence"]
    ran: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    modes: dict[int, set[str]] = {}
    for (tokens, mode), count in load.batches(decoded).items():
        ran[tokens > largest][mode] += count
        modes.setdefault(tokens, set()).add(mode)
    record(
        edge=f"{GRAPHS['sequences']} sequences, graphs up to {largest} tokens",
        foretold=f"{FULL_BATCH} tokens run eager, {few} in a graph",
        measured=f"beyond {largest}: {dict(ran[True])}; up to it: {dict(ran[False])}",
    )
    assert ran[True].keys() == {"NONE"}
    assert modes[FULL_BATCH] == {"NONE"}
    assert "FULL" in modes[few]


def test_requests_under_load_end_as_they_should(soaked: Soaked, record: Record) -> None:
    done = soaked.load.done
    record(edge="requests under load", foretold="answered, aborted, or refused with 4xx",
           measured=", ".join(f"{count} {name}" for name, count in sorted(done.items())),
           seconds=SOAK["seconds"], clients=SOAK["clients"])  # fmt: skip
    assert not soaked.load.faults, soaked.load.faults[: load.FAULTS]
    assert done.keys() == {kind.__name__ for kind in load.KINDS}


def test_nobody_is_served_after_load(
    soaked: Soaked, served: tuple[Server, Started], record: Record
) -> None:
    """Whoever went has no place any more, neither running nor waiting."""
    counters = load.counters(served[0])
    record(counters=counters)
    assert not any(counters.values()), counters


def test_answers_are_the_same_after_load(soaked: Soaked, margin: Margin) -> None:
    """Ties within rounding may fall either way."""
    shifts = []
    for (token, value), (later, again) in zip(*soaked.answers, strict=True):
        shifts.append(abs(value - again))
        assert token == later or shifts[-1] <= measured.SHIFT
    margin("log probability", max(shifts), measured.SHIFT)


def test_memory_does_not_grow_under_load(soaked: Soaked, margin: Margin, record: Record) -> None:
    """GPUs, and anonymous memory of the processes; bounds are in rows.toml."""
    record(gpu_mib=soaked.gpu_mib, host_mib=soaked.host_mib)
    grown = max(after - before for before, after in zip(*soaked.gpu_mib, strict=True))
    margin("GPU, MiB", grown, SOAK["growth"]["gpu"])
    margin("host, MiB", soaked.host_mib[1] - soaked.host_mib[0], SOAK["growth"]["host"])


def test_log_has_no_error_under_load(soaked: Soaked, record: Record) -> None:
    found = load.errors(soaked.log)
    record(errors=len(found))
    assert not found, found[: load.FAULTS]


def test_killed_worker_ends_every_pending_request(
    served: tuple[Server, Started], record: Record
) -> None:
    """With an error, not by waiting; and the server with its reason. The last test of it."""
    server, process = served[0], served[0].process
    pid, count = measured.workers(server.log.read_text(errors="replace"))[-1], SOAK["pending"]
    assert os.getsid(pid) == process.pid, "not a process of this server"
    with ThreadPoolExecutor(count) as pool:
        streamed = [number % 2 == 0 for number in range(count)]
        pending = [pool.submit(load.pend, server, one, measured.ENDED_S) for one in streamed]
        end = time.monotonic() + HELD_S
        while load.counters(server)[load.RUNNING] < count:
            assert time.monotonic() < end, f"{count} requests do not run after {HELD_S} s"
            time.sleep(measured.POLL_S)
        begin = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        ends = Counter(future.result() for future in pending)
    clients_s = round(time.monotonic() - begin, 1)
    record(edge="a worker is killed under load", foretold="every pending client gets an error",
           measured=", ".join(f"{number} {text}" for text, number in sorted(ends.items())),
           clients_s=clients_s)  # fmt: skip
    assert not {"hangs", "answered"} & ends.keys(), dict(ends)
    try:
        process.wait(measured.ENDED_S)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the server still runs {measured.ENDED_S} s after its worker died")
    record(ended_s=round(time.monotonic() - begin, 1))
    assert "died unexpectedly" in server.log.read_text(errors="replace")


def _outcome(start: Started, says: str) -> str:
    """What a start ended in, in vLLM's words where they are those that were expected."""
    if start.serves:
        return "it serves"
    return f"refused: {says}" if says in start.log else "refused, in other words"
