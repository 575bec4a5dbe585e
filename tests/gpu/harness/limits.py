"""How long tests wait for what they start: all limits of the suite, in seconds.

A start compiles kernels unless a green run of the tier left them in the caches: it may then take
until the deadline of the tier. What is not ready by then, or by the end of the budget, is
undecided. What takes longer than its limit with warm caches is red, and so is a process that died.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

DEADLINE = "VLLM_FORGE_GPU_DEADLINE"
COLD = "VLLM_FORGE_COLD"  # "1": no green run of the tier left its kernels in the caches
RESERVE_S = 30  # of the budget, for what is left to do
LONGEST_S = 4 * 3600  # of a run without a deadline
LEAD_S = 240  # for which a start waits for another that compiles the same kernels
# With warm caches.
WARM_S = {
    "engine": 420,
    "server": 300,
    "artifact": 3600,
    "shards": 240,
    "wheel kernels": 280,
    "red zones": 150,
    "sanitizer": 200,
    "control": 90,
    "broken build": 200,
    "blind sanitizer": 60,
}
# A hang is what these show: they end at their limit, and compile nothing of the caches.
FIXED = {"control", "broken build", "blind sanitizer"}


class NotStartedError(Exception):
    """Something was not ready in time, for a reason that is no fault of it: undecided."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """``undecided``: why it is no fault to take longer; empty where it is one."""

    seconds: float
    undecided: str = ""

    def check(self, name: str) -> None:
        """Call when the limit has passed.

        Raises:
            NotStartedError: this says nothing about what was started.
        """
        if self.undecided:
            raise NotStartedError(f"{name} did not start in {self.seconds:.0f} s; {self.undecided}")


def cold() -> bool:
    """Whether kernels are compiled in this run; the runner knows."""
    return os.environ.get(COLD) == "1"


def limit(kind: str) -> Limit:
    """Of what starts now."""
    most = WARM_S[kind]
    left = float(os.environ.get(DEADLINE, "inf")) - time.time() - RESERVE_S
    left = max(1.0, min(left, LONGEST_S))
    if cold() and kind not in FIXED:
        return Limit(seconds=left, undecided="caches were cold")
    if left < most:
        return Limit(seconds=left, undecided="the budget was over")
    return Limit(seconds=most)
