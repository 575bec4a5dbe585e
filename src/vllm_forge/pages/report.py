"""The report: one HTML file without script, made of records; report.html and report.css beside it.

It has the data of the Markdown pages. The same records give the same bytes: it has no time.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from vllm_forge.host import printable, read_plain
from vllm_forge.kernels.coverage.families import catalogue
from vllm_forge.matrix.errors import RecordFileError
from vllm_forge.pages import kernels, records, status
from vllm_forge.patches import read_series
from vllm_forge.project import Project
from vllm_forge.proofs.record import fresh_record
from vllm_forge.receipts.receipt import Receipt
from vllm_forge.receipts.verification import read_receipts

CHARTS = "records/bench"
LARGEST_CHART = 1 << 20


class Cell(NamedTuple):
    """``kind``: a word that report.css colours; ``note``: small print; ``href``: https, or #id."""

    text: str
    kind: str = ""
    note: str = ""
    href: str = ""
    id: str = ""


class Table(NamedTuple):
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def report(project: Project) -> str:
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    style = (folder / "report.css").read_text(encoding="utf-8")
    receipts = read_receipts(project)
    grid, refused = status.make_grid(project, receipts)
    columns = list(dict.fromkeys(tier for _, _, tier in grid))
    return environment.get_template("report.html").render(
        style=Markup(style),  # noqa: S704  (a file of this package)
        hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        counts=Counter(state.word for state in grid.values()),
        grid=[
            Table(
                f"Line {name}, vLLM {line.vllm}: SKU by tier. "
                f"End of support: {project.matrix.support_end(name)}",
                ["SKU", *columns],
                [
                    [Cell(sku), *(_state(grid[sku, name, tier]) for tier in columns)]
                    for sku in project.matrix.sku
                ],
            )
            for name, line in project.matrix.line.items()
        ],
        evidence=[_evidence(project, receipts.valid)] if receipts.valid else [],
        refused=[(str(path.relative_to(project.root)), error.what) for path, error in refused],
        patches=list(_patches(project)),
        coverage=list(_coverage(project)),
        drift=[_drift(project.read_json("records/drift.json"))],
        charts=list(_charts(project.root)),
    )


def _link(url: str) -> str:
    return url if url.startswith("https://") else ""


def _anchor(receipt: Receipt) -> str:
    return f"r-{receipt.path.parent.name[:12]}-{receipt.path.stem}".replace(".", "-")


def _state(state: status.TierState) -> Cell:
    vouched = (status.vouched(row).removeprefix("unsigned, ") for row in state.receipts)
    notes = [*vouched, *state.notes]
    href = f"#{_anchor(state.receipts[0])}" if state.receipts else ""
    return Cell(state.word, state.word, "; ".join(notes), href)


def _evidence(project: Project, receipts: Sequence[Receipt]) -> Table:
    rows = []
    for receipt in receipts:
        name, *others = status.evidence(receipt)
        image = f"image sha256:{receipt.statement.sha256[:12]}, {status.vouched(receipt)}"
        until = str(receipt.statement.detail.expires.date())
        cells = map(Cell, (*others, until, status.kernels(project.root, receipt)))
        rows.append([Cell(name, note=image, id=_anchor(receipt)), *cells])
    return Table("How each tier ran", (*status.EVIDENCE, "until", "kernels, as recorded"), rows)


def _patches(project: Project) -> Iterator[Table]:
    """Each line's series; a proof counts if it was recorded of the present inputs."""
    for name, line in project.matrix.line.items():
        why = fresh_record(project, name) or {}
        rows = []
        for patch in read_series(project.root / line.series):
            summary = Cell(patch.summary, href=_link(patch.fields["Bug"]))
            result = Cell(
                "not proven", "missing", "no record of the present series, lock and tests"
            )
            if patch.name in why:
                result = Cell("proven", "proven", f"without it: {why[patch.name]}")
            title = Cell(patch.name.removesuffix(".patch"))
            rows.append([title, summary, Cell(patch.proves), result])
        head = ["patch", "what", "proof", "result"]
        yield Table(f"Line {name}, vLLM {line.vllm}: patches", head, rows)


def _coverage(project: Project) -> Iterator[Table]:
    families = catalogue().family
    for record in kernels.coverages(project):
        skus = record["skus"]
        rows = [
            [Cell(name, note=families[name].what), *(_code(cells[sku]) for sku in skus)]
            for name, cells in record["coverage"].items()
        ]
        head = ["family", *(f"{name} ({arch})" for name, arch in skus.items())]
        yield Table(f"Line {record['line']}, vLLM {record['vllm']}: device code", head, rows)


def _code(cell: dict[str, Any]) -> Cell:
    if cell["needed_by"] is None:
        return Cell(kernels.plain_codes(cell), "unneeded")
    return Cell(kernels.plain_codes(cell), cell["verdict"], cell["exception"] or "")


def _drift(data: dict[str, Any]) -> Table:
    head, rows = records.drift_summary(data)
    cells = [
        [Cell(release), Cell(day), *(Cell(text, text.partition(" ")[0]) for text in answers)]
        for release, day, *answers in rows
    ]
    return Table(f"vLLM releases by change, as of {data['made']}", head, cells)


def _charts(root: Path) -> Iterator[tuple[str, str]]:
    """Name and data URL of each chart: as an image, an SVG runs no script and loads nothing."""
    for path in sorted((root / CHARTS).rglob("*.svg")):
        try:
            content = base64.b64encode(read_plain(path, LARGEST_CHART)).decode()
        except (OSError, ValueError) as error:
            what, remedy = f"cannot read a chart: {error}", "make it again, or delete it"
            raise RecordFileError(what, where=path, remedy=remedy) from None
        yield path.relative_to(root / CHARTS).as_posix(), f"data:image/svg+xml;base64,{content}"
