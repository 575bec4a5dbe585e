"""The artifact's size, served without its weights: what a start takes, how fast it is, how it ends.

Its experts and attention add zeros, so that a token follows from the one before it alone. Drafts
are accepted at random, at a declared rate. Nothing here says anything of the artifact's numerics,
acceptance or quality.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.gpu.rehearsal import measured
from tests.gpu.rehearsal.conftest import RATE
from tests.gpu.rehearsal.expected import Expected

if TYPE_CHECKING:
    from tests.gpu.conftest import Margin, Record
    from tests.gpu.rehearsal.conftest import Served

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.tier("rehearsal"),
    pytest.mark.xdist_group("rehearsal"),
    pytest.mark.value(1, 1),  # all alike: in this order, the server of a preset after the other
]
# What the log of every line has; the rest is recorded where it is said.
SAID = {"load_s", "weights_gib", "concurrency", "init_s"}
ASKED = 8  # prompts
# Of a log probability: logits of about 4 and streams in BF16, 86 mixes, eps of the final norm.
ROUNDED = 0.1
SIGMAS = 5


def test_start_is_measured(served: Served, record: Record) -> None:
    facts = measured.start_facts(served.log())
    before, after = served.compiled
    record(
        **served.facts, **facts, ready_s=served.ready_s, used_mib=measured.memory_used(),
        compiled={name: count - before.get(name, 0) for name, count in after.items()},
    )  # fmt: skip
    assert facts.keys() >= SAID


def test_answers_are_finite_and_the_same_twice(served: Served, record: Record) -> None:
    record(**served.facts)
    for prompt in measured.prompts(ASKED):
        measured.require_same_twice(served.server, prompt)
    if served.kind == "plain":  # with drafts, chance decides which are accepted
        prompt = measured.prompts(1)[0]
        _, first, again = (served.server.complete(prompt, measured.ANSWER) for _ in range(3))
        assert first == again
        assert len(set(first)) > 1


def test_next_token_follows_from_the_last_one_alone(
    served: Served, margin: Margin, record: Record
) -> None:
    """Of other prompts of other lengths; ties within rounding may fall either way."""
    record(**served.facts)
    others = measured.prompts(2 * ASKED, 32)[ASKED:]
    shifts = []
    for prompt, other in zip(measured.prompts(ASKED), others, strict=True):
        one, two = (measured.best(served.server, [*row, prompt[-1]]) for row in (prompt, other))
        shifts.append(abs(one[1] - two[1]))
        assert one[0] == two[0] or shifts[-1] <= measured.SHIFT
    margin("log probability", max(shifts), measured.SHIFT)


def test_answers_are_those_of_embedding_and_head(
    served: Served, margin: Margin, record: Record
) -> None:
    """The token that comes has the log probability that it should, and no other a higher one."""
    record(**served.facts)
    expected = Expected(served.server.model)
    shifts = []
    for prompt in measured.prompts(ASKED):
        token, value = measured.best(served.server, prompt)
        should = expected.log_probabilities(prompt[-1])
        assert token < len(should), f"token {token} has no row in the head"
        shifts += [abs(value - should[token]), should.max() - should[token]]
    margin("log probability", max(shifts), ROUNDED)


def test_first_token_is_measured(served: Served, record: Record) -> None:
    record(**served.facts, first_token_s=measured.first_token_s(served.server))


@pytest.mark.parametrize("together", [1, 4, 16])
def test_speed_is_measured(together: int, served: Served, record: Record) -> None:
    asked = {"prompt": measured.PROMPT, "answer": measured.ANSWER, "together": together}
    record(**served.facts, **asked, **measured.speed(served.server, together))


def test_drafts_are_accepted_at_the_declared_rate(served: Served, record: Record) -> None:
    reading = served.server.reading(0)
    if served.kind == "plain":
        record(**served.facts)
        assert reading is None
        return
    assert reading is not None
    rate = reading.per_position[0] / reading.drafts
    deviation = math.sqrt(RATE * (1 - RATE) / reading.drafts)
    record(**served.facts, declared=RATE, acceptance=rate, drafts=reading.drafts)
    assert abs(rate - RATE) <= SIGMAS * deviation


def test_client_that_vanishes_frees_its_place(served: Served, record: Record) -> None:
    measured.vanish(served.server)
    end = time.monotonic() + measured.FREED_S
    while measured.running(served.server):
        assert time.monotonic() < end, f"its request still runs after {measured.FREED_S} s"
        time.sleep(measured.POLL_S)
    record(**served.facts)
    assert len(served.server.complete(measured.prompts(1)[0], 2)) == 2


def test_killed_worker_ends_the_server_with_its_reason(served: Served, record: Record) -> None:
    """The last test of a server."""
    pid, process = measured.workers(served.log())[-1], served.server.process
    assert os.getsid(pid) == process.pid, "not a process of this server"
    begin = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    try:
        process.wait(measured.ENDED_S)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the server still runs {measured.ENDED_S} s after its worker died")
    record(**served.facts, ended_s=round(time.monotonic() - begin, 1), exit=process.returncode)
    assert "died unexpectedly" in served.log()
