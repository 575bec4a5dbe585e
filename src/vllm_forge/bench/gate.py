"""pass, undecided or fail of a candidate against a reference, by the gates of matrix.toml."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeAlias, TypeVar

from vllm_forge.bench import statistics, validity
from vllm_forge.bench.errors import GateFailedError, GateUndecidedError, InvalidResultError
from vllm_forge.bench.results import Arm, Row
from vllm_forge.bench.statistics import ALPHA, Margin
from vllm_forge.matrix.model import Gate

LEAST_PROMPTS = 20  # below, the ratio estimator's t is not to be trusted
Key = TypeVar("Key", int, str)
Sums: TypeAlias = Counter[str | int]  # "drafted", "accepted", and accepted at each position


class Word(StrEnum):
    PASS = "pass"  # noqa: S105
    UNDECIDED = "undecided"
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A gate's verdict; ``test`` is None where nothing could be computed."""

    gate: str
    margin: float
    unit: str
    word: Word
    reason: str
    test: Margin | None = None

    def as_json(self) -> dict[str, Any]:
        row = {"gate": self.gate, "margin": self.margin, "unit": self.unit,
               "verdict": self.word, "why": self.reason}  # fmt: skip
        if self.test is None:
            return {**row, "difference": None, "interval": None}
        value, *interval = self.test.difference
        ps = {"p_loss_of_margin": self.test.passes, "p_loss_within_margin": self.test.fails}
        return {**row, **ps, "difference": value, "interval": interval, "units": self.test.units}


def gate(
    gates: Mapping[str, Gate], reference: Arm, candidate: Arm, repeat: Arm | None = None
) -> list[Outcome]:
    """An outcome for each gate that a result has data for; InvalidResultError.

    One for which another result has none is undecided.

    ``repeat``: the reference measured again, the noise floor of answers.
    """
    arms = [arm for arm in (reference, candidate, repeat) if arm is not None]
    validity.require_valid(*arms)
    validity.require_distinct(*arms)
    for arm in arms[1:]:
        validity.require_comparable(reference, arm)
    if repeat is not None:
        validity.require_same_server(reference, repeat)
    one_size = len({arm.result.server.gpus for arm in arms}) == 1
    outcomes = [
        _judge(name, row, reference, candidate, repeat)
        for name, row in gates.items()
        if any(_has_data(row, arm) for arm in arms) and not (one_size and row.per == "gpu")
    ]
    if not outcomes:
        what = "the results have data for none of the gates"
        where = f"{reference.path}, {candidate.path}"
        remedy = f"measure what they compare, or name another --gate than {', '.join(gates)}"
        raise InvalidResultError(what, where=where, remedy=remedy)
    return _corrected(outcomes)


def require_pass(outcomes: Iterable[Outcome]) -> None:
    """GateFailedError if one gate fails, else GateUndecidedError if one is undecided."""
    rows = list(outcomes)
    for word, error, remedy in (
        (Word.FAIL, GateFailedError, "find what the candidate lost, or keep the reference"),
        (Word.UNDECIDED, GateUndecidedError, "`bench plan` says how much data a margin needs"),
    ):
        if hit := [row for row in rows if row.word is word]:
            reasons = "; ".join(f"{row.gate} ({row.reason})" for row in hit)
            raise error(f"{word}: {reasons}", remedy=remedy)


def _has_data(row: Gate, arm: Arm) -> bool:
    if row.measure == "score":
        return any(row.score in answer.scores for answer in arm.rows)
    if row.measure == "acceptance":
        return any(answer.drafted for answer in arm.rows)
    if row.measure == "positions":
        return any(answer.positions for answer in arm.rows)
    return len(arm.result.starts) > 1 and all(start.window for start in arm.result.starts)


def _judge(name: str, row: Gate, reference: Arm, candidate: Arm, repeat: Arm | None) -> Outcome:
    outcome = Outcome(gate=name, margin=row.margin, unit=row.unit, word=Word.UNDECIDED, reason="")
    for arm in (reference, candidate):
        if not _has_data(row, arm):
            return replace(outcome, reason=f"arm {arm.result.arm} has no data for it")
    if row.measure == "score":
        return _answers(outcome, row.score or "", reference, candidate, repeat)
    if row.measure == "throughput":
        return _speed(outcome, row, reference, candidate, repeat)
    return _drafting(outcome, row, reference, candidate)


def _drafting(outcome: Outcome, row: Gate, reference: Arm, candidate: Arm) -> Outcome:
    """By prompts, and by pairs of starts: a restart may change all prompts alike."""
    arms = (candidate, reference)
    drafts = [_summed((answer.item, answer) for answer in arm.rows) for arm in arms]
    prompts = [item for item in drafts[0] if all(arm[item]["drafted"] for arm in drafts)]
    if len(prompts) < LEAST_PROMPTS:
        return replace(outcome, reason=f"{len(prompts)} prompts, {LEAST_PROMPTS} are needed")
    sums = [[arm[item] for item in prompts] for arm in drafts]
    by_start = [
        _summed((arm.result.starts[answer.start].order, answer) for answer in arm.rows)
        for arm in arms
    ]
    starts = [[one for _, one in sorted(arm.items()) if one["drafted"]] for arm in by_start]
    if len(starts[0]) != len(starts[1]) or len(starts[0]) < 2:  # noqa: PLR2004 - of a difference
        reason = "how much starts differ is unknown: two or more of each arm must draft"
        return replace(outcome, reason=reason)
    if row.measure == "positions":
        return _each_position(outcome, sums, starts)
    return _decided(outcome, _acceptance(sums, starts, row.margin, "accepted", 1), "prompts")


def _speed(
    outcome: Outcome, row: Gate, reference: Arm, candidate: Arm, repeat: Arm | None
) -> Outcome:
    """By pairs of starts; nothing is decided where the reference is not as fast as itself."""

    def rates(arm: Arm) -> list[float]:
        gpus = arm.result.server.gpus if row.per == "gpu" else 1
        return [rate / gpus for rate in arm.rates().values()]

    def test(arm: Arm) -> Margin:
        return statistics.speed(rates(arm), rates(reference), row.margin)

    outcome = _decided(outcome, test(candidate), "pairs of starts")
    if repeat is not None and _has_data(row, repeat):
        value, low, high = test(repeat).difference
        if abs(value) > row.margin and not low <= 0 <= high:
            return _doubted(outcome, f"the reference differs from itself by {100 * value:+.2f} %")
    return outcome


def _acceptance(
    sums: list[list[Sums]], starts: list[list[Sums]], margin: float, accepted: str | int, depth: int
) -> Margin:
    """Candidate and reference, by prompt and by start: ``accepted`` of a draft's ``depth``."""
    ours, theirs = ([(one[accepted], one["drafted"] / depth) for one in arm] for arm in sums)
    rates = [[one[accepted] / (one["drafted"] / depth) for one in arm] for arm in starts]
    differences = [a - b for a, b in zip(*rates, strict=True)]
    return statistics.steady(statistics.acceptance(ours, theirs, margin), differences, margin)


def _each_position(outcome: Outcome, sums: list[list[Sums]], starts: list[list[Sums]]) -> Outcome:
    """All must pass; one that fails is corrected for how many there are."""
    depths = {len(one) - 2 for arm in sums for one in arm}
    if len(depths) > 1:
        return replace(outcome, reason=f"drafts of {sorted(depths)} tokens")
    depth = depths.pop()
    tests = [_acceptance(sums, starts, outcome.margin, place, depth) for place in range(depth)]
    worst = max(tests, key=lambda test: test.passes)
    fails = min(1.0, len(tests) * min(test.fails for test in tests))
    values = ", ".join(f"{100 * test.difference.value:+.2f}" for test in tests)
    unit = f"prompts; by position {values} pp"
    return _decided(outcome, worst._replace(fails=fails), unit)


def _answers(
    outcome: Outcome, score: str, reference: Arm, candidate: Arm, repeat: Arm | None
) -> Outcome:
    """Pass also needs the noise floor, and truncated answers at their worst."""
    margin = outcome.margin
    unit = f"items{_lost(score, reference, candidate)}"
    outcome = _decided(outcome, _test(score, reference, candidate, margin), unit)
    if outcome.word is not Word.PASS:
        return outcome
    if repeat is None:
        return _doubted(outcome, "no noise floor: measure the reference again, --repeat")
    floor = _test(score, reference, repeat, margin)
    if floor.passes >= ALPHA:
        value = 100 * floor.difference.value
        return _doubted(outcome, f"the reference differs from itself by {value:.2f} pp")
    worst = _test(score, reference, candidate, margin, worst=True)
    if worst.passes >= ALPHA:
        value = 100 * worst.difference.value
        return _doubted(outcome, f"{value:.2f} pp if truncated answers are counted at their worst")
    return outcome


def _doubted(outcome: Outcome, reason: str) -> Outcome:
    return replace(outcome, word=Word.UNDECIDED, reason=f"{outcome.reason}; {reason}")


def _lost(score: str, reference: Arm, candidate: Arm) -> str:
    """How answers were lost: only their form is wrong (another scorer accepts them), or cut off."""
    right = {row.key for row in reference.rows if row.scores.get(score)}
    lost = [row for row in candidate.rows if row.key in right and not row.scores.get(score)]
    form = sum(any(row.scores.values()) for row in lost)
    cut = sum(row.finish == "length" for row in lost)
    return f"; lost {len(lost)}: {form} by form, {cut} truncated" if lost else ""


def _test(
    score: str, reference: Arm, candidate: Arm, margin: float, *, worst: bool = False
) -> Margin:
    """Paired by item: each answered once, or the mean of its answers; families are clusters."""
    ours = _means(candidate.rows, score, truncated=0.0 if worst else None)
    theirs = _means(reference.rows, score, truncated=1.0 if worst else None)
    families: defaultdict[str, list[float]] = defaultdict(list)
    for item, family in {row.item: row.family or row.item for row in candidate.rows}.items():
        families[family].append(ours[item] - theirs[item])
    means = [math.fsum(values) / len(values) for values in families.values()]
    if len(candidate.rows) == len(reference.rows) == len(families):  # each was answered once
        gained, lost = sum(mean > 0 for mean in means), sum(mean < 0 for mean in means)
        return statistics.paired_shares(gained, lost, len(means), margin)
    return statistics.clustered(means, [len(values) for values in families.values()], margin)


def _means(rows: Sequence[Row], score: str, *, truncated: float | None) -> dict[str, float]:
    """Share of right answers by item; ``truncated``: what is assumed of those, if anything."""
    answers: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        right = float(row.scores.get(score, False))
        assumed = truncated if row.finish == "length" else None
        answers[row.item].append(right if assumed is None else assumed)
    return {item: math.fsum(values) / len(values) for item, values in answers.items()}


def _summed(rows: Iterable[tuple[Key, Row]]) -> dict[Key, Sums]:
    sums: defaultdict[Key, Sums] = defaultdict(Counter)
    for key, row in rows:
        sums[key].update({"drafted": row.drafted, "accepted": row.accepted})
        sums[key].update(dict(enumerate(row.positions)))
    return sums


def _decided(outcome: Outcome, test: Margin, unit: str) -> Outcome:
    word = Word.UNDECIDED
    if test.passes < ALPHA:
        word = Word.PASS
    elif test.fails < ALPHA:
        word = Word.FAIL
    value, low, high = (100 * end for end in test.difference)
    reason = f"{value:+.2f} {outcome.unit} [{low:+.2f}, {high:+.2f}], {test.units} {unit}"
    return replace(outcome, word=word, test=test, reason=reason)


def _corrected(outcomes: list[Outcome]) -> list[Outcome]:
    """Correct fails after Holm: one of many gates fails by chance.

    Passes need no correction, because all gates must pass.
    """
    adjusted = statistics.holm([row.test.fails if row.test else 1.0 for row in outcomes])
    return [
        replace(row, word=Word.UNDECIDED) if row.word is Word.FAIL and p >= ALPHA else row
        for row, p in zip(outcomes, adjusted, strict=True)
    ]
