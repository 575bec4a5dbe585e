"""Whether the kernels that ran are those that the oracle named without a GPU.

``records/selection`` says what each line selects on each SKU. A receipt has what the boot logs of
its
engines said. Of an engine that ran they must agree, or one of them is worth nothing: a log that
does not name a kernel agrees with nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_forge.kernels.selection.questions import grid_question
from vllm_forge.kernels.selection.record import read_selection
from vllm_forge.receipts.errors import ReceiptContradictedError

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_forge.receipts.envelope import Receipt
    from vllm_forge.receipts.statement import Configuration

# Engine of tests/gpu/mtp -> the artifact in whose layout its tiny checkpoint is.
LAYOUTS = {"dsv4": "flash-nvfp4-fp8-mtp"}
UNQUANTIZED = "Unquantized"
NOTHING = "nothing that its boot log names"


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """One selection.

    Attributes:
        what: of which part.
        oracle: what records/selection says.
        ran: what the boot log said.
    """

    what: str
    oracle: str
    ran: str


def compare(root: Path, receipt: Receipt) -> list[Foretold]:
    """All selections of which the oracle speaks, of engines that the receipt has.

    Raises:
        SelectionFileError: there is no file for the line, or it is malformed.
        ReceiptContradictedError: the oracle was not asked about an engine that ran, or says that
            vLLM refuses it.
    """
    detail = receipt.statement.detail
    found: list[Foretold] = []
    for engine, artifact in LAYOUTS.items():
        if engine not in detail.configurations:
            continue
        name = grid_question(detail.sku, artifact)
        answer = read_selection(root / "records", detail.line).answers.get(name)
        if answer is None:
            raise _contradicted(
                receipt, f"engine {engine} ran, and the oracle was not asked {name}"
            )
        if answer.refused is not None:
            raise _contradicted(
                receipt, f"engine {engine} ran, and the oracle says: {answer.refused.message}"
            )
        ran = _ran(detail.configurations[engine])
        draft = answer.draft.moe if answer.draft is not None else None
        said = {
            "experts": answer.moe and answer.moe.chosen,
            "draft experts": draft and draft.chosen,
            "FP8 linear layers": answer.linear and answer.linear.chosen,
            "KV cache": answer.engine and answer.engine.kv_cache_dtype,
        }
        found += [
            Foretold(what=what, oracle=oracle, ran=ran.get(what, NOTHING))
            for what, oracle in said.items()
            if oracle
        ]
    return found


def require_foretold(root: Path, receipt: Receipt) -> None:
    """Refuse a receipt whose engines took other kernels than the oracle says.

    Raises:
        ReceiptContradictedError: with the first difference.
    """
    for row in compare(root, receipt):
        if row.oracle != row.ran:
            raise _contradicted(
                receipt,
                f"for {row.what} vLLM took {row.ran} on {receipt.statement.detail.sku}, and the "
                f"oracle says {row.oracle}",
            )


def _contradicted(receipt: Receipt, what: str) -> ReceiptContradictedError:
    line = receipt.statement.detail.line
    return ReceiptContradictedError(
        what,
        where=str(receipt.path),
        remedy=f"ask again: nox -s forge -- kernels select --record --line {line}; if it says the "
        "same, "
        "what the oracle declares of this GPU is not what the GPU is",
    )


def _ran(configuration: Configuration) -> dict[str, str]:
    """What a boot log names, of what the oracle names too."""
    found = {}
    for row in configuration.moe:
        kind, _, backend = row.partition(": ")
        found["draft experts" if kind == UNQUANTIZED else "experts"] = backend
    for row in configuration.linear[:1]:
        found["FP8 linear layers"] = row.partition(": ")[2]
    if configuration.kv_cache:
        found["KV cache"] = configuration.kv_cache
    return found
