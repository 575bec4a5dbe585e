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
from vllm_forge.receipts import FOLDER, KEYS, PACKAGES
from vllm_forge.receipts.envelope import read_keys, read_receipt, write_receipt
from vllm_forge.receipts.errors import ReceiptSubjectError, ResultFileError
from vllm_forge.receipts.statement import make_statement
from vllm_forge.receipts.verification import verify

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.project import Project
    from vllm_forge.receipts.statement import Statement
    from vllm_forge.sources import LockedWheel

# Of reading a file that is not a result, or a part of one.
MALFORMED = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def make_receipt(project: Project, result_path: Path, key: Path | None) -> Path:
    """Make the receipt of a green tier; write it only if it is valid.

    Args:
        project: the repository.
        result_path: ``OUTPUT/<tier>.json`` of a run; of an environment, its packages beside it.
        key: an Ed25519 private key in PEM; without it the receipt is unsigned.

    Raises:
        ResultFileError: not a result, or no list of packages beside it.
        ReceiptIncompleteError, ReceiptSuiteError, ReceiptSubjectError, ReceiptExpiredError: the
            run was not green, or not of what the repository now holds.
        ReceiptKeyError: not a key, or its public half is not among the trusted.
    """
    matrix, text = project.matrix, ""
    try:
        result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
        plan = result["plan"]
        line_name, kind = plan["line"], plan["subject"]["kind"]
        if line_name not in matrix.line:
            raise ReceiptSubjectError(
                f"the result is of line {line_name!r}, which is not defined in matrix.toml",
                where=str(result_path),
                remedy=f"lines: {', '.join(matrix.line)}",
            )
        if kind == "environment":
            text = _packages(result_path.with_name(PACKAGES))
            lock = project.lock(line_name)
            # A kit lists its own differences; those of the installed packages are added.
            plan["differences"] = [*plan.get("differences", ()), *differences(text, lock.wheels)]
        statement = make_statement(result)
    except MALFORMED as error:
        raise _malformed(result_path, error) from None
    keys = read_keys(project.root / FOLDER / KEYS)
    with tempfile.TemporaryDirectory() as work:
        try:
            draft = _write(Path(work), statement, text, key)
            verify(project, read_receipt(draft, keys), datetime.now(UTC))
        except ForgeError as error:
            if error.where.startswith(work):  # gone when it is read
                error.where = str(result_path)
            raise
    return _write(project.root / FOLDER, statement, text, key)


def _packages(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ResultFileError(
            f"cannot read the list of packages: {error}",
            where=str(path),
            remedy=f"bring {PACKAGES} too: the run wrote it beside its result",
        ) from None


def _malformed(path: Path, error: Exception) -> ResultFileError:
    why = f"{type(error).__name__}: {error}"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        why = f"{error.title} {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return ResultFileError(
        f"not the result of a tier: {why}",
        where=str(path),
        remedy="take the file that the run wrote: OUTPUT/<tier>.json, whole",
    )


def _write(folder: Path, statement: Statement, packages: str, key: Path | None) -> Path:
    if packages:
        with atomic_path(folder / statement.sha256 / PACKAGES) as aside:
            aside.write_text(packages, encoding="utf-8")
    return write_receipt(folder, statement, key)


def differences(text: str, wheels: Sequence[LockedWheel]) -> list[str]:
    """Differences of an environment from a lock; a local version (``+cu130``) is not one.

    Args:
        text: of ``environment.txt``: rows ``name==version record=...`` and comments.
        wheels: of the lock.
    """
    pairs = (row.split(" ")[0].partition("==") for row in text.splitlines() if row[:1] != "#")
    installed = {name: version for name, _, version in pairs}
    return [
        f"{wheel.name}: {version}, the lock has {wheel.version}"
        for wheel in wheels
        if (version := installed.get(wheel.name, "absent")).partition("+")[0] != wheel.version
    ]
