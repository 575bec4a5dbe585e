"""What README.md says of the lines is what matrix.toml and the series say."""

from __future__ import annotations

import re
from pathlib import Path

from vllm_forge.matrix import load
from vllm_forge.patches import read_series

REPO = Path(__file__).parents[2]
HEAD = "| line | vLLM | torch | patches | SKUs |"


def written() -> list[str]:
    """The rows of the table of lines."""
    _, found, after = (REPO / "README.md").read_text(encoding="utf-8").partition(f"{HEAD}\n")
    assert found, f"README.md has no table {HEAD}"
    table = after.partition("\n\n")[0].splitlines()
    assert re.fullmatch(r"[|-]+", table[0])
    return table[1:]


def meant() -> list[str]:
    matrix = load(REPO)
    rows = []
    for name, line in matrix.line.items():
        default = name == matrix.default_line
        skus = ", ".join(
            f"{sku} (development)" if matrix.sku[sku].development else sku for sku in line.skus
        )
        shown = f"**{name}** (default)" if default else name
        patches = len(read_series(REPO / line.series))
        rows.append(f"| {shown} | {line.vllm} | {line.torch} | {patches} | {skus} |")
    return rows


def test_the_table_of_lines() -> None:
    assert written() == meant()
