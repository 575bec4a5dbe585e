"""patches/vllm/dispositions.toml says of each line only what that line's source and tests show."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
PATCHES = REPOSITORY / "patches" / "vllm"
STATUSES = {"carried", "retired", "refused", "not-applicable"}
NEEDS = {"carried": {"patch"}, "retired": {"landed", "where"}, "refused": {"proof"}}
KNOWN = {"status", "reason", "patch", "landed", "where", "proof", "undecided"}
WHERE = re.compile(r"(?P<path>vllm/\S+\.py):(?P<number>\d+): (?P<text>.+)")


def _dispositions() -> list[dict[str, Any]]:
    with (PATCHES / "dispositions.toml").open("rb") as file:
        entries = tomllib.load(file)["disposition"]
    assert isinstance(entries, list)
    return entries


DISPOSITIONS = _dispositions()


def _decision(entry: dict[str, Any], line: str) -> dict[str, str]:
    """The entry of the line itself, or the one for all lines."""
    decision = entry["on"].get(line, entry["on"].get("all"))
    assert decision is not None, f"{entry['about']}: nothing is said about line {line}"
    assert isinstance(decision, dict)
    return decision


def _lines_of(decorators: list[ast.expr]) -> set[str] | None:
    """The lines that a test is marked for; None when it runs on all."""
    for decorator in decorators:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.lines":
            return {str(ast.literal_eval(argument)) for argument in decorator.args}
    return None


@pytest.mark.parametrize("entry", DISPOSITIONS, ids=[entry["about"] for entry in DISPOSITIONS])
def test_a_decision_has_what_its_status_needs(line: str, entry: dict[str, Any]) -> None:
    decision = _decision(entry, line)
    assert entry["title"]
    assert entry["upstream"]
    assert decision["status"] in STATUSES
    assert decision["reason"].strip()
    assert set(decision) <= KNOWN
    assert NEEDS.get(decision["status"], set()) <= set(decision)


@pytest.mark.parametrize("entry", DISPOSITIONS, ids=[entry["about"] for entry in DISPOSITIONS])
def test_the_source_line_that_is_named_is_there(line: str, entry: dict[str, Any]) -> None:
    """Not so for CMakeLists.txt and csrc, which no wheel contains."""
    import vllm

    where = _decision(entry, line).get("where")
    if where is None or not where.startswith("vllm/"):
        return
    found = WHERE.fullmatch(where)
    assert found, f"not PATH:LINE: TEXT: {where}"
    source = Path(vllm.__file__).parent.parent / found["path"]
    text = source.read_text(encoding="utf-8").splitlines()[int(found["number"]) - 1]
    assert found["text"] in text


@pytest.mark.parametrize("entry", DISPOSITIONS, ids=[entry["about"] for entry in DISPOSITIONS])
def test_the_proof_that_is_named_runs_on_this_line(line: str, entry: dict[str, Any]) -> None:
    proof = _decision(entry, line).get("proof")
    if proof is None:
        return
    path, _, name = proof.partition("::")
    tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    assert len(functions) == 1, f"{path} defines {name} {len(functions)} times"
    lines = _lines_of(functions[0].decorator_list)
    assert lines is None or line in lines, f"{proof} does not run on line {line}"


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
