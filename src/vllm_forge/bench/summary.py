"""Figures of one result, for people; `bench gate` compares."""

import statistics
from dataclasses import dataclass
from itertools import zip_longest

from vllm_forge.bench.results import Arm

HEAD = [
    "result",
    "image",
    "starts",
    "GPUs",
    "tokens/s",
    "of a GPU",
    "between starts",
    "TTFT, s",
    "TPOT, ms",
    "accepted",
    "by position",
]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """``rates``: tokens a second of each start; TTFT and TPOT are medians of answers, in seconds.

    TPOT is without the first token, as vLLM has it; GuideLLM's includes it.
    """

    arm: str
    image: str
    claimed: bool
    concurrency: int
    gpus: int
    starts: int
    rates: tuple[float, ...]
    ttft: float | None
    tpot: float | None
    acceptance: float | None
    positions: tuple[float, ...] = ()  # accepted of all drafts, by position

    @property
    def name(self) -> str:
        return f"{self.arm}, c={self.concurrency}"

    @property
    def rate(self) -> float:
        return statistics.fmean(self.rates)

    def cells(self) -> list[str]:
        """One row of a table; what was not measured is "not run"."""
        noise = statistics.stdev(self.rates) / self.rate if len(self.rates) > 1 else None
        values = (
            (self.rate if self.rates else None, ".1f", 1),
            (self.rate if self.rates else None, ".1f", 1 / self.gpus), (noise, ".2%", 1),
            (self.ttft, ".3f", 1), (self.tpot, ".2f", 1000), (self.acceptance, ".2%", 1),
        )  # fmt: skip
        texts = ["not run" if x is None else f"{x * scale:{form}}" for x, form, scale in values]
        places = " / ".join(f"{share:.2%}" for share in self.positions) or "not run"
        return [
            self.name,
            self.image.removeprefix("sha256:")[:12] + (" (claimed)" if self.claimed else ""),
            str(self.starts),
            str(self.gpus),
            *texts,
            places,
        ]


def summarize(arm: Arm) -> Summary:
    """Of all starts of a record."""
    result = arm.result
    windows = [(index, start.window) for index, start in enumerate(result.starts) if start.window]
    rates = tuple(
        sum(row.output_tokens for row in arm.of_start(index)) / window.seconds
        for index, window in windows
    )
    ttfts = [row.ttft for row in arm.rows if row.ttft is not None]
    tpots = [
        (row.seconds - row.ttft) / (row.output_tokens - 1)
        for row in arm.rows
        if row.ttft is not None and row.output_tokens > 1
    ]
    changes = [window.after.since(window.before) for _, window in windows]
    drafts, drafted, accepted = (
        sum(change[name] for change in changes) for name in ("drafts", "draft_tokens", "accepted")
    )
    places = zip_longest(*(change["per_position"] for change in changes), fillvalue=0)
    return Summary(
        arm=result.arm,
        image=result.server.image,
        claimed=result.server.claimed,
        concurrency=result.conditions.concurrency,
        gpus=result.server.gpus,
        starts=len(result.starts),
        rates=rates,
        ttft=statistics.median(ttfts) if ttfts else None,
        tpot=statistics.median(tpots) if tpots else None,
        acceptance=accepted / drafted if drafted else None,
        positions=tuple(sum(counts) / drafts for counts in places) if drafts else (),
    )
