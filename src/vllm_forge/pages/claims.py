"""Verdicts on published figures, from records/bench/claims.json."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from vllm_forge.bench.claims import CLAIMS
from vllm_forge.bench.errors import ClaimsStaleError
from vllm_forge.pages.markdown import escape, table
from vllm_forge.project import Project

RECORD = "records/bench/claims.json"
CHART = "records/bench/claims.svg"
PAGE = "docs/generated/claims.md"
HEAD = ["figure", "verdict", "n", "why"]  # on a terminal
GROUPS = {
    "quality": "Quality",
    "speed": "Throughput",
    "sweep": "Concurrency sweep",
    "acceptance": "Acceptance",
    "size": "Checkpoint",
}
BOLD = {"contradicted": "**contradicted**"}


def claims(project: Project) -> str:
    """One table for each group of figures; ClaimsStaleError if the record is of other rows."""
    record = project.read_json(RECORD)
    content = (project.root / CLAIMS).read_bytes()
    if record["claims_sha256"] != hashlib.sha256(content).hexdigest():
        what = f"{RECORD} was made from another {CLAIMS.name}"
        raise ClaimsStaleError(what, where=str(project.root), remedy="run: nox -s bench -- claims")
    lines = [f"{record['card']}, {record['revision']}: {summary(record)}."]
    for group, title in GROUPS.items():
        cells = (
            [f"{escape(row['says'])} ({escape(row['at'])})", BOLD.get(row["word"], row["word"]),
             row["n"], row["method"], escape(row["detail"])]
            for row in record["verdicts"]
            if row["group"] == group
        )  # fmt: skip
        head = ["figure", "verdict", "n", "method", "why"]
        lines += ["", f"## {title}", "", table(head, cells)]
    return "\n".join(lines)


def summary(record: dict[str, Any]) -> str:
    """How many figures have each verdict."""
    count = Counter(row["word"] for row in record["verdicts"])
    return ", ".join(f"{number} {word}" for word, number in sorted(count.items()))


def terminal_rows(record: dict[str, Any]) -> Iterator[list[str]]:
    """Of a table with ``HEAD``."""
    for row in record["verdicts"]:
        yield [row["says"], row["word"], row["n"], f"{row['method']}: {row['detail']}"]
