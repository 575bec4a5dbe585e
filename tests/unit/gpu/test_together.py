"""Jobs of the GPU suite: the longest first, each once, and none outlives the run."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.gpu import together
from tests.gpu.harness import processes
from tests.gpu.together import Together

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def one(said: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Together:
    """With one worker, so that the order is seen."""
    monkeypatch.setattr(together, "AT_A_TIME", 1)
    monkeypatch.setenv(together.FOLDER, str(tmp_path))
    return Together(said.append)


@pytest.fixture(autouse=True)
def _no_process_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends the processes of a run would end those of later tests as well."""
    monkeypatch.setattr(processes, "end_all", lambda: None)


def test_longest_begins_first_and_each_is_reported(one: Together, said: list[str]) -> None:
    begun: list[str] = []

    def begin(name: str) -> str:
        begun.append(name)
        return name

    for name, seconds in (("short", 1.0), ("long", 9.0), ("middle", 5.0)):
        one.add(name, seconds, partial(begin, name))
    assert one.result("short") == "short"
    assert begun == ["long", "middle", "short"]
    one.end()
    assert [row.partition(" ")[0] for row in said] == begun


def test_a_job_runs_once(one: Together) -> None:
    begun: list[int] = []
    one.add("it", 1, lambda: begun.append(1))
    one.add("it", 1, lambda: begun.append(2))
    one.start()
    one.result("it")
    one.result("it")
    one.end()
    assert begun == [1]


def test_what_a_job_raised_is_raised(one: Together) -> None:
    one.add("bad", 1, lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        one.result("bad")
    with pytest.raises(KeyError):
        one.result("never added")
    one.end()


def test_the_end_ends_what_runs_and_begins_nothing_more(
    one: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, ended = threading.Event(), threading.Event()
    begun: list[str] = []

    def waits() -> None:
        running.set()
        ended.wait()

    one.add("waits", 9, waits)
    one.add("later", 1, lambda: begun.append("later"))
    monkeypatch.setattr(processes, "end_all", ended.set)
    one.start()
    running.wait()
    work = one.work
    one.end()
    assert begun == []
    assert not work.exists()


def test_a_worker_begins_only_the_group_that_its_tests_read(one: Together) -> None:
    """With -n, each group's tests are on one worker: else every worker would begin all servers."""
    begun: list[str] = []
    for name, group in (("a", "mtp"), ("b", "race"), ("c", "mtp")):
        one.add(name, 1, partial(begun.append, name), group)
    one.result("c")
    one.end()
    assert sorted(begun) == ["a", "c"]


def test_logs_go_where_the_runner_takes_them_from(one: Together, tmp_path: Path) -> None:
    assert one.logs == tmp_path / "boot"
