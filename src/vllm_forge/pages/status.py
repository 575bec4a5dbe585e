"""Which cells have a receipt, for docs/generated/status.md and the report; others are "not run"."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from vllm_forge import signing
from vllm_forge.errors import ForgeError
from vllm_forge.host import parse_json, printable
from vllm_forge.pages.markdown import escape, table
from vllm_forge.project import Project
from vllm_forge.receipts import FOLDER, errors
from vllm_forge.receipts import verification as checks
from vllm_forge.receipts.receipt import Receipt, closest_margin
from vllm_forge.receipts.suite import read_suite
from vllm_forge.receipts.verification import NOT_RUN, Receipts, read_receipts
from vllm_forge.release.errors import StatementContentError
from vllm_forge.release.gate import Decision
from vllm_forge.release.published import read_bundles
from vllm_forge.release.verify import parse

RELEASES = "records/releases"  # decisions on releases: NAME.sigstore.json
STALE = (errors.ReceiptExpiredError, errors.ReceiptSubjectError, errors.ReceiptSuiteError)
EVIDENCE = ("receipt", "GPU", "driver", "tests", "took", "closest margin")


@dataclass
class TierState:
    """What the records say of a tier on a SKU and a line, in a word and with notes."""

    word: str
    notes: list[str] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)


Grid = dict[tuple[str, str, str], TierState]  # of SKU, line, tier
Refused = list[tuple[Path, ForgeError]]


def make_grid(project: Project, receipts: Receipts) -> tuple[Grid, Refused]:
    """Every tier in the order of matrix.toml; and receipts and decisions that do not count.

    A waiver says more than a receipt that is refused, and a receipt that is valid more than both.
    """
    matrix = project.matrix
    grid = {
        (sku, name, tier): TierState("unsupported" if sku in line.unsupported else NOT_RUN)
        for sku in matrix.sku
        for name, line in matrix.line.items()
        for tier in read_suite(project.root).tier
    }
    by_name = {"--".join(place): state for place, state in grid.items()}
    for path, error in receipts.refused:
        if (state := by_name.get(path.stem)) is not None:
            state.word = "stale" if isinstance(error, STALE) else "refused"
            state.notes.append(error.what)
    refused = [*receipts.refused, *_add_waivers(project, grid)]
    for receipt in receipts.valid:
        detail = receipt.statement.detail
        state = grid[detail.sku, detail.line, detail.tier]
        state.receipts.append(receipt)
        signed = all(row.signed_by for row in state.receipts)
        state.word = "passed" if signed else "passed, unsigned"
    return grid, refused


def _add_waivers(project: Project, grid: Grid) -> Iterator[tuple[Path, ForgeError]]:
    """Add those of decisions that a key of the keyring signed; yield what is refused."""
    places = [place[:2] for place, state in grid.items() if state.word != "unsupported"]
    cells = {project.cell(*place).name: place for place in places}
    for row in read_bundles(project.root / RELEASES):
        try:
            if row.error is not None:
                raise row.error
            bundle, keys = signing.read(row.content, row.where), signing.read_keyring(project.root)
            made = parse_json(bundle.statement)["predicate"]["timeVerified"]
            time = datetime.fromisoformat(made)  # verified with the rest
            verified = signing.verify(bundle, keys, role="release", now=time)
            waivers = parse(Decision, "decision", verified).detail.waivers
            place = cells[verified.statement.subject[0].name]
            for state, waiver in [(grid[(*place, waiver.tier)], waiver) for waiver in waivers]:
                state.word = "waived"
                state.notes.append(f"until {waiver.until}: {waiver.reason}")
        except ForgeError as error:
            yield Path(row.where), error
        except (ValueError, LookupError, TypeError) as error:
            what = f"not a decision on a cell of matrix.toml: {error!r}"
            yield Path(row.where), StatementContentError(what, where=row.where, remedy="delete it")


def status(project: Project) -> str:
    """The page: line and tier by SKU, how each tier ran, and what is refused."""
    receipts = read_receipts(project)
    grid, refused = make_grid(project, receipts)
    places, skus = dict.fromkeys(place[1:] for place in grid), project.matrix.sku
    cells = ([*place, *(_cell(grid[(sku, *place)]) for sku in skus)] for place in places)
    shown = table(["line", "tier", *skus], cells)
    lines = [(shown + "\n" + _evidence(project.root, receipts.valid)).rstrip()]
    if refused:
        rows = (f"{path.relative_to(project.root)}: {error.what}" for path, error in refused)
        lines += ["\nRefused:\n", *(f"* {escape(printable(row))}" for row in rows)]
    return "\n".join(lines)


def _cell(state: TierState) -> str:
    links = [_link(f"image, {escape(vouched(receipt))}", receipt) for receipt in state.receipts]
    if state.word in {"stale", "refused"}:
        return NOT_RUN
    return ", ".join(links) or escape(" ".join([state.word, *state.notes]))


def vouched(receipt: Receipt) -> str:
    """Who vouches for a receipt, and its day."""
    return f"{checks.seal(receipt)}, {receipt.statement.detail.finished.date()}"


def _link(text: str, receipt: Receipt) -> str:
    return f"[{text}](../../{FOLDER}/{receipt.path.parent.name}/{receipt.path.name})"


def evidence(receipt: Receipt) -> list[str]:
    """Cells of EVIDENCE: how a tier ran."""
    detail = receipt.statement.detail
    return [
        f"{detail.sku} {detail.line} {detail.tier}",
        detail.gpus[0].name,
        detail.gpus[0].driver,
        str(len(receipt.statement.predicate.passed)),
        f"{(detail.finished - detail.started).total_seconds():.0f} s",
        closest_margin(detail),
    ]


def kernels(root: Path, receipt: Receipt) -> str:
    """Kernels that ran, where the recorded selection names them."""
    return ", ".join(f"{part} {ran}" for part, _, ran in checks.compare_kernels(root, receipt))


def _evidence(root: Path, receipts: Sequence[Receipt]) -> str:
    rows, selected = [], []
    for receipt in receipts:
        name, *others = evidence(receipt)
        rows.append([_link(name, receipt), *others])
        if ran := kernels(root, receipt):
            selected.append([_link(name.rpartition(" ")[0], receipt), ran])
    text = "\n" + table(EVIDENCE, rows) + "\n" if rows else ""
    if not selected:
        return text
    head = "What vLLM selected on the GPU is what the [kernel selection](selection.md) records:"
    return f"{text}\n{head}\n\n{table(['receipt', 'kernels'], selected)}\n"
