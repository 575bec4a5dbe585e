"""The one reader of receipts: each is verified against the repository as it is, without a GPU."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from securesystemslib.signer import Key

from vllm_forge.errors import ForgeError
from vllm_forge.matrix import ImageCell
from vllm_forge.patches import read_tree_lock
from vllm_forge.project import Project
from vllm_forge.receipts import FOLDER, KEYS
from vllm_forge.receipts.envelope import Receipt, read_keys, read_receipt
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
from vllm_forge.receipts.suite import case_faults, read_tiers, suite_hash

NOT_RUN = "not run"
ARTIFACTS = "soak"  # the tier whose tests serve full artifacts
ROUNDING = timedelta(seconds=1)  # of times in results
REMEDIES: dict[type[ForgeError], str] = {
    ReceiptExpiredError: "run the suite again, or delete the receipt: its cell is then not run",
    ReceiptSubjectError: "run the suite on the present one: a receipt is valid for the bytes it "
    "tested",
    ReceiptSuiteError: "tests or their bounds were changed since: run the suite again",
    ReceiptIncompleteError: "run the whole tier, each test with all of its parameters",
}
Fault = tuple[type[ForgeError], str]


@dataclass(frozen=True, kw_only=True)
class Receipts:
    """Receipts that hold, and of each other entry of ``records/receipts`` its path and error."""

    valid: tuple[Receipt, ...] = ()
    refused: tuple[tuple[Path, ForgeError], ...] = ()

    def lines(self, root: Path) -> list[str]:
        """One line each."""
        valid = [f"{row.path.relative_to(root)}{unsigned(row)}" for row in self.valid]
        refused = [f"{path.relative_to(root)} is refused: {e.what}" for path, e in self.refused]
        return valid + refused


def unsigned(receipt: Receipt) -> str:
    """What every list of receipts says of one without signature."""
    return "" if receipt.signed_by else ", unsigned"


def read_receipts(
    project: Project, now: datetime | None = None, *, image: str | None = "", signed: bool = False
) -> Receipts:
    """Read and verify the committed receipts, by default each as of the end of its run.

    ``image``: only those of this digest, ``sha256:<hex>``; None: no image, so none. ``signed``:
    refuse unsigned ones also where no key is trusted.
    """
    if image is None:
        return Receipts()
    valid, refused = [], []
    keys = read_keys(project.root / FOLDER / KEYS)
    for path, error in _entries(project.root, image.removeprefix("sha256:")):
        try:
            if error is not None:
                raise error
            receipt = read_receipt(path, keys)
            time = now or min(receipt.statement.detail.finished, datetime.now(UTC))
            verify(project, receipt, time, keys, signed=signed)
        except ForgeError as why:
            refused.append((path, why))
        else:
            valid.append(receipt)
    return Receipts(valid=tuple(valid), refused=tuple(refused))


def _entries(root: Path, image: str) -> Iterator[tuple[Path, ForgeError | None]]:
    """Files ``records/receipts/<digest>/*.json``, and what else is there with its error.

    A receipt in another place would be overlooked, and a link's target is not committed.
    """
    place = root / FOLDER
    try:
        folders = [path for path in _listing(place) if path.name != KEYS]
    except ReceiptUnreadableError as error:
        yield place, error
        return
    for folder in folders:
        try:
            for path in _listing(folder) if image in ("", folder.name) else ():
                yield path, None if path.suffix == ".json" else _foreign(path, "not a receipt")
        except ReceiptUnreadableError as error:
            yield folder, error


def _listing(folder: Path) -> list[Path]:
    """Entries of a folder, without the temporary ones of a killed writer."""
    for path in (folder, folder.parent):
        if path.is_symlink():
            raise _foreign(path, "it is a link")
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _foreign(folder, str(error)) from None
    return [path for path in paths if not path.name.startswith(".tmp-")]


def _foreign(path: Path, why: str) -> ReceiptUnreadableError:
    return ReceiptUnreadableError(
        f"not {FOLDER}/<digest>/<receipt>.json: {why}",
        where=str(path),
        remedy=f"keep nothing but receipts, each in its image's folder, and {KEYS} there",
    )


def verify_all(
    project: Project, now: datetime | None = None, *, signed: bool = False
) -> tuple[Receipt, ...]:
    """Every committed receipt; raises the error of the first that is refused."""
    receipts = read_receipts(project, now or datetime.now(UTC), signed=signed)
    for _, error in receipts.refused:
        raise error
    return receipts.valid


def preset_state(
    project: Project, receipts: Receipts, cell: ImageCell, preset: str, artifact: str
) -> str:
    """``not run``, or the receipts whose tests served this artifact as this preset.

    The artifact must have been the very bytes that matrix.toml pins.
    """
    pin = project.matrix.artifact[artifact].identity
    facts = {"preset": preset, "artifact": artifact, "identity": pin}.items()
    named = [
        f"{receipt.path.relative_to(project.root)}{unsigned(receipt)}"
        for receipt in receipts.valid
        if (detail := receipt.statement.detail).tier == ARTIFACTS
        and (detail.sku, detail.line) == (cell.sku_name, cell.line_name)
        and len(detail.gpus) >= project.matrix.preset[preset].tensor_parallel
        and any(
            test.outcome == "passed" and facts <= test.facts.items()
            for test in detail.tests.values()
        )
    ]
    return f"receipts: {', '.join(named)}" if named and pin else NOT_RUN


def verify(
    project: Project, receipt: Receipt, now: datetime, keys: Sequence[Key], *, signed: bool = False
) -> None:
    """Compare one receipt with the repository; the class of the error says what differs."""
    if (keys or signed) and not receipt.signed_by:
        raise ReceiptKeyError(
            "the receipt is unsigned",
            where=str(receipt.path),
            remedy="sign it where it is made: nox -s forge -- gpu receipts --result FILE --key KEY",
        )
    for kind, what in _faults(project, receipt, now):
        raise kind(what, where=str(receipt.path), remedy=REMEDIES[kind])
    require_selection(project.root, receipt)


def _faults(project: Project, receipt: Receipt, now: datetime) -> Iterator[Fault]:
    """Each check relies on those before it."""
    detail = receipt.statement.detail
    last = min(detail.expires, detail.finished + VALID)
    if not detail.started <= detail.finished <= now or now >= last or detail.expires != last:
        yield (
            ReceiptExpiredError,
            f"the receipt is of {detail.finished.date()}, valid until {detail.expires.date()}; at "
            f"most {VALID.days} days are accepted",
        )
    for what in _other_subject(project, receipt):
        yield ReceiptSubjectError, f"the receipt is for another subject: {what}"
    suite, tier = receipt.statement.suite, detail.tier
    if tier not in (tiers := read_tiers(project.root)):
        yield ReceiptSuiteError, f"unknown tier {tier}: the suite has {', '.join(tiers)}"
    if suite != (current := suite_hash(project, tier, detail.sku)):
        yield (
            ReceiptSuiteError,
            f"the receipt was made by suite {suite[:12]}, tier {tier} is now {current[:12]}",
        )
    if len(detail.gpus) < tiers[tier].gpus:
        yield (
            ReceiptIncompleteError,
            f"tier {tier} is for {tiers[tier].gpus} GPUs, the receipt is of {len(detail.gpus)}",
        )
    for what in (*_not_green(receipt), *case_faults(project.root, detail)):
        yield ReceiptIncompleteError, f"the receipt of tier {tier} {what}"


def _other_subject(project: Project, receipt: Receipt) -> Iterator[str]:
    matrix, statement = project.matrix, receipt.statement
    detail = statement.detail
    if receipt.path.parts[-2:] != (statement.sha256, statement.file_name):
        yield f"sha256:{statement.sha256} and {statement.file_name} do not match its path"
    if detail.sku not in matrix.sku or detail.line not in matrix.line:
        yield f"{detail.sku} or line {detail.line} is not defined in matrix.toml"
    if detail.sku in matrix.line[detail.line].unsupported:
        yield f"line {detail.line} does not support {detail.sku}"
    sku = matrix.sku[detail.sku]
    for gpu in detail.gpus:
        if gpu.compute_capability != sku.compute_capability or not gpu.name.startswith(sku.device):
            yield f"{gpu.name} is not {detail.sku}"
    if len({gpu.uuid_sha256 for gpu in detail.gpus}) != len(detail.gpus):
        yield "two GPUs of one UUID"
    tree = read_tree_lock(project.root / matrix.line[detail.line].series, detail.line).result
    if statement.tree != tree:
        yield f"tree {statement.tree}, the series now gives {tree}"
    if detail.lock_sha256 != (lock := project.lock(detail.line).digest):
        yield f"lock {detail.lock_sha256}, the line now has {lock}"


def _not_green(receipt: Receipt) -> Iterator[str]:
    """Verdicts agree with the list of passed tests, margins with bounds, times with the run's."""
    detail = receipt.statement.detail
    for name, test in detail.tests.items():
        for what, pair in test.margins.items():
            if pair.measured > pair.bound:
                yield f"is red: {name}: {what} is {pair.measured:g}, its bound {pair.bound:g}"
        if test.seconds > (detail.finished - detail.started + ROUNDING).total_seconds():
            yield f"is impossible: {name} took {test.seconds:g} s, more than the whole run"
    passed = sorted(name for name, test in detail.tests.items() if test.outcome == "passed")
    if list(receipt.statement.predicate.passed) != passed:
        yield "has other passedTests than tests that passed, each once and in order"


def describe(receipts: Sequence[Receipt]) -> str:
    """One line for each."""
    rows = []
    for receipt in receipts:
        detail, statement = receipt.statement.detail, receipt.statement
        seal = f"signed by {', '.join(receipt.signed_by)}" if receipt.signed_by else "unsigned"
        rows.append(
            f"{detail.sku}  line {detail.line}  tier {detail.tier}  "
            f"sha256:{statement.sha256[:12]}  {len(statement.predicate.passed)} tests  "
            f"until {detail.expires.date()}  {seal}"
        )
    return "\n".join(rows) or "no receipts: nothing was run"
