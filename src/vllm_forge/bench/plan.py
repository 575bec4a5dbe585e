"""How much data a gate needs, and what no amount of it decides; the model card as a plan."""

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field
from scipy import stats

from vllm_forge.bench.claims import CLAIMS, REMEDY, ClaimsFile, Comparison, Derived
from vllm_forge.bench.errors import ClaimsFileError
from vllm_forge.bench.results import MOST_STARTS
from vllm_forge.bench.statistics import LEVEL
from vllm_forge.bench.verdicts import Word
from vllm_forge.errors import suggestion
from vllm_forge.matrix import FrozenModel, Matrix
from vllm_forge.matrix.model import Gate, Name

POWER = 0.9
LEAST_STARTS = 5  # with fewer, no pattern of signs is significant
NOISES = (0.004, 0.03, 0.1)  # of one start: at c=8 and above; a guess between; at c=1 (vllm#53436)
REACH = float(stats.norm.ppf(LEVEL) + stats.norm.ppf(POWER))  # of non-inferiority, in deviations
NOT_RUN = "not run"


class Suite(FrozenModel):
    """``discordant``: share of items that equal arms answer differently, low and high."""

    items: int = Field(gt=0)
    discordant: tuple[float, float]


@dataclass(frozen=True)
class Timing:
    """Seconds of a server's start, and of one measured window; None: not known."""

    start: float | None
    run: float | None

    def minutes(self, pairs: int) -> str:
        if self.start is None or self.run is None:
            return "unknown"
        return f"{2 * pairs * (self.start + self.run) / 60:.0f}"


def read_suites() -> dict[str, Suite]:
    text = Path(__file__).with_name("suites.toml").read_text(encoding="utf-8")
    return {name: Suite.model_validate(row) for name, row in tomllib.loads(text).items()}


def items_needed(discordant: float, margin: float) -> int:
    """Items for non-inferiority of equal arms."""
    return math.ceil(discordant * (REACH / margin) ** 2)


def smallest_margin(discordant: float, items: int) -> float:
    return REACH * math.sqrt(discordant / items)


def items_to_detect(discordant: float, difference: float) -> int | None:
    """Items for McNemar's test, two-sided; None if more differ than are discordant."""
    spread = discordant - difference**2
    if abs(difference) > discordant or spread < 0:
        return None
    reach = stats.norm.ppf((1 + LEVEL) / 2) * math.sqrt(discordant)
    reach += stats.norm.ppf(POWER) * math.sqrt(spread)
    return math.ceil(float(reach) ** 2 / difference**2)


def pairs_needed(noise: float, distance: float) -> int | None:
    """Pairs of starts that vary by ``noise`` each, to tell rates apart that differ by a share.

    None: more than are practical.
    """
    shift = abs(math.log1p(distance)) / (noise * math.sqrt(2))
    for pairs in range(LEAST_STARTS, MOST_STARTS + 1):
        limit = stats.t.ppf(LEVEL, pairs - 1)
        power = float(stats.nct.sf(limit, pairs - 1, shift * math.sqrt(pairs)))
        if power >= POWER or math.isnan(power):  # scipy has no value for enormous shifts
            return pairs
    return None


def gate_plan(
    name: str, gate: Gate, suites: dict[str, Suite], timing: Timing, noises: Sequence[float]
) -> Iterator[list[str]]:
    """Rows: gate, margin, of what, needed, minutes, what can be decided."""
    margin = f"{100 * gate.margin:g} {gate.unit}"
    if gate.measure == "throughput":
        for noise in noises:
            pairs = pairs_needed(noise, -gate.margin)
            needed = f"{pairs} starts of each arm" if pairs else f"over {MOST_STARTS} starts"
            minutes = timing.minutes(pairs) if pairs else "-"
            words = "decidable" if pairs else "cannot be decided"
            yield [name, margin, f"a start varies by {100 * noise:g} %", needed, minutes, words]
    elif gate.measure in {"acceptance", "positions"}:
        text = "the spread over prompts is unknown until an A/A was run"
        yield [name, margin, "drafts by prompt", "unknown", "unknown", text]
    else:
        for suite, row in suites.items():
            low, high = (items_needed(share, gate.margin) for share in row.discordant)
            words = "decidable"
            if row.items < high:
                least = smallest_margin(row.discordant[1], row.items)
                words = f"decidable from {100 * least:.1f} pp"
            if row.items < low:
                words = f"cannot be decided; {words}"
            what = f"{suite}, {row.items:,} items"
            yield [name, margin, what, f"{low:,} to {high:,} items", "unknown", words]


def card_plan(
    claims: ClaimsFile, words: Mapping[str, str], matrix: Matrix, suites: dict[str, Suite],
    timing: Timing,
) -> Iterator[list[str]]:  # fmt: skip
    """Rows for each undecided figure: figure, arms, needed, minutes, state.

    ``words``: the verdict on each claim. ClaimsFileError: a claim is of an unknown suite.
    """
    for row in claims.claim:
        if (suite := getattr(row, "suite", None)) and suite not in suites:
            what = f"claim {row.id}: unknown suite {suite!r}{suggestion(suite, suites)}"
            raise ClaimsFileError(what, where=CLAIMS, remedy=REMEDY)
        if words.get(row.id) != Word.UNDECIDED:
            continue
        if isinstance(row, Comparison) and row.second is not None and row.suite:
            arms = (row.first.arm, row.second.arm)
            needed = _items(row, suites[row.suite])
            yield [row.says, _arms(claims, matrix, arms), needed, "unknown", NOT_RUN]
        elif isinstance(row, Derived) and row.arms:
            distance = float(row.value) - 1
            pairs = [pairs_needed(noise, distance) for noise in NOISES]
            needed = ", ".join(
                f"{pair or f'over {MOST_STARTS}'} at {100 * noise:g} %"
                for pair, noise in zip(pairs, NOISES, strict=True)
            )
            minutes = timing.minutes(max(pair or MOST_STARTS for pair in pairs))
            text = f"starts of each arm by restart noise: {needed}"
            yield [row.says, _arms(claims, matrix, row.arms), text, minutes, NOT_RUN]


def _items(row: Comparison, suite: Suite) -> str:
    """Of the suite's items, with paired answers."""
    shares = [(share.count() or 0) / share.all for share in (row.first, row.second) if share]
    difference = shares[0] - shares[1]
    high = suite.discordant[1]
    if row.claims == "equal":
        least = smallest_margin(high, suite.items)
        return f"paired answers of all {suite.items:,}: equality within {100 * least:.1f} pp"
    needed = items_to_detect(max(high, abs(difference)), difference) if difference else None
    if needed is None or needed > suite.items:
        more = f"{needed:,} items" if needed else "no number of items"
        return f"cannot be decided: {more} for {100 * difference:+.1f} pp, it has {suite.items:,}"
    return f"{needed:,} of {suite.items:,} items, paired"


def _arms(claims: ClaimsFile, matrix: Matrix, arms: tuple[Name, ...]) -> str:
    texts = []
    for arm in arms:
        served = claims.serve.get(arm)
        known = served and served.preset in matrix.preset and served.artifact in matrix.artifact
        texts.append(
            f"{served.preset} {served.artifact}" if served and known else f"{arm}: no preset"
        )
    return " v ".join(texts)
