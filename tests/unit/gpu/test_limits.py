"""Limits of the GPU suite: what had no time is undecided, what hangs or died is red."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu.harness import limits, plugin
from tests.gpu.harness.limits import NotStartedError
from tests.gpu.harness.run import verdict
from tests.gpu.harness.server import Server, ServerEndedError
from tests.gpu.mtp import engines
from tests.gpu.mtp.engines import ENGINES, Ran

if TYPE_CHECKING:
    from collections.abc import Callable

REPO = Path(__file__).parents[3]


@pytest.fixture
def run_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool, float], None]:
    """Be in a run with cold or warm caches, and so many seconds for starts."""

    def be(cold: bool, seconds: float) -> None:
        monkeypatch.setenv(limits.COLD, str(int(cold)))
        monkeypatch.setenv(limits.DEADLINE, str(time.time() + limits.RESERVE_S + seconds))

    return be


@pytest.mark.parametrize(
    ("cold", "left", "seconds", "why"),
    [
        (False, 600, 300, ""),
        (False, 100, 100, "the budget was over"),
        (True, 600, 600, "caches were cold"),
        (True, 100, 100, "caches were cold"),
        (True, -50, 1, "caches were cold"),
    ],
)
def test_a_start_has_its_limit_or_until_the_deadline(
    cold: bool, left: float, seconds: float, why: str, run_of: Callable[[bool, float], None]
) -> None:
    run_of(cold, left)
    limit = limits.limit("server")
    assert limit.seconds == pytest.approx(seconds, abs=5)
    assert limit.undecided == why


def test_what_shows_hangs_keeps_its_limit(run_of: Callable[[bool, float], None]) -> None:
    run_of(True, 600)
    assert {limits.limit(kind).seconds for kind in limits.FIXED} == {90, 200, 60}
    assert set(limits.WARM_S) >= limits.FIXED


BODY = """
import pytest
from tests.gpu.harness.limits import Limit
late = Limit(seconds=311, undecided="caches were cold")
@pytest.fixture(scope="module")
def server(): late.check("race-eager")
def test_first(server): ...
def test_second(server): ...
def test_engine(): late.check("dsv4")
def test_red(): Limit(seconds=1).check("dsv4"); assert 0, "hangs"
"""


def test_tests_of_what_had_no_time_say_so(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(BODY)
    results = tmp_path / "results.json"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.gpu.harness.plugin", "-q"],
        cwd=tmp_path, capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": str(REPO), plugin.RESULTS: str(results)},
    )  # fmt: skip
    rows = {name.partition("::")[2]: row for name, row in
            json.loads(results.read_text())["tests"].items()}  # fmt: skip
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "test_first": "not run", "test_second": "not run", "test_engine": "not run",
        "test_red": "failed",
    }  # fmt: skip
    assert rows["test_second"]["why"] == "race-eager did not start in 311 s; caches were cold"
    assert rows["test_engine"]["why"] == "dsv4 did not start in 311 s; caches were cold"
    del rows["test_red"]
    assert verdict({"tests": rows, "exit": 0}) == "undecided"


class TestStarts:
    """With a vLLM that never gets ready, or dies."""

    @pytest.fixture
    def vllm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        cli = tmp_path / "vllm" / "entrypoints" / "cli"
        cli.mkdir(parents=True)
        for folder in (cli, cli.parent):
            (folder / "__init__.py").touch()
        monkeypatch.setenv("PYTHONPATH", f"{REPO / 'src'}:{tmp_path}")

        def does(text: str) -> None:
            (cli.parents[1] / "__init__.py").write_text(text)
            (cli / "main.py").touch()

        return does

    def serve(self, folder: Path) -> None:
        with Server(model=folder, arguments=[], log=folder / "race-eager.log"):
            raise AssertionError("it answered")

    def test_a_cold_one_is_undecided(
        self, tmp_path: Path, vllm: Callable[[str], None], run_of: Callable[[bool, float], None]
    ) -> None:
        vllm("import time; time.sleep(600)")
        run_of(True, 1)
        with pytest.raises(NotStartedError, match=r"race-eager did not start in . s; caches were"):
            self.serve(tmp_path)
        run_of(True, 1)
        with pytest.raises(NotStartedError, match=r"plain did not start in . s; caches were cold"):
            engines.run("plain", tmp_path, tmp_path)

    def test_a_warm_one_hangs(
        self, tmp_path: Path, vllm: Callable[[str], None], run_of: Callable[[bool, float], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        vllm("import time; time.sleep(600)")
        monkeypatch.setattr(limits, "WARM_S", {"server": 1, "engine": 1})
        run_of(False, 600)
        with pytest.raises(ServerEndedError, match="no answer in 1 s"):
            self.serve(tmp_path)
        assert "it took too long" in engines.run("plain", tmp_path, tmp_path).error

    def test_one_that_died_is_red_at_once(
        self, tmp_path: Path, vllm: Callable[[str], None], run_of: Callable[[bool, float], None]
    ) -> None:
        vllm("raise SystemExit('no NVRTC')")
        run_of(True, 600)
        begun = time.monotonic()
        with pytest.raises(ServerEndedError, match="exit 1: no NVRTC"):
            self.serve(tmp_path)
        assert "no NVRTC" in engines.run("plain", tmp_path, tmp_path).error
        assert time.monotonic() - begun < 60


def test_answers_of_an_engine_that_died_are_its_error() -> None:
    dead = Ran(engine=ENGINES["dsv4-whole"], tokens=[], reading=None, log="", seconds={},
               error="no NVRTC")  # fmt: skip
    with pytest.raises(AssertionError, match="no NVRTC"):
        dead.require_answers()
