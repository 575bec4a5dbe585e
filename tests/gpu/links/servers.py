"""Servers whose ranks add up by NCCL alone, over each link."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tests.gpu.harness.device import parallel_variables
from tests.gpu.harness.server import Server
from tests.gpu.links.link import LINKS, NCCL_ALONE
from tests.gpu.models import exact_moe
from tests.gpu.models.exact_checkpoint import INT4, NVFP4
from tests.gpu.models.known_answers import ask_together
from tests.gpu.race_server.arms import PARALLEL_TOKENS, Arm, Asked, Fleet

LEVELS = (1, 4, 16)


@dataclass(frozen=True, kw_only=True)
class LinkArm(Arm):
    """A server on all GPUs of the tier; ``link``: name of what is between them."""

    link: str

    @property
    def arguments(self) -> list[str]:
        """Of ``vllm serve``."""
        return [*super().arguments, NCCL_ALONE]


ARMS = {
    f"{link}-{name}": LinkArm(
        link=link, scheme=scheme, graphs=full, speculate=full, parallel=True, levels=LEVELS
    )
    for link in LINKS
    for name, scheme, full in (
        ("nvfp4-graphs-speculation", NVFP4, True), ("int4-eager", INT4, False),
    )
}  # fmt: skip


class LinkFleet(Fleet):
    """Runs arms, each in a thread of its own; they are asked by turns."""

    def run(self, name: str) -> Asked:
        """Start an arm's server, ask it everything, and end it; raises what ``Server`` does."""
        arm = ARMS[name]
        server = Server(
            model=self._model(arm),
            arguments=arm.arguments,
            log=self.logs / f"link-{name}.log",
            variables={**parallel_variables(), **LINKS[arm.link].variables},
        )
        begun = time.monotonic()
        with server:
            ready = time.monotonic() - begun
            with self._turn:
                return ask(server, arm, ready)


def ask(server: Server, arm: Arm, ready: float) -> Asked:
    """Ask a server that runs everything, ``ready`` seconds after its start."""
    begun = time.monotonic()
    answers = [
        answer
        for level in arm.levels
        for answer in ask_together(
            server.complete, exact_moe.orbit, level, PARALLEL_TOKENS, long_prompts=level > 1
        )
    ]
    generated = sum(len(answer.came) for answer in answers)
    reading = server.reading(generated) if arm.speculate else None
    return Asked(
        answers=answers, scored=[], planted=([], []), reading=reading,
        seconds={"ready": round(ready, 1), "asked": round(time.monotonic() - begun, 1)},
        log=server.log.read_text(errors="replace"),
    )  # fmt: skip
