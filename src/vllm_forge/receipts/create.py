"""From the result of a green tier to its receipt, which is verified before it is put anywhere."""

from __future__ import annotations

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vllm_forge.errors import ForgeError
from vllm_forge.host import atomic_path
from vllm_forge.matrix import load
from vllm_forge.receipts.envelope import read_keys, read_receipt, write_receipt
from vllm_forge.receipts.errors import GpuSuiteError, ReceiptSubjectError
from vllm_forge.receipts.lookup import FOLDER, KEYS
from vllm_forge.receipts.packages import FILE as ENVIRONMENT
from vllm_forge.receipts.packages import versions
from vllm_forge.receipts.statement import make_statement
from vllm_forge.receipts.verification import verify
from vllm_forge.sources import read_lock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.receipts.statement import Statement
    from vllm_forge.sources import LockedWheel

# What a file that is no result, or a part of one, makes of reading it.
NOT_A_RESULT = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def make_receipt(root: Path, result_path: Path, key: Path | None) -> Path:
    """From the result of a green tier to a receipt that holds, beside its list of packages.

    Raises:
        GpuSuiteError: the file is not a result, or the list of packages beside it is missing.
        ReceiptIncompleteError, ReceiptSuiteError, ReceiptSubjectError, ReceiptExpiredError: the
            run was not green, or not of what the repository now holds.
        ReceiptKeyError: the key is none, or its public half is not among the trusted.
    """
    matrix = load(root)
    try:
        result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
        line_name, kind = result["plan"]["line"], result["plan"]["subject"]["kind"]
        known = line_name in matrix.line
    except NOT_A_RESULT as error:
        raise _no_result(result_path, error) from None
    if not known:
        raise ReceiptSubjectError(
            f"the result is of line {line_name!r}, which matrix.toml has not",
            where=str(result_path),
            remedy=f"lines: {', '.join(matrix.line)}",
        )
    text = ""
    if kind == "environment":
        text = _packages(result_path.with_name(ENVIRONMENT))
        line = matrix.line[line_name]
        lock = read_lock(root, line_name, line, matrix.base)
        # A kit says itself in what it departs; what the list of packages shows stands beside that.
        result["plan"]["differences"] = [
            *result["plan"].get("differences", ()),
            *differences(text, lock.wheels),
        ]
    try:
        statement = make_statement(result)
    except NOT_A_RESULT as error:
        raise _no_result(result_path, error) from None
    keys = read_keys(root / FOLDER / KEYS)
    with tempfile.TemporaryDirectory() as work:  # what would be refused is not put with the others
        try:
            draft = _place(Path(work), statement, text, key)
            verify(root, matrix, read_receipt(draft, keys), datetime.now(UTC))
        except ForgeError as error:
            if error.where.startswith(work):  # which nobody can look at
                error.where = str(result_path)
            raise
    return _place(root / FOLDER, statement, text, key)


def _packages(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GpuSuiteError(
            f"no list of the packages that were tested: {error}",
            where=str(path),
            remedy=f"bring {ENVIRONMENT} too: the run wrote it beside its result",
        ) from None


def _no_result(path: Path, error: Exception) -> GpuSuiteError:
    why = f"{type(error).__name__}: {error}"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        why = f"{error.title} {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return GpuSuiteError(
        f"not the result of a tier: {why}",
        where=str(path),
        remedy="take the file that the run wrote: OUTPUT/<tier>.json, whole",
    )


def _place(folder: Path, statement: Statement, packages: str, key: Path | None) -> Path:
    if packages:
        with atomic_path(folder / statement.sha256 / ENVIRONMENT) as aside:
            aside.write_text(packages, encoding="utf-8")
    return write_receipt(folder, statement, key)


def differences(text: str, wheels: Sequence[LockedWheel]) -> list[str]:
    """In what an environment departs from a lock; a local version (``+cu130``) is no departure."""
    found = versions(text)
    rows = []
    for wheel in wheels:
        here = found.get(wheel.name, "absent")
        if here.partition("+")[0] != wheel.version:
            rows.append(f"{wheel.name}: {here}, the lock has {wheel.version}")
    return rows
