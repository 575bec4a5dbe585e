"""What is concluded from a server's answers, apart from the tests: it is tested without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.gpu.harness.corruption import corrupted, impossible
from tests.gpu.models import exact_moe
from tests.gpu.models.known_answers import Answer, mid_decode, report
from tests.gpu.race_server.arms import PLANTED, Asked, Scores
from tests.gpu.reference.power import excluded, exclusion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.gpu.conftest import Margin, Record


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """On the known answers of one server.

    Attributes:
        wrong: answers with a wrong token, by concurrency.
        tokens: tokens that were computed from right ones, by concurrency.
        prefills: long prompts that arrived while others decoded, by concurrency above 1.
        words: the wrong answers, one sentence each.
    """

    wrong: dict[int, int]
    tokens: dict[int, int]
    prefills: dict[int, int]
    words: list[str]

    @property
    def rate(self) -> float:
        """The rate of wrong tokens above which a clean run would have shown one."""
        return excluded(sum(self.tokens.values()))

    def record(self) -> dict[str, Any]:
        """As JSON."""
        clean = not any(self.wrong.values())
        return {
            "wrong_answers": self.wrong,
            "wrong": self.words,
            "tokens": self.tokens,
            "prefills_mid_decode": self.prefills,
            "exclusion": exclusion(sum(self.tokens.values())) if clean else "",
        }


def require_known(asked: Asked, rate: float, margin: Margin, record: Record) -> Verdict:
    """Every token that an arm answered must be the known one, of enough to exclude ``rate``."""
    verdict = judge(asked.answers)
    record(seconds=asked.seconds, **verdict.record())
    assert not verdict.words, "; ".join(verdict.words)
    margin("wrong answers", sum(verdict.wrong.values()), 0)
    margin("rate that is not excluded", verdict.rate, rate)
    return verdict


def judge(answers: Sequence[Answer]) -> Verdict:
    """The verdict on all answers of a server."""
    levels: dict[int, list[Answer]] = {}
    for answer in answers:
        levels.setdefault(answer.concurrency, []).append(answer)
    return Verdict(
        wrong={
            level: sum(a.first_wrong is not None for a in rows) for level, rows in levels.items()
        },
        tokens={level: sum(a.checked for a in rows) for level, rows in levels.items()},
        prefills={level: mid_decode(rows) for level, rows in levels.items() if level > 1},
        words=report(answers),
    )


def is_clean(scored: Sequence[Scores]) -> bool:
    """Whether scoring again finds no token of these sequences impossible."""
    return bool(scored) and not any(impossible(*scores) for scores in scored)


def finds_planted(planted: Scores) -> bool:
    """Whether scoring again calls a spoilt sequence corrupted, from the right token on."""
    places = impossible(*planted)
    return corrupted(places) and places[0] == PLANTED - 1  # the first token has no score


def blames(expert: int, answers: Sequence[Answer]) -> bool:
    """Whether each answer goes wrong, and first where its token meets this expert of layer 0."""
    return all(
        (place := answer.first_wrong) is not None
        and expert in exact_moe.chosen(0, answer.came[place - 1] if place else answer.prompt[-1])
        for answer in answers
    )
