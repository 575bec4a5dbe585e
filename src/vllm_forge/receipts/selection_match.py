"""Whether the kernels that ran are those of the recorded selection, made without a GPU.

A receipt has what the boot logs of its engines said; ``records/selection`` says what a line selects
on a SKU. If they differ, one of them is wrong. A log that does not name a kernel differs, too.
"""

from pathlib import Path

from vllm_forge.kernels.selection.questions import grid_question
from vllm_forge.kernels.selection.record import read_selection
from vllm_forge.receipts.envelope import Receipt
from vllm_forge.receipts.errors import ReceiptContradictedError
from vllm_forge.receipts.statement import Configuration

# Engine of tests/gpu/mtp -> the artifact in whose layout its tiny checkpoint is.
LAYOUTS = {"dsv4": "flash-nvfp4-fp8-mtp"}
UNQUANTIZED = "Unquantized"
UNNAMED = "nothing that its boot log names"


def compare(root: Path, receipt: Receipt) -> list[tuple[str, str, str]]:
    """Part of a model, its recorded kernel, and the one that ran, of each engine of a receipt.

    ReceiptContradictedError: nothing is recorded of an engine that ran, or that vLLM refuses it.
    """
    detail = receipt.statement.detail
    kernels: list[tuple[str, str, str]] = []
    for engine, artifact in LAYOUTS.items():
        if engine not in detail.configurations:
            continue
        name = grid_question(detail.sku, artifact)
        answer = read_selection(root / "records", detail.line).answers.get(name)
        if answer is None:
            raise _contradicted(receipt, f"engine {engine} ran, and {name} is not recorded")
        if answer.refused is not None:
            raise _contradicted(
                receipt,
                f"engine {engine} ran, and is recorded as: {answer.refused.message}",
            )
        ran = _ran(detail.configurations[engine])
        draft = answer.draft.moe if answer.draft is not None else None
        recorded = {
            "experts": answer.moe and answer.moe.chosen,
            "draft experts": draft and draft.chosen,
            "FP8 linear layers": answer.linear and answer.linear.chosen,
            "KV cache": answer.engine and answer.engine.kv_cache_dtype,
        }
        kernels += [
            (part, kernel, ran.get(part, UNNAMED)) for part, kernel in recorded.items() if kernel
        ]
    return kernels


def require_selection(root: Path, receipt: Receipt) -> None:
    """Refuse a receipt whose engines took other kernels than the recorded ones."""
    sku = receipt.statement.detail.sku
    for part, recorded, ran in compare(root, receipt):
        if recorded != ran:
            raise _contradicted(
                receipt, f"for {part} vLLM took {ran} on {sku}; recorded is {recorded}"
            )


def _contradicted(receipt: Receipt, what: str) -> ReceiptContradictedError:
    line = receipt.statement.detail.line
    return ReceiptContradictedError(
        what,
        where=str(receipt.path),
        remedy=f"record again: nox -s forge -- kernels select --record --line {line}; if it is the "
        "same, the selection assumes other properties of this GPU than it has",
    )


def _ran(configuration: Configuration) -> dict[str, str]:
    """Part of the model -> kernel, by the boot log."""
    kernels = {}
    for row in configuration.moe:
        kind, _, backend = row.partition(": ")
        kernels["draft experts" if kind == UNQUANTIZED else "experts"] = backend
    for row in configuration.linear[:1]:
        kernels["FP8 linear layers"] = row.partition(": ")[2]
    if configuration.kv_cache:
        kernels["KV cache"] = configuration.kv_cache
    return kernels
