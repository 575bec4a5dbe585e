"""``docs/generated/status.md``: which cells have a receipt. What has none says "not run"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.host import atomic_path
from vllm_forge.receipts.lookup import NOT_RUN
from vllm_forge.receipts.selection_match import compare
from vllm_forge.receipts.suite import read_tiers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vllm_forge.matrix import Matrix
    from vllm_forge.receipts.envelope import Receipt
    from vllm_forge.receipts.statement import Detail

PAGE = "docs/generated/status.md"
HEAD = """# What was run

Made by `nox -s receipts -- --update` from the receipts below `records/receipts`, each of which it
verifies first: a cell without a receipt for the present suite and series was **not run**, whatever
ran on another SKU. A receipt holds for one image or environment, and for 90 days.

"""
FOOT = """
*unsigned* says that only the commit that brought a receipt vouches for it; see
[gpu-tests.md](gpu-tests.md).
"""


def status_text(root: Path, matrix: Matrix, receipts: Sequence[Receipt]) -> str:
    """The page: SKU by line and tier."""
    tiers = list(read_tiers(root))
    columns = [f"{line}, {tier}" for line in matrix.line for tier in tiers]
    lines = [
        f"| SKU | {' | '.join(columns)} |",
        f"|{'---|' * (len(columns) + 1)}",
    ]
    for sku in matrix.sku:
        cells = [_cell(matrix, sku, line, tier, receipts) for line in matrix.line for tier in tiers]
        lines.append(f"| {sku} | {' | '.join(cells)} |")
    return HEAD + "\n".join(lines) + "\n" + _evidence(receipts) + _foretold(root, receipts) + FOOT


def _cell(matrix: Matrix, sku: str, line: str, tier: str, receipts: Sequence[Receipt]) -> str:
    if sku in matrix.line[line].unsupported:
        return "unsupported"
    found = [
        receipt
        for receipt in receipts
        if (receipt.statement.detail.sku, receipt.statement.detail.line) == (sku, line)
        and receipt.statement.detail.tier == tier
    ]
    return ", ".join(f"[{_kind(receipt)}]({_link(receipt)})" for receipt in found) or NOT_RUN


def _kind(receipt: Receipt) -> str:
    seal = "" if receipt.signed_by else ", unsigned"
    return f"{receipt.statement.detail.kind}{seal}, {receipt.statement.detail.finished.date()}"


def _link(receipt: Receipt) -> str:
    return f"receipts/{receipt.path.parent.name}/{receipt.path.name}"


def _evidence(receipts: Sequence[Receipt]) -> str:
    if not receipts:
        return ""
    columns = "receipt, GPU, driver, departures from the lock, tests, took, closest margin"
    head = columns.split(", ")
    rows = ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for receipt in receipts:
        detail = receipt.statement.detail
        rows.append(
            f"| [{detail.sku} {detail.line} {detail.tier}]({_link(receipt)}) "
            f"| {detail.gpus[0].name} | {detail.gpus[0].driver} | {_departures(detail)} "
            f"| {len(receipt.statement.predicate.passed)} | {_took(detail)} | {_closest(receipt)} |"
        )
    return "\n".join(rows) + "\n"


def _departures(detail: Detail) -> str:
    """How many; the receipt has each as a sentence. An image has none."""
    return str(len(detail.differences)) if detail.differences else "none"


def _took(detail: Detail) -> str:
    return f"{(detail.finished - detail.started).total_seconds():.0f} s"


def _foretold(root: Path, receipts: Sequence[Receipt]) -> str:
    """Kernels that ran, where the oracle had named them; all are equal, or no receipt holds."""
    rows = [
        f"| [{receipt.statement.detail.sku} {receipt.statement.detail.line}]({_link(receipt)}) "
        f"| {', '.join(f'{row.what} {row.ran}' for row in found)} |"
        for receipt in receipts
        if (found := compare(root, receipt))
    ]
    if not rows:
        return ""
    head = [
        "",
        "What vLLM took on the GPU is what the [oracle](selection.md) says without one:",
        "",
    ]
    return "\n".join([*head, "| receipt | kernels |", "|---|---|", *rows]) + "\n"


def _closest(receipt: Receipt) -> str:
    """The test that came nearest to its bound."""
    shares = [
        (pair.measured / pair.bound, f"{name.rpartition('::')[2]}, {what}")
        for name, test in receipt.statement.detail.tests.items()
        for what, pair in test.margins.items()
        if pair.bound > 0
    ]
    if not shares:
        return "-"
    share, name = max(shares)
    return f"{share:.0%} of its bound: {name}"


def write_status(root: Path, matrix: Matrix, receipts: Sequence[Receipt]) -> Path:
    """Write the page; return its path."""
    with atomic_path(root / PAGE) as aside:
        aside.write_text(status_text(root, matrix, receipts), encoding="utf-8")
    return root / PAGE
