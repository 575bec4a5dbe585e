"""``records/gpu-cases.json``: every case of the GPU suite, parameters included.

A test function with parameters is as many tests, and a receipt must have all of them. Which they
are is known only to pytest, which the verifier does without: ``python -m tests.gpu.list_cases``
writes them down, together with the hash of the suite that they are of, and a test holds the file to
what pytest collects.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_forge.receipts.errors import GpuSuiteError, ReceiptIncompleteError
from vllm_forge.receipts.suite import marker_of

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_forge.receipts.envelope import Receipt

FILE = "records/gpu-cases.json"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One test with its parameters.

    Attributes:
        archs: markers of the GPUs that it is for; none: all.
        engines: engines that it reads, each of which leaves a boot log.
    """

    archs: frozenset[str]
    engines: frozenset[str]


def read_cases(root: Path, tier: str, suite: str) -> dict[str, Case]:
    """Node id -> case, of one tier.

    Args:
        root: the repository.
        tier: name.
        suite: hash of the tier's suite as it is now.

    Raises:
        GpuSuiteError: there is no list of them, or it is of another suite.
    """
    path = root / FILE
    remedy = "write it anew, where pytest is: python -m tests.gpu.list_cases"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))[tier]
        listed = rows["suite_sha256"]
        cases = {
            name: Case(archs=frozenset(row["archs"]), engines=frozenset(row["engines"]))
            for name, row in rows["cases"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise GpuSuiteError(
            f"no list of the cases of tier {tier}: {type(error).__name__}: {error}",
            where=str(path),
            remedy=remedy,
        ) from None
    if listed != suite:
        raise GpuSuiteError(
            f"the cases of tier {tier} are of suite {listed[:12]}, it is now {suite[:12]}",
            where=str(path),
            remedy=remedy,
        )
    return cases


def require_cases(root: Path, receipt: Receipt) -> None:
    """Refuse a receipt whose tests are not the cases of its tier, each green on its GPU.

    The receipt's suite hash must have been found to be the suite's.

    Raises:
        GpuSuiteError: see read_cases.
        ReceiptIncompleteError: a case is missing, unknown, or without the log of its engine.
    """
    detail = receipt.statement.detail
    cases = read_cases(root, detail.tier, receipt.statement.suite)
    marker = marker_of(detail.gpus[0].compute_capability)
    here = {name for name, case in cases.items() if not case.archs or marker in case.archs}
    passed = {name for name, test in detail.tests.items() if test.outcome == "passed"}
    engines = {engine for name in here for engine in cases[name].engines}
    for what, names in (
        ("lacks", here - passed),
        ("has, of tests that the tier has not,", {*detail.tests} - {*cases}),
        ("has no boot log of", engines - {*detail.configurations}),
    ):
        if names:
            raise ReceiptIncompleteError(
                f"the receipt of tier {detail.tier} {what} {len(names)}: "
                f"{', '.join(sorted(names)[:3])}",
                where=str(receipt.path),
                remedy="run the whole tier, each test with all of its parameters",
            )
