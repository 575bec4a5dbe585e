"""Reasons to refuse a result, or a comparison: each would make a verdict on it worthless."""

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_forge.bench.errors import InvalidResultError
from vllm_forge.bench.hardware import slowdowns
from vllm_forge.bench.results import MOST_STARTS, Arm, Conditions, Row, Window, read_arm

HEADROOM = 10.0  # a slower client would be what is measured
CLOCK, IDLE_S = 1.05, 1.0  # what clocks that are read one by one may differ by; between answers
SHOWN = 3
HARDWARE = ("gpu", "gpus", "driver")  # of a server


def require_valid(*arms: Arm) -> None:
    """InvalidResultError for the first arm with faults, with all of them."""
    for arm in arms:
        if found := "; ".join(faults(arm)):
            remedy = "repeat the measurement without these faults"
            raise InvalidResultError(f"invalid result: {found}", where=arm.path, remedy=remedy)


def read_valid(path: Path) -> Arm:
    """A record without faults; ResultFileError, InvalidResultError."""
    require_valid(arm := read_arm(path))
    return arm


def require_comparable(reference: Arm, candidate: Arm) -> None:
    """InvalidResultError unless the arms differ only in what they serve."""
    if found := "; ".join(differences(reference, candidate)):
        what, where = f"arms cannot be compared: {found}", f"{reference.path}, {candidate.path}"
        remedy = "measure both arms in one session, with the same conditions"
        raise InvalidResultError(what, where=where, remedy=remedy)


def faults(arm: Arm) -> Iterator[str]:
    starts = arm.result.starts
    yield from _answer_faults(arm)
    keys = [Counter(row.key for row in arm.of_start(index)) for index in range(len(starts))]
    if any(count > 1 for counter in keys for count in counter.values()):
        yield "an item was answered twice in one start"
    if any(set(counter) != set(keys[0]) for counter in keys):
        yield "the starts answered different items"
    orders = Counter(start.order for start in starts)
    yield from (f"two starts have the order {order}" for order, n in orders.items() if n > 1)
    copies = Counter(
        frozenset(
            (*row.key, row.seconds, row.ttft, row.output_tokens, row.drafted, row.accepted)
            for row in arm.of_start(index)
        )
        for index, start in enumerate(starts)
        if start.window
    )
    if any(count > 1 for count in copies.values()):
        yield "two starts have the same answers and times: one is a copy"
    if len(sets := {start.kernels for start in starts} - {None}) > 1:
        first, second, *_ = sorted(sorted(names or ()) for names in sets)
        yield f"its starts ran different kernels: {_unequal(first, second)}"
    for index, start in enumerate(starts):
        if start.cached == 0 and start.compiled:
            yield f"start {start.order}: the caches were cold: it compiled {start.compiled} files"
        if start.window is not None:
            texts = _window_faults(start.window, arm.of_start(index), arm.result.conditions)
            yield from (f"start {start.order}: {text}" for text in texts)


def _answer_faults(arm: Arm) -> Iterator[str]:
    conditions, cap = arm.result.conditions, arm.result.conditions.max_tokens
    if failed := [row for row in arm.rows if row.finish == "error"]:
        items = _some([row.item for row in failed])
        yield f"{len(failed)} failed requests ({items}): {failed[0].fault or 'unknown reason'}"
    cut = [row for row in arm.rows if row.finish == "length"]
    if conditions.ignore_eos:
        short = [row for row in arm.rows if row.output_tokens < cap and row.finish != "error"]
        yield from _counted(f"answers below {cap} tokens", short)
    else:
        early = [row for row in cut if row.output_tokens < cap]  # by the server's --max-model-len
        yield from _counted(f"answers cut below {cap} tokens", early)
        right = [row for row in cut if any(row.scores.values())]
        yield from _counted("truncated answers scored as right", right)
    for score in sorted({name for row in arm.rows for name in row.scores}):
        bare = [row for row in arm.rows if row.finish == "stop" and score not in row.scores]
        yield from _counted(f"answers without the score {score}", bare)


def _window_faults(window: Window, rows: list[Row], conditions: Conditions) -> Iterator[str]:
    if not any(row.output_tokens for row in rows):
        yield "no tokens"
    yield from _time_faults(window.seconds, rows, conditions.concurrency)
    change = window.change
    each = {**change, "per_position": min(change["per_position"], default=0)}
    back = [name for name, count in each.items() if count < 0]
    if back:
        yield f"counters went backwards: {', '.join(back)}"
    if not conditions.prefix_cache and change["prefix_hits"] > 0:
        yield f"{change['prefix_hits']} prefix-cache hits, which the conditions do not declare"
    if files := window.new_files:
        folder = os.path.commonprefix(files).rpartition("/")[0]  # noqa: RUF071 - up to a "/"
        names = _some([name.rpartition("/")[2] for name in files])
        yield f"{len(files)} files were compiled in the window (in {folder}: {names})"
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


def require_distinct(*arms: Arm) -> None:
    """InvalidResultError if one of them is another one, or a copy: times do not come again."""
    for first, second in itertools.combinations(arms, 2):
        if first.result.rows.sha256 == second.result.rows.sha256:
            what = "both have the same answers and times: they are one measurement"
            remedy = "measure each of them; the reference, too, for --repeat"
            raise InvalidResultError(what, where=f"{first.path}, {second.path}", remedy=remedy)


def require_same_server(reference: Arm, repeat: Arm) -> None:
    """InvalidResultError unless both measured one image, model and command."""
    first, second = reference.result.server, repeat.result.server
    for key in ("image", "artifact", "argv", "env_sha256"):
        if getattr(first, key) != getattr(second, key):
            raise InvalidResultError(
                f"--repeat is not the reference: its {key} is another one",
                where=f"{reference.path}, {repeat.path}",
                remedy="measure the reference again: the same image, model and arguments",
            )


def differences(reference: Arm, candidate: Arm) -> Iterator[str]:
    """What two arms must have in common and do not."""
    first, second = reference.result, candidate.result
    declared = {*first.differs} & {*second.differs}
    pairs = [(key, value, getattr(second.conditions, key)) for key, value in first.conditions]
    pairs += [(key, getattr(first.server, key), getattr(second.server, key)) for key in HARDWARE]
    for key, one, other in pairs:
        if one != other and key not in declared:
            yield f"{key}: {one!r} against {other!r}"
    if first.server == second.server and "kernels" not in declared:
        yield from _kernels(reference, candidate)
    if first.session != second.session:
        yield "they are of different sessions"
    if {row.key for row in reference.rows} != {row.key for row in candidate.rows}:
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
        next((start.kernels for start in arm.result.starts if start.kernels), ())
        for arm in (reference, candidate)
    )
    if first and second and {*first} != {*second}:
        yield f"kernels: {_unequal(first, second)}"


def _unequal(first: Sequence[str], second: Sequence[str]) -> str:
    texts = [
        ", ".join(sorted({*a} - {*b})) or "none" for a, b in ((first, second), (second, first))
    ]
    return f"{texts[0]} in one, {texts[1]} in the other"


def _order(reference: Arm, candidate: Arm) -> Iterator[str]:
    """Starts in turns, ABBA or ABAB: what drifts over time must not be one arm's."""
    first, second = ({start.order for start in arm.result.starts} for arm in (reference, candidate))
    if max(len(first), len(second)) > MOST_STARTS:
        yield f"more than {MOST_STARTS} starts"
    elif len(first) != len(second):
        yield f"{len(first)} starts against {len(second)}"
    elif len(first) > 1 and (shared := sorted(first & second)):
        yield f"both have a start of order {shared[0]}"
    elif len(first) > 1:
        turns = [order in first for order in sorted(first | second)]
        if any(one == other for one, other in zip(turns[::2], turns[1::2], strict=True)):
            yield "their starts were not in turns"


def _counted(text: str, rows: Sequence[Row]) -> Iterator[str]:
    if rows:
        yield f"{len(rows)} {text} ({_some([row.item for row in rows])})"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
