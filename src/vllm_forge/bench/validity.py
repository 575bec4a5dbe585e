"""Reasons to refuse a result, or a comparison: each would make a verdict on it worthless."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_forge.bench.errors import InvalidResultError
from vllm_forge.bench.hardware import slowdowns
from vllm_forge.bench.results import MOST_STARTS, Arm, Row, Start, Window

HEADROOM = 10.0  # a slower client would be what is measured
CLOCK, IDLE_S = 1.05, 1.0  # what clocks that are read one by one may differ by; between answers
SHOWN = 3


def require_valid(*arms: Arm) -> None:
    """InvalidResultError for the first arm with faults, with all of them."""
    for arm in arms:
        if found := list(faults(arm)):
            raise InvalidResultError(
                "invalid result: " + "; ".join(found),
                where=str(arm.path),
                remedy="repeat the measurement without these faults",
            )


def require_comparable(reference: Arm, candidate: Arm) -> None:
    """InvalidResultError unless the arms differ only in what they serve."""
    if found := list(differences(reference, candidate)):
        raise InvalidResultError(
            "arms cannot be compared: " + "; ".join(found),
            where=f"{reference.path}, {candidate.path}",
            remedy="measure both arms in one session, with the same conditions",
        )


def faults(arm: Arm) -> Iterator[str]:
    """What is wrong with one arm."""
    yield from _answer_faults(arm)
    keys = {index: Counter((row.item, row.repeat) for row in arm.of_start(index))
            for index in range(len(arm.result.starts))}  # fmt: skip
    if any(count > 1 for counter in keys.values() for count in counter.values()):
        yield "an item was answered twice in one start"
    if any(set(counter) != set(keys[0]) for counter in keys.values()):
        yield "the starts answered different items"
    orders = Counter(start.order for start in arm.result.starts)
    yield from (f"two starts have the order {order}" for order, n in orders.items() if n > 1)
    copies = Counter(frozenset(map(_measured, arm.of_start(index)))
                     for index, start in enumerate(arm.result.starts) if start.window)  # fmt: skip
    if any(count > 1 for count in copies.values()):
        yield "two starts have the same answers and times: one is a copy"
    if len(sets := {start.kernels for start in arm.result.starts} - {None}) > 1:
        first, second, *_ = sorted(map(_names, sets))
        yield f"its starts ran different kernels: {_unequal(first, second)}"
    for index, start in enumerate(arm.result.starts):
        rows = arm.of_start(index)
        if start.cached == 0 and start.compiled:
            yield f"start {index}: the caches were cold: it compiled {start.compiled} files"
        yield from (f"start {index}: {text}" for text in _start_faults(start, rows, arm))


def _measured(row: Row) -> tuple[object, ...]:
    return (
        row.item,
        row.repeat,
        row.seconds,
        row.ttft,
        row.output_tokens,
        row.drafted,
        row.accepted,
    )


def _answer_faults(arm: Arm) -> Iterator[str]:
    conditions = arm.result.conditions
    if failed := [row.item for row in arm.rows if row.finish == "error"]:
        yield f"{len(failed)} failed requests ({_some(failed)})"
    if conditions.ignore_eos:
        short = [
            row.item
            for row in arm.rows
            if row.finish != "error" and row.output_tokens < conditions.max_tokens
        ]
        if short:
            yield f"{len(short)} answers below {conditions.max_tokens} tokens ({_some(short)})"
    else:
        cut = [row for row in arm.rows if row.finish == "length"]
        early = [row.item for row in cut if row.output_tokens < conditions.max_tokens]
        if early:  # by the server's --max-model-len
            yield f"{len(early)} answers cut below {conditions.max_tokens} tokens ({_some(early)})"
    right = [row.item for row in arm.rows if row.finish == "length" and any(row.scores.values())]
    if right and not conditions.ignore_eos:
        yield f"{len(right)} truncated answers scored as right ({_some(right)})"
    for score in sorted({name for row in arm.rows for name in row.scores}):
        bare = [row.item for row in arm.rows if row.finish == "stop" and score not in row.scores]
        if bare:
            yield f"{len(bare)} answers without the score {score} ({_some(bare)})"


def _start_faults(start: Start, rows: list[Row], arm: Arm) -> Iterator[str]:
    if start.window is None:
        return
    if not any(row.output_tokens for row in rows):
        yield "no tokens"
    window = start.window
    yield from _time_faults(window.seconds, rows, arm.result.conditions.concurrency)
    before, after = window.before, window.after
    change = after.since(before)
    back = [name for name, count in change.items() if _least(count) < 0]
    if back:
        yield f"counters went backwards: {', '.join(back)}"
    if not arm.result.conditions.prefix_cache and after.prefix_hits > before.prefix_hits:
        yield f"{change['prefix_hits']} prefix-cache hits, which the conditions do not declare"
    if files := window.new_files:
        yield f"{len(files)} files were compiled in the window ({_some(files)})"
    yield from slowdowns(window.gpus_before, window.gpus_after)
    if window.headroom < HEADROOM:
        yield f"client headroom {window.headroom:.1f} is below {HEADROOM:g}"
    if not back and rows:
        yield from _draft_faults(window, change, rows)


def _time_faults(seconds: float, rows: list[Row], slots: int) -> Iterator[str]:
    """Answers against their window: the next one is asked as soon as a slot is free."""
    longest, total = max((row.seconds for row in rows), default=0), sum(row.seconds for row in rows)
    least, most = max(longest, total / slots), total / slots + longest
    if not least / CLOCK <= seconds <= most * CLOCK + IDLE_S:
        yield (f"answers of {total:.6g} s, {slots} at a time, need {least:.6g} to {most:.6g} s: "
               f"they cannot be those of {seconds:.6g} s")  # fmt: skip


def _draft_faults(window: Window, change: Mapping[str, Any], rows: list[Row]) -> Iterator[str]:
    """Counters against tokens, and against what is predicted of a model that is known exactly."""
    tokens = sum(row.output_tokens for row in rows)
    if change["tokens"] != tokens and not any(row.finish == "error" for row in rows):
        yield f"{tokens} tokens were answered, {change['tokens']} counted: other requests ran"
    drafts, counted = change["drafts"], change["accepted"]
    accepted, drafted = sum(row.accepted for row in rows), sum(row.drafted for row in rows)
    # The last draft of an answer may be cut off at its end.
    depth = change["draft_tokens"] / drafts if drafts else 0
    most = accepted + depth * len(rows)
    if not accepted <= counted <= most or drafted > change["draft_tokens"]:
        yield f"tokens explain {accepted} to {most:.0f} accepted drafts, counted are {counted}"
    for place, count in enumerate(change["per_position"]):
        own = sum(row.positions[place] for row in rows if place < len(row.positions))
        if not own <= count <= (most := own + len(rows)):
            yield f"tokens explain {own} to {most} at position {place}, counted are {count}"
    if drafts and sum(change["per_position"]) != counted:
        yield f"positions add up to {sum(change['per_position'])}, accepted are {counted}"
    if known := window.predicted:
        expected = (known.drafts, len(known.per_position) * known.drafts, *known.per_position)
        actual = (drafts, change["draft_tokens"], *change["per_position"])
        if expected != actual:
            yield f"drafts, drafted, by position: {actual} counted, {expected} predicted"


def _least(count: Any) -> int:
    return min(count, default=0) if isinstance(count, tuple) else int(count)


def require_distinct(*arms: Arm) -> None:
    """InvalidResultError if one of them is another one, or a copy: times do not come again."""
    for first, second in itertools.combinations(arms, 2):
        if first.result.rows.sha256 == second.result.rows.sha256:
            raise InvalidResultError(
                "both have the same answers and times: they are one measurement",
                where=f"{first.path}, {second.path}",
                remedy="measure each of them; the reference, too, for --repeat",
            )


def differences(reference: Arm, candidate: Arm) -> Iterator[str]:
    """What two arms must have in common and do not."""
    declared = set(reference.result.differs) & set(candidate.result.differs)
    pairs: list[tuple[str, Mapping[str, object], Mapping[str, object]]] = [
        (
            name,
            getattr(reference.result, name).model_dump(),
            getattr(candidate.result, name).model_dump(),
        )
        for name in ("conditions", "server")
    ]
    for name, first, second in pairs:
        keys = ("gpu", "gpus", "driver") if name == "server" else tuple(first)
        for key in keys:
            if first[key] != second[key] and key not in declared:
                yield f"{key}: {first[key]!r} against {second[key]!r}"
    if reference.result.server == candidate.result.server and "kernels" not in declared:
        yield from _kernels(reference, candidate)
    if reference.result.session != candidate.result.session:
        yield "they are of different sessions"
    if {_key(row) for row in reference.rows} != {_key(row) for row in candidate.rows}:
        yield "they answered different items"
    yield from _order(reference, candidate)


def intended(reference: Arm, candidate: Arm) -> list[str]:
    """What comparable arms differ in: GPUs, as declared; kernels, as what they serve has others."""
    first, second = reference.result.server.gpus, candidate.result.server.gpus
    gpus = [f"GPUs: {first} against {second}"] if first != second else []
    return [*gpus, *_kernels(reference, candidate)]


def _kernels(reference: Arm, candidate: Arm) -> Iterator[str]:
    """A sentence if both arms have logs, and they state different kernels."""
    first, second = (
        next((_names(start.kernels) for start in arm.result.starts if start.kernels), [])
        for arm in (reference, candidate)
    )
    if first and second and first != second:
        yield f"kernels: {_unequal(first, second)}"


def _names(kernels: tuple[str, ...] | None) -> list[str]:
    return sorted(kernels or ())


def _unequal(first: list[str], second: list[str]) -> str:
    texts = [
        ", ".join(sorted(set(a) - set(b))) or "none" for a, b in ((first, second), (second, first))
    ]
    return f"{texts[0]} in one, {texts[1]} in the other"


def _order(reference: Arm, candidate: Arm) -> Iterator[str]:
    """Starts in turns, ABBA or ABAB: what drifts over time must not be one arm's."""
    orders = [[start.order for start in arm.result.starts] for arm in (reference, candidate)]
    if max(map(len, orders)) > MOST_STARTS:
        yield f"more than {MOST_STARTS} starts"
    elif len(orders[0]) != len(orders[1]):
        yield f"{len(orders[0])} starts against {len(orders[1])}"
    elif len(orders[0]) > 1 and (shared := sorted(set(orders[0]) & set(orders[1]))):
        yield f"both have a start of order {shared[0]}"
    elif len(orders[0]) > 1:
        ranks = {order: rank // 2 for rank, order in enumerate(sorted(orders[0] + orders[1]))}
        blocks = [[ranks[order] for order in sorted(arm)] for arm in orders]
        expected = list(range(len(orders[0])))
        if blocks != [expected, expected]:
            yield "their starts were not in turns"


def _key(row: Row) -> tuple[str, int]:
    return row.item, row.repeat


def _some(names: list[str] | tuple[str, ...]) -> str:
    more = ", ..." if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
