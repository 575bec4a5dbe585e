"""Charts as SVG: the same bytes for the same data and the same matplotlib."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, Concatenate, ParamSpec

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from vllm_forge.bench.results import Summary

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
WIDTH, HEIGHT, ROW_HEIGHT = 9, 4, 0.32  # inches
Parameters = ParamSpec("Parameters")


def chart(draw: Callable[Concatenate[Axes, Parameters], None]) -> Callable[Parameters, bytes]:
    """Make of a function that draws one that returns the chart, an SVG."""

    @wraps(draw)
    def svg(*args: Parameters.args, **options: Parameters.kwargs) -> bytes:
        target = io.BytesIO()
        with mpl.rc_context():
            mpl.rcdefaults()  # not the user's settings
            mpl.rcParams["svg.hashsalt"] = "vllm-forge"
            mpl.rcParams["svg.fonttype"] = "none"  # text stays text, and can be searched
            figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
            draw(figure.add_subplot(), *args, **options)
            if figure.axes[0].get_legend_handles_labels()[0]:
                figure.legend(loc="outside upper center", ncols=COLUMNS, frameon=False)
            figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
        # matplotlib ends lines with a space
        return b"".join(line.rstrip() + b"\n" for line in target.getvalue().splitlines())

    return svg


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


@chart
def _forest(
    axes: Axes, rows: Sequence[tuple[str, Sequence[float], str, float | None]], label: str
) -> None:
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
    _name_rows(axes, [name for name, *_ in rows], label)


def _name_rows(axes: Axes, names: Sequence[str], label: str) -> None:
    axes.figure.set_figheight(1.2 + ROW_HEIGHT * len(names))  # type: ignore[union-attr]
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(max(1, len(names)) - 0.5, -0.5), xlabel=label)


@chart
def speed_up(axes: Axes, comparisons: Sequence[Mapping[str, Any]]) -> None:
    """Throughput of arms over the reference's, by concurrency; where a line crosses 1 is marked."""
    lines: dict[str, list[tuple[int, list[float]]]] = {}
    for row in comparisons:
        for gate in row["gates"]:
            if gate["gate"] == "throughput" and gate["interval"]:
                ratios = [1 + end for end in (gate["difference"], *gate["interval"])]
                name = f"{row['candidate']} over {row['reference']}"
                lines.setdefault(name, []).append((row["concurrency"], ratios))
    for name, points in lines.items():
        levels = [level for level, _ in points]
        value, low, high = zip(*(ratios for _, ratios in points), strict=True)
        (line,) = axes.plot(levels, value, marker="o", label=name)
        axes.vlines(levels, low, high, color=line.get_color())
        for place in _crossings(levels, value):
            axes.annotate(f"1 at c={place:.1f}", (place, 1), rotation=45)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="concurrency", ylabel="tokens/s over the reference's, 95 % interval")


def _crossings(levels: Sequence[int], ratios: Sequence[float]) -> list[float]:
    """Concurrencies at which a line through the points is 1, on a logarithmic axis."""
    pairs = zip(pairwise(map(math.log2, levels)), pairwise(ratios), strict=True)
    return [
        2 ** (low + (high - low) * (1 - first) / (second - first))
        for (low, high), (first, second) in pairs
        if (first - 1) * (second - 1) < 0
    ]


@chart
def starts(axes: Axes, summaries: Sequence[Summary]) -> None:
    """Tokens a second of each start, in the order in which they were run: restart noise, drift."""
    for summary in summaries:
        orders, rates = list(summary.rates), list(summary.rates.values())
        axes.plot(orders, rates, marker="o", linestyle=":", label=summary.name)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="start", ylabel="tokens/s")


@chart
def published(axes: Axes, rows: Sequence[tuple[str, float | None]]) -> None:
    """What was measured over what was published; what was not run says so."""
    for place, (_, ratio) in enumerate(rows):
        if ratio is None:
            axes.text(0.5, place, "not run", ha="center", va="center", color="#6b6b6b")
        else:
            axes.plot(ratio, place, color="#3b5b92", marker="o")
    axes.axvline(1, color="black", linewidth=0.8, zorder=0)
    axes.set_xlim(0, max([2, *(1.1 * (ratio or 0) for _, ratio in rows)]))
    _name_rows(axes, [name for name, _ in rows], "measured over published tokens/s")


@chart
def first_tokens(axes: Axes, summaries: Sequence[Summary]) -> None:
    """TTFT in the order in which answers ended: what was compiled at the first request is seen."""
    for summary in summaries:
        for index in range(len(summary.arm.result.starts)):
            times = [row.ttft for row in summary.arm.of_start(index) if row.ttft is not None]
            axes.plot(times, linewidth=0.8, label=f"{summary.name}, start {index}")
    axes.set(xlabel="answer", ylabel="time to the first token, s", yscale="log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


@chart
def pareto(axes: Axes, summaries: Sequence[Summary]) -> None:
    """Tokens a second of a GPU against those of a user; one line for each arm."""
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for row in summaries:
        points, result = lines.setdefault(row.arm.result.arm, []), row.arm.result
        if row.tpot and row.rates:
            point = (result.conditions.concurrency, 1 / row.tpot, row.rate / result.server.gpus)
            points.append(point)
    for arm, points in lines.items():
        levels, users, rates = zip(*sorted(points), strict=True) if points else ((), (), ())
        axes.plot(users, rates, marker="o", label=arm)
        for level, user, rate in zip(levels, users, rates, strict=True):
            axes.annotate(f"c={level}", (user, rate), (4, 4), textcoords="offset points")
    axes.set_xlim(0, 1.1 * axes.get_xlim()[1])
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.set(xlabel="tokens/s of a user (1 / median TPOT)", ylabel="tokens/s of a GPU")


@chart
def positions(axes: Axes, summaries: Sequence[Summary]) -> None:
    """Share of drafts whose token at a position is accepted; one line for each result."""
    drafting = [summary for summary in summaries if summary.positions]
    for summary in drafting:
        places = range(1, len(summary.positions) + 1)
        shares = [100 * share for share in summary.positions]
        workload = summary.arm.result.conditions.workload
        axes.plot(places, shares, marker="o", label=f"{summary.name}, {workload}")
    axes.set(xlabel="position in the draft", ylabel="accepted, % of drafts", ylim=(0, 100))
    axes.set_xlim(0.5, max((len(summary.positions) for summary in drafting), default=1) + 0.5)
    axes.xaxis.set_major_locator(MultipleLocator(1))
