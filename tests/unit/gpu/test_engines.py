"""Engines of the MTP tests without a GPU: jobs run as on a host, and long prompts are compared."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.gpu.harness import device, limits, processes
from tests.gpu.mtp import engines
from tests.gpu.mtp.engines import EACH, ENGINES, LENGTHS, distances

REPO = Path(__file__).parents[3]
VLLM = """
from types import SimpleNamespace as Row
class SamplingParams:
    def __init__(self, **given): self.given = given
class LLM:
    def __init__(self, **given):
        print("given", given)
    def generate(self, prompts, sampling, use_tqdm):
        rows = {token: Row(logprob=-token) for token in range(sampling.given["logprobs"] or 0)}
        tokens = [1] * sampling.given["max_tokens"]
        return [Row(outputs=[Row(token_ids=tokens, logprobs=[rows])], num_cached_tokens=256)
                for _ in prompts]
    def get_metrics(self): return []
    def collective_rpc(self, call): return [{"bfloat16": 2}]
"""


@pytest.fixture(autouse=True)
def _vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that the runner sets, and a stand-in for vLLM."""
    (tmp_path / "vllm.py").write_text(VLLM)
    monkeypatch.setenv("PYTHONPATH", f"{REPO / 'src'}:{tmp_path}")


def test_a_job_runs_where_only_the_runners_paths_are_known(tmp_path: Path) -> None:
    """It imports the suite, whose root no variable names."""
    found = engines.run("plain", tmp_path, tmp_path)
    assert not found.error, found.error
    assert found.tokens == [[1] * engines.COUNT] * engines.REQUESTS
    assert "'enable_prefix_caching': False" in found.log
    assert found.reading is None


def test_an_engine_on_several_gpus_has_all_of_the_tiers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(device.VISIBLE, "3,1")
    monkeypatch.setenv(device.RANKS, "2")
    monkeypatch.setattr(engines, "model", lambda *_: tmp_path)
    found = engines.run("dsv4-parallel", tmp_path, tmp_path)
    assert "'tensor_parallel_size': 2" in found.log
    assert found.draft_dtypes == {"bfloat16": 2}


def test_long_prompts_are_asked_whole_and_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "model", lambda *_: tmp_path)
    whole, chunked = ENGINES["dsv4-whole"], ENGINES["dsv4-chunked"]
    assert chunked.prompts == 2 * whole.prompts
    assert [len(prompt) for prompt in whole.prompts] == sorted(LENGTHS * EACH)
    assert len({prompt[-1] for prompt in whole.prompts}) == 1
    assert len({prompt[-2] for prompt in whole.prompts}) > EACH
    assert max(LENGTHS) + whole.count < whole.more["max_num_batched_tokens"]
    found = engines.run("dsv4-chunked", tmp_path, tmp_path)
    assert found.logprobs[-1] == [-token for token in range(engines.VOCABULARY)]
    assert found.cached == [256] * len(chunked.prompts)


def test_a_prefill_that_loses_its_beginning_is_another_prompt() -> None:
    source = random.Random(1)  # noqa: S311 - not a secret

    def rows(size: float) -> list[list[float]]:
        return [[source.gauss(0, size) for _ in range(64)] for _ in range(EACH)]

    whole, noise = rows(1.0), rows(0.02)
    near = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(whole, noise, strict=True)]
    itself, other = distances(whole, near)
    assert 0 < itself < 0.05 * other
    one_lost = [*near[:-1], rows(1.0)[0]]  # a near-tie in routing: the median does not see it
    assert distances(whole, one_lost)[0] < 0.05 * other
    assert distances(whole, rows(1.0))[0] > 0.5 * other


def test_a_missing_checkpoint_is_made_by_a_command_that_exists() -> None:
    assert "checkpoint fixtures card DIR" in engines.missing("dsv4")


class TestProcesses:
    @pytest.fixture(autouse=True)
    def _own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processes, "_ENDED", threading.Event())
        monkeypatch.setattr(processes, "_GROUPS", set())

    def test_one_that_takes_too_long_is_ended_with_its_children(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        processes.run(["sh", "-c", "sleep 600 & echo $!; wait"], log, {}, limits.Limit(seconds=1))
        child, words = log.read_text().splitlines()[0], log.read_text()
        assert "it was ended: it took too long" in words
        state = subprocess.run(["ps", "-o", "stat=", "-p", child], capture_output=True, text=True,
                               check=False).stdout  # fmt: skip
        assert state.strip() in {"", "Z"}
        assert not processes._GROUPS

    def test_the_end_ends_all_and_starts_nothing(self, tmp_path: Path) -> None:
        argv = [sys.executable, "-c", "import time; time.sleep(600)"]
        process = processes.start(argv, tmp_path / "log", {})
        processes.end_all()
        assert process.wait(timeout=20) == -signal.SIGKILL
        with pytest.raises(InterruptedError):
            processes.start(argv, tmp_path / "log", {})
