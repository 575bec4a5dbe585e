"""patches/vllm/dispositions.toml says of each line only what that line's source shows.

Its form is checked when it is read (vllm_forge.patches.dispositions), and that the tests it names
have run, and what they said, by `nox -s prove` itself.
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

PATCHES = Path(__file__).parents[2] / "patches" / "vllm"
WHERE = re.compile(r"(?P<path>\S+):(?P<number>\d+): (?P<text>.+)")


def _dispositions() -> list[dict[str, Any]]:
    with (PATCHES / "dispositions.toml").open("rb") as file:
        entries = tomllib.load(file)["disposition"]
    assert isinstance(entries, list)
    return entries


DISPOSITIONS = _dispositions()


def _decision(entry: dict[str, Any], line: str) -> dict[str, str]:
    """The entry of the line itself, or the one for all lines."""
    decision = entry["on"].get(line, entry["on"].get("all"))
    assert isinstance(decision, dict), f"{entry['about']}: nothing is said about line {line}"
    return decision


@pytest.mark.parametrize("entry", DISPOSITIONS, ids=[entry["about"] for entry in DISPOSITIONS])
def test_the_source_line_that_is_named_is_there(
    line: str, source: Path, entry: dict[str, Any]
) -> None:
    """Python as it is in the image; what no wheel contains as it is in the source archive."""
    import vllm

    where = _decision(entry, line).get("where")
    if where is None:
        return
    found = WHERE.fullmatch(where)
    assert found, f"not PATH:LINE: TEXT: {where}"
    python = found["path"].startswith("vllm/")
    root = Path(vllm.__file__).parent.parent if python else source
    text = (root / found["path"]).read_text(encoding="utf-8").splitlines()
    assert found["text"] in text[int(found["number"]) - 1]


def test_carried_is_what_the_series_has(line: str) -> None:
    listed = (PATCHES / line / "series").read_text(encoding="utf-8").splitlines()
    series = {name.strip() for name in listed if name.strip() and not name.startswith("#")}
    carried = [
        decision["patch"]
        for entry in DISPOSITIONS
        if (decision := _decision(entry, line))["status"] == "carried"
    ]
    assert sorted(carried) == sorted(series)


def test_no_model_calls_cute_arch_fmin(line: str) -> None:
    """Read, not run: the kernels that might call it need cutlass-dsl and a GPU."""
    import vllm

    calls = [
        f"{path}:{node.lineno}"
        for path in sorted((Path(vllm.__file__).parent / "models").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "cute.arch.fmin"
    ]
    assert calls == []
