"""Figures of one result, for people; `bench gate` compares."""

import statistics
from dataclasses import dataclass
from itertools import zip_longest

from vllm_forge.bench.results import Arm


@dataclass(frozen=True, kw_only=True)
class Summary:
    """``rates``: tokens a second by start; TTFT and TPOT are medians of answers, in seconds."""

    arm: str
    workload: str
    image: str
    claimed: bool
    concurrency: int
    gpus: int
    starts: int
    rates: dict[int, float]
    ttft: float | None
    tpot: float | None
    acceptance: float | None
    positions: tuple[float, ...] = ()  # accepted of all drafts, by position

    @property
    def name(self) -> str:
        return f"{self.arm}, c={self.concurrency}"

    @property
    def rate(self) -> float:
        return statistics.fmean(self.rates.values())

    def figures(self) -> dict[str, str]:
        """One row of a table; what was not measured is "not run"."""
        rate = self.rate if self.rates else None
        noise = statistics.stdev(self.rates.values()) / self.rate if len(self.rates) > 1 else None
        numbers = {
            "tokens/s": (rate, ".1f", 1),
            "of a GPU": (rate, ".1f", 1 / self.gpus),
            "between starts": (noise, ".2%", 1),
            "TTFT, s": (self.ttft, ".3f", 1),
            "TPOT, ms": (self.tpot, ".2f", 1000),
            "accepted": (self.acceptance, ".2%", 1),
        }
        texts = {
            name: "not run" if value is None else f"{value * scale:{form}}"
            for name, (value, form, scale) in numbers.items()
        }
        return {
            "result": self.name,
            "workload": self.workload,
            "image": self.image.removeprefix("sha256:")[:12]
            + (" (claimed)" if self.claimed else ""),
            "starts": str(self.starts),
            "GPUs": str(self.gpus),
            **texts,
            "by position": " / ".join(f"{share:.2%}" for share in self.positions) or "not run",
        }


def summarize(arm: Arm) -> Summary:
    """Of all starts of a record."""
    result = arm.result
    ttfts = [row.ttft for row in arm.rows if row.ttft is not None]
    tpots = [row.tpot for row in arm.rows if row.tpot is not None]
    windows = [start.window for start in result.starts if start.window]
    changes = [window.after.since(window.before) for window in windows]
    drafts, drafted, accepted = (
        sum(change[name] for change in changes) for name in ("drafts", "draft_tokens", "accepted")
    )
    places = zip_longest(*(change["per_position"] for change in changes), fillvalue=0)
    return Summary(
        arm=result.arm,
        workload=result.conditions.workload,
        image=result.server.image,
        claimed=result.server.claimed,
        concurrency=result.conditions.concurrency,
        gpus=result.server.gpus,
        starts=len(result.starts),
        rates=arm.rates(),
        ttft=statistics.median(ttfts) if ttfts else None,
        tpot=statistics.median(tpots) if tpots else None,
        acceptance=accepted / drafted if drafted else None,
        positions=tuple(sum(counts) / drafts for counts in places) if drafts else (),
    )
