"""docs/generated/status.md: which cells have a receipt. All others are "not run"."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from vllm_forge.host import printable
from vllm_forge.pages.markdown import escape, table
from vllm_forge.project import Project
from vllm_forge.receipts import FOLDER
from vllm_forge.receipts.receipt import Receipt, closest_margin
from vllm_forge.receipts.suite import read_suite
from vllm_forge.receipts.verification import NOT_RUN, compare_kernels, read_receipts, seal


def status(project: Project) -> str:
    receipts = read_receipts(project)
    text = status_text(project, receipts.valid)
    if not receipts.refused:
        return text
    refused = [
        f"* {escape(printable(f'{path.relative_to(project.root)}: {error.what}'))}"
        for path, error in receipts.refused
    ]
    return "\n".join([text, "\nRefused:\n", *refused])


def status_text(project: Project, receipts: Sequence[Receipt]) -> str:
    """The page, from the valid receipts: SKU by line and tier."""
    matrix = project.matrix
    links = defaultdict(list)
    for receipt in receipts:
        detail = receipt.statement.detail
        text = f"image, {escape(seal(receipt))}, {detail.finished.date()}"
        links[detail.sku, detail.line, detail.tier].append(_link(text, receipt))
    columns = [(line, tier) for line in matrix.line for tier in read_suite(project.root).tier]
    rows = [
        [
            sku,
            *(
                "unsupported"
                if sku in matrix.line[line].unsupported
                else ", ".join(links[sku, line, tier]) or NOT_RUN
                for line, tier in columns
            ),
        ]
        for sku in matrix.sku
    ]
    grid = table(["SKU", *(f"{line}, {tier}" for line, tier in columns)], rows)
    return (grid + "\n" + _evidence(project.root, receipts)).rstrip()


def _link(text: str, receipt: Receipt) -> str:
    return f"[{text}](../../{FOLDER}/{receipt.path.parent.name}/{receipt.path.name})"


def _evidence(root: Path, receipts: Sequence[Receipt]) -> str:
    """How each tier ran; and its kernels, where the recorded selection names them."""
    columns = "receipt, GPU, driver, tests, took, closest margin"
    rows, kernels = [], []
    for receipt in receipts:
        detail = receipt.statement.detail
        rows.append(
            [
                _link(f"{detail.sku} {detail.line} {detail.tier}", receipt),
                detail.gpus[0].name,
                detail.gpus[0].driver,
                len(receipt.statement.predicate.passed),
                f"{(detail.finished - detail.started).total_seconds():.0f} s",
                closest_margin(detail),
            ]
        )
        if selected := [f"{part} {ran}" for part, _, ran in compare_kernels(root, receipt)]:
            kernels.append([_link(f"{detail.sku} {detail.line}", receipt), ", ".join(selected)])
    text = "\n" + table(columns.split(", "), rows) + "\n" if rows else ""
    if not kernels:
        return text
    head = "What vLLM selected on the GPU is what the [kernel selection](selection.md) records:"
    return f"{text}\n{head}\n\n{table(['receipt', 'kernels'], kernels)}\n"
