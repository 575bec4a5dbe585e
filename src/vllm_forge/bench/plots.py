"""Charts as SVG: the same bytes for the same data and the same matplotlib."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vllm_forge.bench.results import Arm
from vllm_forge.bench.summary import Summary

# Colour and marker of each verdict; readable in print and with red-green blindness.
RED, GREEN = ("#b3261e", "X"), ("#1b6e3c", "o")
MARKS = {
    "contradicted": RED,
    "holds": GREEN,
    "consistent": ("#3b5b92", "s"),
    "undecided": ("#6b6b6b", "D"),
    "pass": GREEN,
    "fail": RED,
}
COLUMNS = 4  # of a legend


def forest(record: Mapping[str, Any]) -> bytes:
    """Differences of shares in points with their intervals, for a record of ``bench claims``."""
    rows = [
        (f"{row['id']}  ({row['n']})", row["interval"], row["word"], None)
        for row in record["verdicts"]
        if row["interval"]
    ]
    return _forest(rows, "difference in percentage points, 95 % interval (Newcombe)")


def verdicts(comparisons: Sequence[Mapping[str, Any]]) -> bytes:
    """What gates say of each pair of arms; a line is the largest loss that a gate allows."""
    rows = [
        (
            f"{row['candidate']} v {row['reference']}, c={row['concurrency']}: {gate['gate']}",
            [100 * end for end in (gate["difference"], *gate["interval"])],
            gate["verdict"],
            -100 * gate["margin"],
        )
        for row in comparisons
        for gate in row["gates"]
        if gate["interval"]
    ]
    return _forest(rows, "difference in % or percentage points, 95 % interval; | is the margin")


def _forest(rows: Sequence[tuple[str, Sequence[float], str, float | None]], label: str) -> bytes:
    def draw(axes: Axes) -> None:
        for place, (_, (value, low, high), word, margin) in enumerate(rows):
            colour, marker = MARKS[word]
            axes.plot([low, high], [place, place], color=colour, linewidth=1.5)
            axes.plot(value, place, color=colour, marker=marker)
            if margin is not None:
                axes.plot(margin, place, color="black", marker="|", markersize=12)
        for word in dict.fromkeys(word for *_, word, _ in rows):
            colour, marker = MARKS[word]
            axes.plot([], [], color=colour, marker=marker, label=word)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(label)

    return _svg(draw, height=1.2 + 0.32 * len(rows))


def speed_up(comparisons: Sequence[Mapping[str, Any]]) -> bytes:
    """Throughput of arms over the reference's, by concurrency; where a line crosses 1 is marked."""
    lines: dict[str, list[tuple[int, list[float]]]] = {}
    for row in comparisons:
        for gate in row["gates"]:
            if gate["gate"] == "throughput" and gate["interval"]:
                ratios = [1 + end for end in (gate["difference"], *gate["interval"])]
                name = f"{row['candidate']} over {row['reference']}"
                lines.setdefault(name, []).append((row["concurrency"], ratios))

    def draw(axes: Axes) -> None:
        for name, points in lines.items():
            levels = [level for level, _ in points]
            value, low, high = zip(*(ratios for _, ratios in points), strict=True)
            (line,) = axes.plot(levels, value, marker="o", label=name)
            axes.vlines(levels, low, high, color=line.get_color())
            for place in _crossings(levels, value):
                axes.annotate(f"1 at c={place:.1f}", (place, 1), rotation=45)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("concurrency")
        axes.set_ylabel("tokens/s over the reference's, 95 % interval")

    return _svg(draw, height=4)


def _crossings(levels: Sequence[int], ratios: Sequence[float]) -> list[float]:
    """Concurrencies at which a line through the points is 1, on a logarithmic axis."""
    pairs = zip(pairwise(map(math.log2, levels)), pairwise(ratios), strict=True)
    return [
        2 ** (low + (high - low) * (1 - first) / (second - first))
        for (low, high), (first, second) in pairs
        if (first - 1) * (second - 1) < 0
    ]


def starts(summaries: Sequence[Summary]) -> bytes:
    """Tokens a second of each start, in the order in which they were run: restart noise, drift."""

    def draw(axes: Axes) -> None:
        for summary in summaries:
            orders, rates = list(summary.rates), list(summary.rates.values())
            axes.plot(orders, rates, marker="o", linestyle=":", label=summary.name)
        axes.set_xlabel("start")
        axes.set_ylabel("tokens/s")
        axes.set_ylim(bottom=0)

    return _svg(draw, height=4)


def published(rows: Sequence[tuple[str, float | None]]) -> bytes:
    """What was measured over what was published; what was not run says so."""

    def draw(axes: Axes) -> None:
        for place, (_, ratio) in enumerate(rows):
            if ratio is None:
                axes.text(0.5, place, "not run", ha="center", va="center", color="#6b6b6b")
            else:
                axes.plot(ratio, place, color="#3b5b92", marker="o")
        axes.axvline(1, color="black", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, max(2, *(1.1 * (ratio or 0) for _, ratio in rows)))
        axes.set_xlabel("measured over published tokens/s")

    return _svg(draw, height=1.2 + 0.32 * len(rows))


def first_tokens(arms: Sequence[Arm], summaries: Sequence[Summary]) -> bytes:
    """TTFT in the order in which answers ended: what was compiled at the first request is seen."""

    def draw(axes: Axes) -> None:
        for arm, summary in zip(arms, summaries, strict=True):
            for index in range(len(arm.result.starts)):
                times = [row.ttft for row in arm.of_start(index) if row.ttft is not None]
                axes.plot(times, linewidth=0.8, label=f"{summary.name}, start {index}")
        axes.set_xlabel("answer")
        axes.set_ylabel("time to the first token, s")
        axes.set_yscale("log")

    return _svg(draw, height=4)


def pareto(summaries: Sequence[Summary]) -> bytes:
    """Tokens a second of a GPU against those of a user; one line for each arm."""

    def draw(axes: Axes) -> None:
        for arm in dict.fromkeys(summary.arm for summary in summaries):
            own = sorted(
                (row for row in summaries if row.arm == arm and row.tpot and row.rates),
                key=lambda row: row.concurrency,
            )
            users = [1 / row.tpot for row in own if row.tpot]
            axes.plot(users, [row.rate / row.gpus for row in own], marker="o", label=arm)
            for user, row in zip(users, own, strict=True):
                axes.annotate(f"c={row.concurrency}", (user, row.rate / row.gpus))
        axes.set_xlabel("tokens/s of a user (1 / median TPOT)")
        axes.set_ylabel("tokens/s of a GPU")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)

    return _svg(draw, height=4)


def positions(summaries: Sequence[Summary]) -> bytes:
    """Share of drafts whose token at a position is accepted; one line for each result."""

    def draw(axes: Axes) -> None:
        for summary in summaries:
            places = range(1, len(summary.positions) + 1)
            shares = [100 * share for share in summary.positions]
            axes.plot(places, shares, marker="o", label=f"{summary.name}, {summary.workload}")
        axes.set_xlabel("position in the draft")
        axes.set_ylabel("accepted, % of drafts")
        axes.set_ylim(0, 100)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return _svg(draw, height=4)


def _svg(draw: Callable[[Axes], None], *, height: float) -> bytes:
    target = io.BytesIO()
    with mpl.rc_context():
        mpl.rcdefaults()  # not the user's settings
        mpl.rcParams["svg.hashsalt"] = "vllm-forge"
        mpl.rcParams["svg.fonttype"] = "none"  # text stays text, and can be searched
        figure = Figure(figsize=(9, height), layout="constrained")
        draw(figure.add_subplot())
        if figure.axes[0].get_legend_handles_labels()[0]:
            figure.legend(loc="outside upper center", ncols=COLUMNS, frameon=False)
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    # matplotlib ends lines with a space
    return b"".join(line.rstrip() + b"\n" for line in target.getvalue().splitlines())
