"""Charts as SVG: the same bytes for the same data and the same matplotlib."""

import io
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

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
    with mpl.rc_context():
        mpl.rcdefaults()  # not the user's settings
        mpl.rcParams["svg.hashsalt"] = "vllm-forge"
        mpl.rcParams["svg.fonttype"] = "none"  # text stays text, and can be searched
        figure = Figure(figsize=(9, 1.2 + 0.32 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
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
        figure.legend(loc="outside upper center", ncols=len(MARKS), frameon=False)
        return _svg(figure)


def _svg(figure: Figure) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    # matplotlib ends lines with a space
    return b"".join(line.rstrip() + b"\n" for line in target.getvalue().splitlines())
