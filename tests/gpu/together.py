"""Engines and servers that tests read: begun when the tests are collected, the longest first.

Each takes most of a minute to start and little of the GPU, so that many run at a time, and tests
wait for what they read. With cold caches one of those that compile the same kernels goes ahead.
"""

from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.gpu.harness import limits, processes

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = "VLLM_FORGE_GPU_FOLDER"
AT_A_TIME = max(2, 3 * (os.cpu_count() or 4) // 4)  # starts are busy, what runs waits for the GPU


@dataclass(frozen=True)
class Job:
    """See ``Together.add``."""

    name: str
    seconds: float
    call: Callable[[], Any]
    group: str
    kernels: str


class Together:
    """Jobs by name; each is begun at most once, and ``say`` hears of each that is done."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._jobs: dict[str, Job] = {}
        self._futures: dict[str, Future[Any]] = {}
        self._pool = ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="together")
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def work(self) -> Path:
        """A folder for what jobs write; it goes at the end."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="forge-together-")
        return Path(self._folder.name)

    @property
    def logs(self) -> Path:
        """Where logs of starts go: the receipt takes its configurations from them."""
        folder = Path(os.environ.get(FOLDER) or self.work) / "boot"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def add(
        self, name: str, seconds: float, call: Callable[[], Any], group: str = "",
        kernels: str = "",
    ) -> None:  # fmt: skip
        """Have a job run; about how long it takes decides when it begins.

        Tests that read jobs of a ``group`` have it as their ``xdist_group``. Jobs with the same
        ``kernels`` compile the same ones.
        """
        self._jobs.setdefault(name, Job(name, seconds, call, group, kernels))

    def start(self, group: str | None = None) -> None:
        """Begin all, or all of a group, the longest first.

        With cold caches the longest of those with the same kernels begins before the others, which
        wait until it is done, or for ``limits.LEAD_S``.
        """

        def run(job: Job, leader: Future[Any] | None) -> Any:
            if leader is not None:
                wait([leader], limits.LEAD_S)
            begun = time.monotonic()
            try:
                return job.call()
            finally:
                self._say(f"{job.name} is done: {time.monotonic() - begun:.0f} s")

        jobs = [
            job
            for job in sorted(self._jobs.values(), key=lambda job: -job.seconds)
            if group in {None, job.group} and job.name not in self._futures
        ]
        leaders: dict[str, Job] = {}
        if limits.cold():
            for job in jobs:
                leaders.setdefault(job.kernels or job.name, job)
            # Those that wait have a thread: what they wait for must have one before.
            jobs.sort(key=lambda job: job not in leaders.values())
        for job in jobs:
            leader = leaders.get(job.kernels, job)
            ahead = None if leader is job else self._futures[leader.name]
            self._futures[job.name] = self._pool.submit(run, job, ahead)

    def result(self, name: str) -> Any:
        """Wait for a job; the first that is asked for begins all of its group.

        Raises:
            KeyError: it was not added.
            Exception: what it raised.
        """
        self.start(self._jobs[name].group)
        return self._futures[name].result()

    def end(self) -> None:
        """End what runs, and begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        processes.end_all()
        self._pool.shutdown()
        if self._folder is not None:
            self._folder.cleanup()
