"""From the result of a green tier to its receipt, which is verified before it is put anywhere."""

import re
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_forge.errors import ForgeError
from vllm_forge.host import parse_json, read_plain
from vllm_forge.project import Project
from vllm_forge.receipts import FOLDER, KEYS
from vllm_forge.receipts.envelope import read_keys, read_receipt, write_receipt
from vllm_forge.receipts.errors import ReceiptIncompleteError, ResultFileError
from vllm_forge.receipts.statement import VALID, Statement
from vllm_forge.receipts.verification import verify

# Of reading a file that is not a result, or a part of one.
MALFORMED = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
GREEN = ("passed", "other GPU")
# What pytest-xdist appends to a test's name with --dist loadgroup (scheduler/loadscope.py).
GROUP = re.compile(r"(?<=[\w\]])@[\w.-]+$")


def make_statement(result: dict[str, Any]) -> Statement:
    """The statement of what ``tests.gpu.harness.run`` wrote; ReceiptIncompleteError if red."""
    tests = {GROUP.sub("", name): row for name, row in result["tests"].items()}
    red = [name for name, row in tests.items() if row["outcome"] not in GREEN]
    if red or not tests or result["exit"] != 0:
        raise ReceiptIncompleteError(
            f"{len(red)} of {len(tests)} tests are not green; pytest exited with {result['exit']}",
            where=", ".join(red[:5]),
            remedy="make receipts of green runs only; see its table",
        )
    plan, subject = result["plan"], result["plan"]["subject"]
    finished = datetime.fromisoformat(result["finished"])
    tier, suite = result["tier"], {"sha256": result["suite_sha256"]}
    detail = {
        "sku": plan["sku"],
        "line": plan["line"],
        "tier": tier,
        "lock_sha256": plan["lock_sha256"],
        "gpus": result["gpus"],
        "host": result["host"],
        "configurations": result["configurations"],
        "tests": dict(sorted(tests.items())),
        "started": result["started"],
        "finished": finished,
        "expires": (finished + VALID).astimezone(UTC),
    }
    return Statement.model_validate(
        {
            "subject": [
                {"name": subject["name"], "digest": {"sha256": subject["sha256"]}},
                {"name": f"vllm source, line {plan['line']}", "digest": {"gitTree": plan["tree"]}},
            ],
            "_type": "https://in-toto.io/Statement/v1",
            "predicateType": "https://in-toto.io/attestation/test-result/v0.1",
            "predicate": {
                "result": "PASSED",
                "configuration": [{"name": f"tests/gpu, tier {tier}", "digest": suite}],
                "passedTests": sorted(n for n, row in tests.items() if row["outcome"] == "passed"),
                "failedTests": [],
                "vllmForge": detail,
            },
        }
    )


def make_receipt(project: Project, result_path: Path, key: Path | None) -> Path:
    """Make the receipt of ``OUTPUT/<tier>.json``; write it only if it is valid here and now.

    It is unsigned without ``key``, an Ed25519 private key in PEM. ResultFileError: not a
    result; for other errors see ``verify``.
    """
    try:
        result: dict[str, Any] = parse_json(read_plain(result_path))
        statement = make_statement(result)
    except MALFORMED as error:
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = f"{error.title} {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ResultFileError(
            f"not the result of a tier: {why}",
            where=str(result_path),
            remedy="take the file that the run wrote: OUTPUT/<tier>.json, whole",
        ) from None
    keys = read_keys(project.root / FOLDER / KEYS)
    with tempfile.TemporaryDirectory() as work:
        try:
            draft = write_receipt(Path(work), statement, key)
            verify(project, read_receipt(draft, keys), datetime.now(UTC), keys)
        except ForgeError as error:
            if error.where.startswith(work):  # gone when it is read
                error.where = str(result_path)
            raise
    return write_receipt(project.root / FOLDER, statement, key)
