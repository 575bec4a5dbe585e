"""Figures of one result, for people; `bench gate` compares."""

import statistics
from dataclasses import dataclass
from itertools import zip_longest

from vllm_forge.bench.results import Arm


@dataclass(frozen=True, kw_only=True)
class Summary:
    """``rates``: tokens a second by start; TTFT and TPOT are medians of answers, in seconds."""

    arm: Arm
    rates: dict[int, float]
    ttft: float | None
    tpot: float | None
    acceptance: float | None
    positions: tuple[float, ...]  # accepted of all drafts, by position

    @property
    def name(self) -> str:
        return f"{self.arm.result.arm}, c={self.arm.result.conditions.concurrency}"

    @property
    def rate(self) -> float:
        return statistics.fmean(self.rates.values())

    def figures(self) -> dict[str, str]:
        """One row of a table; what was not measured is "not run"."""
        result, server = self.arm.result, self.arm.result.server
        rate = self.rate if self.rates else None
        noise = statistics.stdev(self.rates.values()) / self.rate if len(self.rates) > 1 else None
        numbers = {
            "tokens/s": (rate, ".1f", 1),
            "of a GPU": (rate, ".1f", 1 / server.gpus),
            "between starts": (noise, ".2%", 1),
            "TTFT, s": (self.ttft, ".3f", 1),
            "TPOT, ms": (self.tpot, ".2f", 1000),
            "accepted": (self.acceptance, ".2%", 1),
        }
        texts = {
            name: "not run" if value is None else f"{value * scale:{form}}"
            for name, (value, form, scale) in numbers.items()
        }
        claimed = " (claimed)" if server.claimed else ""
        return {
            "result": self.name,
            "workload": result.conditions.workload,
            "image": server.image.removeprefix("sha256:")[:12] + claimed,
            "starts": str(len(result.starts)),
            "GPUs": str(server.gpus),
            **texts,
            "by position": " / ".join(f"{share:.2%}" for share in self.positions) or "not run",
        }


def summarize(arm: Arm) -> Summary:
    """Of all starts of a record."""
    ttfts = [row.ttft for row in arm.rows if row.ttft is not None]
    tpots = [row.tpot for row in arm.rows if row.tpot is not None]
    changes = [start.window.change for start in arm.result.starts if start.window]
    drafts, drafted, accepted = (
        sum(change[name] for change in changes) for name in ("drafts", "draft_tokens", "accepted")
    )
    places = zip_longest(*(change["per_position"] for change in changes), fillvalue=0)
    return Summary(
        arm=arm,
        rates=arm.rates(),
        ttft=statistics.median(ttfts) if ttfts else None,
        tpot=statistics.median(tpots) if tpots else None,
        acceptance=accepted / drafted if drafted else None,
        positions=tuple(sum(counts) / drafts for counts in places) if drafts else (),
    )
