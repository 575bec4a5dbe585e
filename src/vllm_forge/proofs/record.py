"""A line's proof as a table, and as a committed file that is the same for the same inputs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from vllm_forge.host import atomic_path, console

if TYPE_CHECKING:
    from vllm_forge.images import ImagePlan
    from vllm_forge.patches import Applied, Decision
    from vllm_forge.patches.variants import Pair, Variant
    from vllm_forge.proofs.verdict import Run

FOLDER = Path("records/proofs")


@dataclass(frozen=True, kw_only=True)
class Proven:
    """Every run of a line. ``without`` has one run per variant, in the series' order."""

    line_name: str
    plan: ImagePlan
    applied: Applied
    pairs: tuple[Pair, ...]
    variants: tuple[Variant, ...]
    decided: tuple[tuple[str, Decision], ...]
    whole: Run
    without: tuple[Run, ...]


def show(found: Proven) -> None:
    """Print the table of a line."""
    table = Table(title=f"line {found.line_name}, vLLM {found.plan.cell.line.vllm}")
    for column in ("patch", "without it", "with the series", "why it is red"):
        table.add_column(column, overflow="fold")
    for variant, run in zip(found.variants, found.without, strict=True):
        patch = variant.left_out
        table.add_row(
            patch.name,
            _counts(run.outcomes(patch.proves)),
            _counts(found.whole.outcomes(patch.proves)),
            escape(run.why),
        )
    counts = Counter(found.whole.tests.values())
    table.add_row("all contract tests", "", _counts(counts), "", style="bold")
    console.print(table)


def record(found: Proven) -> dict[str, Any]:
    """The content of ``records/proofs/<line>.json``."""
    line = found.plan.cell.line
    counts = Counter(found.whole.tests.values())
    return {
        "made by": f"nox -s prove -- --line {found.line_name}",
        "line": found.line_name,
        "vllm": line.vllm,
        "environment": {
            "lock": line.lock,
            "lock_sha256": found.plan.lock.digest,
            "python": line.python,
            "torch": line.torch,
        },
        "trees": {"base": found.applied.base, "result": found.applied.result},
        "contract_tests": {"passed": counts["passed"], "of other lines": counts["skipped"]},
        "patches": [
            {
                "name": variant.left_out.name,
                "bug": variant.left_out.fields["Bug"],
                "proves": variant.left_out.proves,
                "with": dict(sorted(found.whole.outcomes(variant.left_out.proves).items())),
                "without": {
                    "tree": variant.tree,
                    "made as": variant.way,
                    "exit": run.exit,
                    **dict(sorted(run.outcomes(variant.left_out.proves).items())),
                    "why": run.why,
                },
            }
            for variant, run in zip(found.variants, found.without, strict=True)
        ],
        "not carried": [
            {
                "about": about,
                "status": decision.status,
                "shown by": decision.proof,
                **dict(sorted(found.whole.outcomes(decision.proof).items())),
            }
            for about, decision in found.decided
            if decision.proof is not None
        ],
        "order": [asdict(pair) for pair in found.pairs],
        "applied twice": "same trees; each patch is refused on its own result",
    }


def write_record(root: Path, found: Proven) -> Path:
    """Write the file; return its path relative to the repository."""
    path = FOLDER / f"{found.line_name}.json"
    with atomic_path(root / path) as aside:
        aside.write_text(json.dumps(record(found), indent=1) + "\n", encoding="utf-8")
    return path


def _counts(outcomes: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
