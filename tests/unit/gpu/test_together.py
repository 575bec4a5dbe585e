"""Jobs of the GPU suite: the longest first, each once, and none outlives the run."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.gpu import together
from tests.gpu.harness import limits, processes
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


@pytest.mark.parametrize(("cold", "order"), [("1", "acbd"), ("0", "abcd")])
def test_with_cold_caches_one_compiles_kernels_before_the_others_of_it(
    one: Together, monkeypatch: pytest.MonkeyPatch, cold: str, order: str
) -> None:
    monkeypatch.setenv(limits.COLD, cold)
    begun: list[str] = []
    for name, kernels in (("a", "race"), ("b", "race"), ("c", ""), ("d", "race")):
        one.add(name, ord("z") - ord(name), partial(begun.append, name), kernels=kernels)
    one.result("d")
    one.end()
    assert "".join(begun) == order


def test_those_that_wait_do_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch, said: list[str], tmp_path: Path
) -> None:
    """The first may hang, or fail: then the others compile for themselves."""
    monkeypatch.setattr(together, "AT_A_TIME", 2)
    monkeypatch.setattr(limits, "LEAD_S", 0.3)
    monkeypatch.setenv(limits.COLD, "1")
    monkeypatch.setenv(together.FOLDER, str(tmp_path))
    jobs, follows = Together(said.append), threading.Event()
    jobs.add("leads", 9, lambda: follows.wait(30), kernels="race")
    jobs.add("follows", 1, follows.set, kernels="race")
    begun = time.monotonic()
    jobs.result("follows")
    assert time.monotonic() - begun >= 0.3
    assert jobs.result("leads")
    jobs.end()


def test_logs_go_where_the_runner_takes_them_from(one: Together, tmp_path: Path) -> None:
    assert one.logs == tmp_path / "boot"
