"""Whether MTP really fires: a verdict on counter deltas, with a diagnosis for each way to fail."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.gpu.harness.spec_metrics import Reading

BANDS = Path(__file__).with_name("bands.toml")
MIN_DRAFTS = 200  # below, a band of five points says nothing: 3 sigma of a rate is ten points
Z = 3.29  # two-sided 99.9 %


@dataclass(frozen=True, kw_only=True)
class Band:
    """Where the acceptance rate of a workload must be.

    Attributes:
        sku: name of a row of matrix.toml, or ``any``.
        workload: which prompts.
        k: speculative tokens per draft.
        low: least rate; a rate is accepted tokens / draft tokens.
        high: greatest rate: a draft that is never wrong on real text is not measured.
        published: what the source states, or None where the band is not from a measurement.
        source: where it comes from.
    """

    sku: str
    workload: str
    k: int
    low: float
    high: float
    published: float | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What was asked for between two readings, counted by who asked.

    Attributes:
        requests: finished requests.
        tokens: tokens that they returned.
    """

    requests: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of one gate. Green when ``problems`` is empty.

    Attributes:
        rate: accepted / draft tokens; nan without drafts.
        interval: Wilson score interval of the rate at 99.9 %.
        mean_length: tokens per step of the target model, bonus token included.
        problems: each says what is wrong and what usually causes it.
    """

    rate: float
    interval: tuple[float, float]
    mean_length: float
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether MTP fired as it must."""
        return not self.problems


def load_bands(path: Path = BANDS) -> tuple[Band, ...]:
    """The bands as data."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["band"]
    return tuple(Band(**row) for row in rows)


def judge(
    change: Reading | None, traffic: Traffic, band: Band, *, min_drafts: int = MIN_DRAFTS
) -> Verdict:
    """Judge what was counted while ``traffic`` was served.

    Args:
        change: counters after minus counters before; None where the server exports none.
        traffic: counted by the client.
        band: where the rate must be, and k.
        min_drafts: fewer are no evidence.
    """
    if change is None:
        return Verdict(
            rate=math.nan,
            interval=(math.nan, math.nan),
            mean_length=1.0,
            problems=(
                "the server exports no spec_decode counters: speculation is off. Was "
                "--speculative-config given, and does the checkpoint have an MTP block?",
            ),
        )
    rate = change.accepted / change.draft_tokens if change.draft_tokens else math.nan
    return Verdict(
        rate=rate,
        interval=wilson(change.accepted, change.draft_tokens),
        mean_length=1 + (change.accepted / change.drafts if change.drafts else 0),
        problems=(
            *_drafting(change, band, min_drafts),
            *_positions(change, band),
            *_rate(rate, band),
            *_explained(change, traffic, band),
        ),
    )


def _drafting(change: Reading, band: Band, min_drafts: int) -> list[str]:
    if change.drafts == 0:
        return ["no drafts: the draft model never ran for this traffic"]
    problems = []
    if change.drafts < min_drafts:
        problems.append(f"{change.drafts} drafts are too few for a verdict, {min_drafts} are not")
    # At the end of a request fewer than k tokens may be asked for.
    short = band.k * change.drafts - change.draft_tokens
    if short < 0 or short > 0.02 * band.k * change.drafts:
        problems.append(
            f"{change.draft_tokens} draft tokens in {change.drafts} drafts are not k = {band.k} "
            "each: k was capped, or another k was served"
        )
    return problems


def _positions(change: Reading, band: Band) -> list[str]:
    per = change.per_position
    if len(per) != band.k:
        return [f"{len(per)} positions are exported, not k = {band.k}: another k was served"]
    problems = []
    if any(later > earlier for earlier, later in pairwise(per)):
        problems.append(f"a later position is accepted more often than an earlier one: {per}")
    if min(per) < 0:
        problems.append(f"a position is accepted less often than never: {per}")
    if per[0] > change.drafts:
        problems.append(f"position 0 was accepted {per[0]} times in {change.drafts} drafts")
    if sum(per) != change.accepted:
        problems.append(f"positions add up to {sum(per)}, accepted are {change.accepted}")
    return problems


def _rate(rate: float, band: Band) -> list[str]:
    if math.isnan(rate) or band.low <= rate <= band.high:
        return []
    if rate == 0:
        return [
            "every draft was refused: the head computes, and computes noise. Known causes: NaN "
            "from an uninitialized or partly loaded MTP block, MTP weights read in the target's "
            "quantization, hidden states off by one position, a head that is not shared"
        ]
    side = (
        "below: MTP weights in a wrong format or order, or other prompts than the band's"
        if rate < band.low
        else "above: are these the band's prompts, or repetitions?"
    )
    return [
        f"acceptance {rate:.4f} is not within {band.low:.4f} to {band.high:.4f} "
        f"({band.workload}, k = {band.k}); {side}"
    ]


def _explained(change: Reading, traffic: Traffic, band: Band) -> list[str]:
    """Every token but a request's first comes from a step with a draft.

    A last step may accept tokens that are then cut off: up to k per request. One step per
    request may have had no room for a draft.
    """
    left = traffic.tokens - traffic.requests - change.drafts - change.accepted
    if -band.k * traffic.requests <= left <= traffic.requests + 0.01 * traffic.tokens:
        return []
    if left > 0:
        return [
            f"{left} of {traffic.tokens} tokens came from steps without a draft: part of the "
            "traffic was decoded without MTP"
        ]
    return [
        f"drafts and accepted tokens are {-left} more than the {traffic.tokens} tokens that came "
        "back: other traffic reached this server, or tokens are counted twice"
    ]


def wilson(hits: int, trials: int, z: float = Z) -> tuple[float, float]:
    """Wilson score interval of a rate; nan for what is none. Wilson, JASA 22 (1927)."""
    if not 0 <= hits <= trials or trials == 0:
        return (math.nan, math.nan)
    rate = hits / trials
    scale = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / scale
    return (max(0.0, centre - half), min(1.0, centre + half))
