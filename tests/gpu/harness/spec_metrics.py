"""vLLM's counters of speculative decoding, read exactly.

The names are those of vllm/v1/spec_decode/metrics.py, ``SpecDecodingProm`` (0.22.1 to 0.33.0).
Three traps: the sample of a counter ends in ``_total``, and beside it stands ``_created``, a time;
``num_draft_tokens`` and ``num_drafts`` differ by a factor k, and each holds the other's stem; a
server without speculation exports none of them, which is not zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterable

PREFIX = "vllm:spec_decode_num_"
DRAFTS = f"{PREFIX}drafts"
DRAFT_TOKENS = f"{PREFIX}draft_tokens"
ACCEPTED = f"{PREFIX}accepted_tokens"
PER_POSITION = f"{PREFIX}accepted_tokens_per_pos"
NAMES = {DRAFTS, DRAFT_TOKENS, ACCEPTED}
TOTAL = "_total"


class CounterResetError(ValueError):
    """A counter went down between two readings: the server was started anew."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The counters at one time, summed over engines.

    Attributes:
        drafts: times that the draft model proposed.
        draft_tokens: tokens that it proposed.
        accepted: of these, tokens that the target model took.
        per_position: the same by position within a draft, from the first.
    """

    drafts: int
    draft_tokens: int
    accepted: int
    per_position: tuple[int, ...]

    def since(self, before: Reading) -> Reading:
        """What was counted after ``before``.

        Raises:
            CounterResetError: a counter is lower than before, or a position is gone.
        """
        fewer = len(self.per_position) < len(before.per_position)
        earlier = before.per_position + (0,) * (len(self.per_position) - len(before.per_position))
        change = Reading(
            drafts=self.drafts - before.drafts,
            draft_tokens=self.draft_tokens - before.draft_tokens,
            accepted=self.accepted - before.accepted,
            per_position=tuple(
                now - then for now, then in zip(self.per_position, earlier, strict=False)
            ),
        )
        values = (change.drafts, change.draft_tokens, change.accepted, *change.per_position)
        if fewer or min(values) < 0:
            raise CounterResetError(f"from {before} to {self}")
        return change


def read_text(text: str) -> Reading | None:
    """From the text that ``/metrics`` serves; None where a counter is absent.

    Raises:
        ValueError: what is exported is no counter.
    """
    samples = [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    return _reading(
        (name.removesuffix(TOTAL), labels, value)
        for name, labels, value in samples
        if name.endswith(TOTAL)
    )


def read_snapshot(metrics: Iterable[Any]) -> Reading | None:
    """From ``LLM.get_metrics()``: its names have no ``_total``; per position, one vector."""
    rows: list[tuple[str, dict[str, str], float]] = []
    for metric in metrics:
        if hasattr(metric, "values") and metric.name == PER_POSITION:
            rows += [
                (metric.name, {"position": str(position)}, value)
                for position, value in enumerate(metric.values)
            ]
        elif metric.name.startswith(PREFIX):
            rows.append((metric.name, metric.labels, metric.value))
    return _reading(rows)


def _reading(rows: Iterable[tuple[str, dict[str, str], float]]) -> Reading | None:
    totals: dict[str, float] = {}
    positions: dict[int, float] = {}
    for name, labels, value in rows:
        if name not in {PER_POSITION, *NAMES}:
            continue
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}: no counter is")
        if name == PER_POSITION:
            position = int(labels.get("position", ""))
            positions[position] = positions.get(position, 0) + value
        else:
            totals[name] = totals.get(name, 0) + value
    if len(totals) < 3 or sorted(positions) != list(range(len(positions))) or not positions:
        return None
    return Reading(
        drafts=int(totals[DRAFTS]),
        draft_tokens=int(totals[DRAFT_TOKENS]),
        accepted=int(totals[ACCEPTED]),
        per_position=tuple(int(positions[index]) for index in sorted(positions)),
    )
