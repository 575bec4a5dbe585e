"""Requests whose answers are known, sent together: which tokens are wrong, and what that excludes.

At concurrency c, c clients decode sequences of staggered lengths, one after the other; while they
do, long prompts arrive, so that prefills share steps with decodes. A model that computes its
tokens exactly has one right answer whatever it shared a batch with, so that the gate is on tokens
and has no tolerance.
"""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SEED = 20260524
SHORT = (2, 64)  # tokens of a prompt: with one token, a prefill would be like a decode
LONG = 1536
LENGTHS = (LONG, 2048, 8192, 32768)  # of long prompts, by turns; up to 255 more each
LONG_ANSWER = 8
ANSWER = (48, 400)
Ask: TypeAlias = "Callable[[Sequence[int], int], list[int]]"
Orbit: TypeAlias = "Callable[[int, int], list[int]]"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back of one request.

    Attributes:
        concurrency: clients at that time.
        request: name, unique at that concurrency.
        wanted: the known answer.
        began, ended: in seconds of a clock of its own.
    """

    concurrency: int
    request: str
    prompt: tuple[int, ...]
    wanted: tuple[int, ...]
    came: tuple[int, ...]
    began: float
    ended: float

    @property
    def first_wrong(self) -> int | None:
        """Position of the first wrong token; what follows one is wrong because of it."""
        for place, (wanted, came) in enumerate(zip(self.wanted, self.came, strict=False)):
            if wanted != came:
                return place
        return None if len(self.wanted) == len(self.came) else min(len(self.wanted), len(self.came))

    @property
    def checked(self) -> int:
        """Tokens that were computed from right ones, and so say something."""
        place = self.first_wrong
        return len(self.wanted) if place is None else min(place + 1, len(self.wanted))


def ask_together(
    ask: Ask, orbit: Orbit, concurrency: int, tokens: int, *, long_prompts: bool
) -> list[Answer]:
    """Send the load of one concurrency and return all answers, long prompts' among them.

    Args:
        ask: sends one request and returns its tokens.
        orbit: the tokens that follow a token.
        concurrency: clients that decode.
        tokens: each client decodes about so many.
        long_prompts: whether long ones arrive, one after the other, until all clients are done and
            there was one of each length.
    """
    done = threading.Event()

    def send(request: str, first: int, length: int, count: int) -> Answer:
        prompt = (first, *orbit(first, length - 1))
        began = time.monotonic()
        came = ask(prompt, count)
        return Answer(
            concurrency=concurrency, request=request, prompt=prompt, came=tuple(came),
            wanted=tuple(orbit(prompt[-1], count)), began=began, ended=time.monotonic(),
        )  # fmt: skip

    def client(number: int) -> list[Answer]:
        return [send(*row) for row in _requests(number, concurrency, tokens, orbit)]

    def arrivals() -> Iterator[Answer]:
        source = random.Random(f"{SEED} long {concurrency}")  # noqa: S311 - not a secret
        number = 0
        while number < len(LENGTHS) or not done.is_set():
            first = orbit(1, source.randrange(1, 500))[-1]
            length = LENGTHS[number % len(LENGTHS)] + source.randrange(256)
            yield send(f"long {number}", first, length, LONG_ANSWER)
            number += 1

    with ThreadPoolExecutor(concurrency + 1) as pool:
        clients = [pool.submit(client, number) for number in range(concurrency)]
        longs = pool.submit(lambda: list(arrivals())) if long_prompts else None
        try:
            answers = [answer for future in clients for answer in future.result()]
        finally:
            done.set()
        return answers + (longs.result() if longs is not None else [])


def mid_decode(answers: Sequence[Answer]) -> int:
    """How many long prompts arrived while a client was waiting for its tokens."""
    longs = [answer for answer in answers if len(answer.prompt) >= LONG]
    shorts = [answer for answer in answers if len(answer.prompt) < LONG]
    return sum(any(one.began < long.began < one.ended for one in shorts) for long in longs)


def report(answers: Sequence[Answer], most: int = 8) -> list[str]:
    """The wrong answers in words: where, and what came instead."""
    rows = []
    for answer in answers:
        place = answer.first_wrong
        if place is None:
            continue
        wanted, came = (
            str(tokens[place]) if place < len(tokens) else "nothing"
            for tokens in (answer.wanted, answer.came)
        )
        rows.append(
            f"concurrency {answer.concurrency}, request {answer.request}, position {place} of "
            f"{len(answer.wanted)}: token {wanted} was due, {came} came"
        )
    return rows[:most] + ([f"and {len(rows) - most} more"] if len(rows) > most else [])


def _requests(
    number: int, concurrency: int, tokens: int, orbit: Orbit
) -> Iterator[tuple[str, int, int, int]]:
    """Name, first token, length of the prompt and of the answer, of each request of a client."""
    source = random.Random(f"{SEED} {concurrency} {number}")  # noqa: S311 - not a secret
    part = 0
    while tokens > 0:
        count = min(tokens, source.randint(*ANSWER))
        first = orbit(1, source.randrange(1, 500))[-1]
        yield f"{number}.{part}", first, source.randint(*SHORT), count
        tokens, part = tokens - count, part + 1
