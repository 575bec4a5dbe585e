"""Charts as SVG: the same bytes for the same data and the same matplotlib."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vllm_forge.bench.results import Arm
from vllm_forge.bench.summary import Summary
from vllm_forge.bench.verdicts import Word

# Colour and marker of each verdict; readable in print and with red-green blindness.
MARKS = {
    Word.CONTRADICTED: ("#b3261e", "X"),
    Word.HOLDS: ("#1b6e3c", "o"),
    Word.CONSISTENT: ("#3b5b92", "s"),
    Word.UNDECIDED: ("#6b6b6b", "D"),
}


def forest(record: Mapping[str, Any]) -> bytes:
    """Differences of shares in points with their intervals, for a record of ``bench claims``."""
    rows = [row for row in record["verdicts"] if row["interval"]]

    def draw(axes: Axes) -> None:
        for place, row in enumerate(rows):
            value, low, high = row["interval"]
            colour, marker = MARKS[Word(row["word"])]
            axes.plot([low, high], [place, place], color=colour, linewidth=1.5)
            axes.plot(value, place, color=colour, marker=marker)
        for word in dict.fromkeys(row["word"] for row in rows):
            colour, marker = MARKS[Word(word)]
            axes.plot([], [], color=colour, marker=marker, label=word)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [f"{row['id']}  ({row['n']})" for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("difference in percentage points, 95 % interval (Newcombe)")

    return _svg(draw, height=1.2 + 0.32 * len(rows))


def starts(arms: Sequence[Arm], summaries: Sequence[Summary]) -> bytes:
    """Tokens a second of each start, in the order in which they were run: restart noise, drift."""

    def draw(axes: Axes) -> None:
        for arm, summary in zip(arms, summaries, strict=True):
            orders = [start.order for start in arm.result.starts if start.window]
            axes.plot(orders, summary.rates, marker="o", linestyle=":", label=summary.name)
        axes.set_xlabel("start")
        axes.set_ylabel("tokens/s")
        axes.set_ylim(bottom=0)

    return _svg(draw, height=4)


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

    return _svg(draw, height=4)


def positions(summaries: Sequence[Summary]) -> bytes:
    """Share of drafts whose token at a position is accepted; one line for each result."""

    def draw(axes: Axes) -> None:
        for summary in summaries:
            places = range(1, len(summary.positions) + 1)
            shares = [100 * share for share in summary.positions]
            axes.plot(places, shares, marker="o", label=summary.name)
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
        figure.legend(loc="outside upper center", ncols=len(MARKS), frameon=False)
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    # matplotlib ends lines with a space
    return b"".join(line.rstrip() + b"\n" for line in target.getvalue().splitlines())
