"""Results of benchmarks with planted truths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_forge.bench.results import Row, Setup, Start, write_arm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

HASH = "0" * 64
DEPTH = 2  # drafted tokens a step
CONDITIONS = {
    "workload": "chat-code", "prompts_sha256": HASH, "template_sha256": HASH,
    "tokenizer_sha256": HASH, "thinking": False, "temperature": 0.0, "max_tokens": 512,
    "ignore_eos": False, "concurrency": 8, "prefix_cache": False,
}  # fmt: skip
SERVER = {
    "tree": "1" * 40, "lock_sha256": HASH, "artifact": "tiny", "argv": ["vllm", "serve"],
    "gpu": "a GPU", "gpus": 1, "driver": "580.1",
}  # fmt: skip
IDLE = {"drafts": 0, "draft_tokens": 0, "accepted": 0, "per_position": (0, 0), "prefix_hits": 0,
        "tokens": 0}  # fmt: skip


def rows_of(
    seed: int,
    *,
    items: int = 400,
    starts: int = 1,
    right: float = 0.95,
    strict: float = 1.0,
    flips: float = 0.005,
    speed: float = 1.0,
    acceptance: float = 0.8,
) -> list[Row]:
    """Answers whose truth is fixed by item; ``flips``: a run's own noise; the rest are shares.

    ``strict``: share of right answers in the right form.
    """
    truth = np.random.default_rng(7)
    known, form = truth.random(items), truth.random(items)
    rate = truth.beta(20, 5, size=items)
    noise = np.random.default_rng(seed)
    rows = []
    for start in range(starts):
        pace = speed * np.exp(noise.normal(0, 0.003))
        for item in range(items):
            flexible = bool(known[item] < right) ^ bool(noise.random() < flips)
            drafted = DEPTH * int(noise.integers(40, 80))
            chance = np.clip(rate[item] * acceptance / 0.8, 0, 1)
            accepted = int(noise.binomial(drafted, chance))
            scores = {"flexible": flexible, "strict": flexible and bool(form[item] < strict)}
            rows.append(
                Row(
                    start=start, item=f"q{item}", finish="stop", seconds=1.0, ttft=0.1,
                    output_tokens=round(200 * pace), scores=scores, drafted=drafted,
                    accepted=accepted, positions=(accepted - accepted // 2, accepted // 2),
                )
            )  # fmt: skip
    return rows


def condition(**updates: object) -> Callable[[dict[str, Any]], None]:
    """An edit of a record: other conditions, in windows that are as long as they make them."""

    def edit(record: dict[str, Any]) -> None:
        before = record["conditions"]["concurrency"]
        record["conditions"].update(updates)
        for start in record["starts"]:
            seconds = start["window"]["seconds"] * before / record["conditions"]["concurrency"]
            start["window"]["seconds"] = max(1.0, seconds)  # of an answer

    return edit


def seconds_of(rows: Sequence[Row], record: dict[str, Any]) -> float:
    """What answers take if a slot is never idle."""
    slots = int(record["conditions"]["concurrency"])
    return max(*(row.seconds for row in rows), sum(row.seconds for row in rows) / slots, 0)


def write_result(
    path: Path,
    rows: Sequence[Row],
    *,
    orders: Sequence[int] = (0,),
    edit: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Path:
    """A valid record of these rows, after ``edit``; counters are those of the rows."""
    record: dict[str, Any] = {
        "arm": path.stem, "session": "s1", "conditions": dict(CONDITIONS), "starts": [],
        "server": {**SERVER, "image": "sha256:" + "2" * 64},
    }  # fmt: skip
    for index, order in enumerate(orders):
        own = [row for row in rows if row.start == index]
        drafted = sum(row.drafted for row in own)
        after = {
            "drafts": drafted // DEPTH, "draft_tokens": drafted,
            "accepted": sum(row.accepted for row in own), "prefix_hits": 0,
            "per_position": tuple(map(sum, zip(*(row.positions for row in own), strict=True))),
            "tokens": sum(row.output_tokens for row in own),
        }  # fmt: skip
        window = {"seconds": seconds_of(own, record), "before": dict(IDLE), "after": after,
                  "new_files": [], "headroom": 50.0}  # fmt: skip
        record["starts"].append({"order": order, "window": window})
    edit(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = [Start.model_validate(start) for start in record.pop("starts")]
    write_arm(path, Setup.model_validate(record), begun, rows)
    return path
