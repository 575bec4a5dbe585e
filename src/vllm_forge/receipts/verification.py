"""Verify committed receipts without a GPU, each against the repository as it is."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_forge.patches import read_tree_lock
from vllm_forge.receipts import FOLDER, KEYS
from vllm_forge.receipts.envelope import read_keys, read_receipt
from vllm_forge.receipts.errors import (
    ReceiptExpiredError,
    ReceiptIncompleteError,
    ReceiptKeyError,
    ReceiptSubjectError,
    ReceiptSuiteError,
    ReceiptUnreadableError,
)
from vllm_forge.receipts.selection_match import require_selection
from vllm_forge.receipts.statement import VALID
from vllm_forge.receipts.suite import read_tiers, require_cases, suite_hash

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.project import Project
    from vllm_forge.receipts.envelope import Receipt


def receipt_paths(root: Path) -> list[Path]:
    """All committed receipts: ``records/receipts/<digest>/*.json``.

    Raises:
        ReceiptUnreadableError: another file, in which a receipt would be overlooked; a link, whose
            target is not committed; or an unreadable folder.
    """
    folders = [folder for folder in _entries(root / FOLDER) if folder.name != KEYS]
    paths = [path for folder in folders for path in _entries(folder)]
    for path in paths:
        if path.suffix != ".json":
            raise _foreign(path, "not a receipt")
    return paths


def _entries(folder: Path) -> list[Path]:
    """Entries of a folder, without the temporary ones of a killed writer."""
    try:
        paths = [Path(entry) for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)]
    except FileNotFoundError:
        paths = []
    except OSError as error:
        raise _foreign(folder, str(error)) from None
    for path in (folder, *paths):
        if path.is_symlink():
            raise _foreign(path, "it is a link")
    return [path for path in paths if not path.name.startswith(".tmp-")]


def _foreign(path: Path, why: str) -> ReceiptUnreadableError:
    return ReceiptUnreadableError(
        f"not {FOLDER}/<digest>/<receipt>.json: {why}",
        where=str(path),
        remedy=f"keep nothing but receipts, each in its image's folder, and {KEYS} there",
    )


def verify_all(
    project: Project, now: datetime | None = None, *, signed: bool = False
) -> list[Receipt]:
    """Verify every committed receipt.

    Args:
        project: the repository.
        now: time of the check; default: the clock.
        signed: refuse unsigned ones.

    Raises:
        ForgeError: the class says why the first invalid one is refused.
    """
    paths, receipts = receipt_paths(project.root), []
    keys = read_keys(project.root / FOLDER / KEYS)
    for path in paths:
        receipt = read_receipt(path, keys)
        if signed and not receipt.signed_by:
            raise ReceiptKeyError(
                "the receipt is unsigned",
                where=str(path),
                remedy="sign it where it is made: "
                "nox -s forge -- gpu receipts --result FILE --key KEY",
            )
        verify(project, receipt, now or datetime.now(UTC))
        receipts.append(receipt)
    return receipts


def verify(project: Project, receipt: Receipt, now: datetime) -> None:
    """Compare one receipt with the repository.

    Raises:
        ForgeError: the class says what differs.
    """
    _require_time(receipt, now)
    _require_subject(project, receipt)
    _require_suite(project, receipt)
    _require_green(receipt)
    require_cases(project.root, receipt)
    require_selection(project.root, receipt)


def _require_time(receipt: Receipt, now: datetime) -> None:
    detail = receipt.statement.detail
    last = min(detail.expires, detail.finished + VALID)
    if not detail.started <= detail.finished <= now or now >= last or detail.expires != last:
        raise ReceiptExpiredError(
            f"the receipt is of {detail.finished.date()}, valid until {detail.expires.date()}; at "
            f"most {VALID.days} days are accepted",
            where=str(receipt.path),
            remedy="run the suite again, or delete the receipt: its cell is then not run",
        )


def _require_subject(project: Project, receipt: Receipt) -> None:
    matrix, statement = project.matrix, receipt.statement
    detail = statement.detail
    expected = receipt.path.parent.parent / statement.sha256 / statement.file_name
    if expected != receipt.path:
        raise _subject(
            receipt, f"sha256:{statement.sha256} and {statement.file_name} do not match its path"
        )
    if detail.sku not in matrix.sku or detail.line not in matrix.line:
        raise _subject(receipt, f"{detail.sku} or line {detail.line} is not defined in matrix.toml")
    if detail.sku in matrix.line[detail.line].unsupported:
        raise _subject(receipt, f"line {detail.line} does not support {detail.sku}")
    sku = matrix.sku[detail.sku]
    if any(
        gpu.compute_capability != sku.compute_capability or not gpu.name.startswith(sku.device)
        for gpu in detail.gpus
    ):
        raise _subject(receipt, f"{detail.gpus[0].name} is not {detail.sku}")
    series = project.root / matrix.line[detail.line].series
    tree = read_tree_lock(series, detail.line).result
    if statement.tree != tree:
        raise _subject(receipt, f"tree {statement.tree}, the series now gives {tree}")


def _subject(receipt: Receipt, why: str) -> ReceiptSubjectError:
    return ReceiptSubjectError(
        f"the receipt is for another subject: {why}",
        where=str(receipt.path),
        remedy="run the suite on the present one: a receipt is valid for the bytes it tested",
    )


def _require_suite(project: Project, receipt: Receipt) -> None:
    statement = receipt.statement
    detail = statement.detail
    if detail.tier not in (tiers := read_tiers(project.root)):
        raise ReceiptSuiteError(
            f"unknown tier {detail.tier}",
            where=str(receipt.path),
            remedy=f"tiers: {', '.join(tiers)}; delete the receipt",
        )
    if statement.suite != (now := suite_hash(project, detail.tier, detail.sku)):
        raise ReceiptSuiteError(
            f"the receipt was made by suite {statement.suite[:12]}, tier {detail.tier} is now "
            f"{now[:12]}",
            where=str(receipt.path),
            remedy="tests or their bounds were changed since: run the suite again",
        )


def _require_green(receipt: Receipt) -> None:
    """The list of passed tests must agree with each verdict, and no margin be exceeded."""
    predicate = receipt.statement.predicate
    rows = predicate.detail.tests.items()
    passed = sorted(name for name, test in rows if test.outcome == "passed")
    red = [
        f"{name}: {what} is {pair.measured:g}, its bound {pair.bound:g}"
        for name, test in rows
        for what, pair in test.margins.items()
        if pair.measured > pair.bound
    ]
    if list(predicate.passed) != passed:
        red.append("passedTests are not the tests that passed, each once and in order")
    if red:
        raise ReceiptIncompleteError(
            f"the receipt is not green: {red[0]}",
            where=str(receipt.path),
            remedy="delete it, and run the suite again",
        )


def describe(receipts: Sequence[Receipt]) -> str:
    """One line for each."""
    rows = []
    for receipt in receipts:
        detail = receipt.statement.detail
        seal = f"signed by {', '.join(receipt.signed_by)}" if receipt.signed_by else "unsigned"
        rows.append(
            f"{detail.sku}  line {detail.line}  tier {detail.tier}  "
            f"sha256:{receipt.statement.sha256[:12]}  {len(receipt.statement.predicate.passed)} "
            f"tests  until {detail.expires.date()}  {seal}"
        )
    return "\n".join(rows) or "no receipts: nothing was run"
