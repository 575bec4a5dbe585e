"""Kernels of a server's log, and what nvidia-smi says of the GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.gpu.harness.bootlog import parse
from vllm_forge.bench.hardware import gpu_states, kernels_of, slowdowns
from vllm_forge.bench.results import GpuState
from vllm_forge.host import Reply

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LOGS = ("dsv4-mtp-h200", "dsv4-mtp", "glm4-moe-graphs-h200")
STATES = """0, 1980, 2619, 310.52, 45, 0x0000000000000004
1, 345, 2619, [N/A], 30, 0x0000000000000001
"""
SLOWED = "0, 0, 12, 3\n1, [N/A], 0, 0\n"


@dataclass
class StubProbe:
    """Replies by question; None: an old driver refuses a field."""

    states: str | None = STATES
    slowed: str | None = SLOWED
    argv: Sequence[str] = ()

    def ask(self, name: str, argv: Sequence[str]) -> Reply:
        self.argv = argv
        text = {"nvidia-smi-clocks": self.states, "nvidia-smi-slowed": self.slowed}[name]
        if text is None:
            return Reply(code=2, text='Field "clocks_event_reasons_counters" is not a valid field')
        return Reply(code=0, text=text)


@pytest.mark.parametrize("name", LOGS)
def test_kernels_are_those_that_gpu_tests_read(name: str, root: Path) -> None:
    path = root / f"tests/fixtures/bootlogs/{name}.txt"
    expected, kernels = parse(path.read_text()), kernels_of(path) or ()
    named = [row.partition(": ")[2] for row in (*expected.moe, *expected.linear)]
    for word in (*named, *expected.attention, expected.kv_cache, expected.indexer):
        assert word is None or any(word in text for text in kernels), word
    assert len(set(kernels)) == len(kernels) >= 2
    assert ("Graph capturing finished" in kernels) == expected.captured


def test_log_without_kernels_says_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"INFO [a.py:1] Using max model len 1024\n\xff\n")
    assert kernels_of(log) is None


def test_states_are_those_of_nvidia_smi() -> None:
    first, second = gpu_states(StubProbe())
    assert first == GpuState(index=0, sm_mhz=1980, memory_mhz=2619, watts=310.52, celsius=45,
                             reasons=4, slowed_us=15)  # fmt: skip
    assert (second.watts, second.reasons, second.slowed_us) == (None, 1, None)


@pytest.mark.parametrize("states", [None, "", "No devices were found", "x, 1, 2, 3, 4, 5", "0, 1"])
def test_host_that_does_not_say_has_no_states(states: str | None) -> None:
    assert gpu_states(StubProbe(states)) == ()


@pytest.mark.parametrize(("visible", "options"), [("1,3", ["-i", "1,3"]), ("", [])])
def test_gpus_of_others_are_not_asked(
    visible: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    probe = StubProbe()
    gpu_states(probe)
    assert list(probe.argv[3:]) == options


def test_older_driver_counts_no_slowdowns() -> None:
    assert {gpu.slowed_us for gpu in gpu_states(StubProbe(slowed=None))} == {None}


def test_idle_and_capped_gpus_are_not_slowed_down() -> None:
    states = gpu_states(StubProbe())
    assert slowdowns(states, states) == []
    later = gpu_states(StubProbe(states=STATES.replace("004", "0A4"), slowed="0, 0, 12, 4"))
    assert slowdowns(states, later) == [
        "GPU 0 was slowed down: SW thermal slowdown, HW power brake, for 1 us"
    ]
