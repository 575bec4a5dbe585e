"""The one reader of receipts: each is verified against the repository as it is, without a GPU."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_forge.errors import ForgeError, problems
from vllm_forge.host import console, parse_json, printable, read_plain
from vllm_forge.kernels.selection.questions import grid_question
from vllm_forge.kernels.selection.record import read_selection
from vllm_forge.matrix import ImageCell, gpus_of
from vllm_forge.patches import read_tree_lock
from vllm_forge.project import Project
from vllm_forge.receipts import FOLDER, errors
from vllm_forge.receipts.receipt import (
    SOURCE_NAME,
    SUITE_NAME,
    Configuration,
    Receipt,
    contradictions,
    make_statement,
    read_receipt,
    write_receipt,
    wrong_times,
)
from vllm_forge.receipts.suite import case_faults, read_suite, suite_hash
from vllm_forge.signing import FOLDER as KEYS
from vllm_forge.signing import Keyring, load_private, read_keyring
from vllm_forge.signing.errors import KeyFileError, KeyringError

# Of reading a file that is not a result, or a part of one.
MALFORMED = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError)
# Engine of tests/gpu/mtp -> the artifact in whose layout its tiny checkpoint is.
LAYOUTS = {"dsv4": "flash-nvfp4-fp8-mtp"}
UNQUANTIZED = "Unquantized"
UNNAMED = "nothing that its boot log names"
NOT_RUN = "not run"
ARTIFACTS = "soak"  # the tier whose tests serve full artifacts
REMEDIES: dict[type[ForgeError], str] = {
    errors.ReceiptExpiredError: "correct the clock if it is wrong; else run the suite again, or "
    "delete the receipt: its cell is then not run",
    errors.ReceiptSubjectError: "run the suite on the present one: a receipt is valid for the "
    "bytes it tested",
    errors.ReceiptSuiteError: "tests or their bounds were changed since: run the suite again",
    errors.ReceiptIncompleteError: "run the whole tier, each test with all of its parameters",
}
Fault = tuple[type[ForgeError], str]


@dataclass(frozen=True, kw_only=True)
class Receipts:
    """Receipts that hold, and of each other entry of ``records/receipts`` its path and error."""

    valid: tuple[Receipt, ...] = ()
    refused: tuple[tuple[Path, ForgeError], ...] = ()

    def lines(self, root: Path) -> list[str]:
        valid = [f"{row.path.relative_to(root)}{unsigned(row)}" for row in self.valid]
        refused = [f"{path.relative_to(root)} is refused: {e.what}" for path, e in self.refused]
        return [printable(line).replace("\n", "\\n") for line in valid + refused]


def unsigned(receipt: Receipt) -> str:
    """What every list of receipts says of one without signature."""
    return "" if receipt.signed_by else ", unsigned"


def seal(receipt: Receipt) -> str:
    """Who vouches for a receipt."""
    owners = (f"{key.name}, {key.row.owner}" if key.row else key.name for key in receipt.signed_by)
    return f"signed by {'; '.join(owners)}" if receipt.signed_by else "unsigned"


def read_receipts(
    project: Project, now: datetime | None = None, *, image: str | None = "", signed: bool = False
) -> Receipts:
    """Read and verify the committed receipts, by default each as of the end of its run.

    ``image``: only those of this digest, ``sha256:<hex>``; None: no image, so none. ``signed``:
    refuse unsigned ones also where no key is trusted. A broken trusted key refuses all.
    """
    if image is None:
        return Receipts()
    valid: list[Receipt] = []
    refused: list[tuple[Path, ForgeError]] = []
    keys, broken = Keyring(), None
    try:
        keys = read_keyring(project.root)
    except (KeyringError, KeyFileError) as why:
        broken = why
        refused.append((project.root / KEYS, why))
    for path, error in _entries(project.root, image.removeprefix("sha256:")):
        try:
            if fault := broken or error:
                raise fault
            receipt = read_receipt(path, keys)
            time = now or min(receipt.statement.detail.finished, datetime.now(UTC))
            verify(project, receipt, time, keys, signed=signed)
            require_keys(receipt, now)
        except ForgeError as why:
            refused.append((path, why))
        else:
            valid.append(receipt)
    return Receipts(valid=tuple(valid), refused=tuple(refused))


def _entries(root: Path, image: str) -> Iterator[tuple[Path, ForgeError | None]]:
    """Files ``records/receipts/<digest>/*.json``, and what else is there with its error.

    A receipt in another place would be overlooked, and a link's target is not committed.
    """
    for folder, fault in _listing(root / FOLDER):
        if fault is not None:
            yield folder, fault
        elif image in ("", folder.name):
            for path, error in _listing(folder):
                wrong = error is None and path.suffix != ".json"
                yield path, _foreign(path, "not a receipt") if wrong else error


def _listing(folder: Path) -> Iterator[tuple[Path, ForgeError | None]]:
    """Entries of a folder, or its error; without the temporary ones of a killed writer."""
    if link := next((path for path in (folder, folder.parent) if path.is_symlink()), None):
        yield folder, _foreign(link, "it is a link")
        return
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        yield folder, _foreign(folder, str(error))
        return
    yield from ((path, None) for path in paths if not path.name.startswith(".tmp-"))


def _foreign(path: Path, why: str) -> errors.ReceiptUnreadableError:
    what = f"not {FOLDER}/<digest>/<receipt>.json: {why}"
    remedy = "keep nothing but receipts there, each in its image's folder"
    return errors.ReceiptUnreadableError(what, where=path, remedy=remedy)


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
        and len(detail.gpus) >= gpus_of(project.matrix, preset)
        and any(
            test.outcome == "passed" and facts <= test.facts.items()
            for test in detail.tests.values()
        )
    ]
    return f"receipts: {', '.join(named)}" if named and pin else NOT_RUN


def verify(
    project: Project, receipt: Receipt, now: datetime, keys: Keyring, *, signed: bool = False
) -> None:
    """Compare one receipt with the repository; the class of the error says what differs."""
    if (keys.has("receipts") or signed) and not receipt.signed_by:
        remedy = "sign it where it is made: nox -s forge -- gpu receipts --result FILE --key KEY"
        raise errors.ReceiptKeyError("the receipt is unsigned", where=receipt.path, remedy=remedy)
    for kind, what in _faults(project, receipt, now):
        raise kind(what, where=receipt.path, remedy=REMEDIES[kind])
    require_selection(project.root, receipt)


def require_keys(receipt: Receipt, now: datetime | None) -> None:
    """Raise unless each signer may sign receipts now; see ``signing.keys.TrustedKey.require``.

    Without ``now``: as of the end of the run, which may be signed later with a younger key.
    """
    for key in receipt.signed_by:
        time = now or max(receipt.statement.detail.finished, key.valid_from)
        key.require("receipts", time, str(receipt.path))


def _faults(project: Project, receipt: Receipt, now: datetime) -> Iterator[Fault]:
    """Each check relies on those before it."""
    detail = receipt.statement.detail
    if what := wrong_times(detail, now):
        yield errors.ReceiptExpiredError, what
    for what in _other_subject(project, receipt):
        yield errors.ReceiptSubjectError, f"the receipt is for another subject: {what}"
    suite, tier = receipt.statement.suite, detail.tier
    if tier not in (tiers := read_suite(project.root).tier):
        yield errors.ReceiptSuiteError, f"unknown tier {tier}: the suite has {', '.join(tiers)}"
    if suite != (current := suite_hash(project, tier, detail.sku)):
        what = f"the receipt was made by suite {suite[:12]}, tier {tier} is now {current[:12]}"
        yield errors.ReceiptSuiteError, what
    if len(detail.gpus) < tiers[tier].gpus:
        what = f"tier {tier} is for {tiers[tier].gpus} GPUs, the receipt is of {len(detail.gpus)}"
        yield errors.ReceiptIncompleteError, what
    for what in (*contradictions(receipt.statement), *case_faults(project.root, detail)):
        yield errors.ReceiptIncompleteError, f"the receipt of tier {tier} {what}"


def _other_subject(project: Project, receipt: Receipt) -> Iterator[str]:
    matrix, statement = project.matrix, receipt.statement
    detail = statement.detail
    if receipt.path.parts[-2:] != (statement.sha256, statement.file_name):
        yield f"sha256:{statement.sha256} and {statement.file_name} do not match its path"
    if detail.sku not in matrix.sku or detail.line not in matrix.line:
        yield f"{detail.sku} or line {detail.line} is not defined in matrix.toml"
    if detail.sku in matrix.line[detail.line].unsupported:
        yield f"line {detail.line} does not support {detail.sku}"
    sources = [statement.subject[1].name, statement.predicate.configuration[0].name]
    if sources != [SOURCE_NAME.format(detail.line), SUITE_NAME.format(detail.tier)]:
        yield f"it is named {', '.join(sources)}"
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


def describe(receipts: Sequence[Receipt]) -> str:
    rows = []
    for receipt in receipts:
        detail, statement = receipt.statement.detail, receipt.statement
        rows.append(
            f"{detail.sku}  line {detail.line}  tier {detail.tier}  "
            f"sha256:{statement.sha256[:12]}  {len(statement.predicate.passed)} tests  "
            f"until {detail.expires.date()}  {seal(receipt)}"
        )
    return "\n".join(rows) or "no receipts: nothing was run"


def make_receipt(project: Project, result_path: Path, key: Path | None) -> Path:
    """Make the receipt of ``OUTPUT/<tier>.json``; write it only if it is valid here and now.

    It is unsigned without ``key``, a private key in PEM. With a key that is not in the keyring it
    is written beside the result, to be handed over, see ``handover``.
    ResultFileError: not a result; for other errors see ``verify``.
    """
    try:
        result: dict[str, Any] = parse_json(read_plain(result_path))
        statement = make_statement(result)
    except MALFORMED as error:
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, ValidationError):
            why = f"{error.title} {problems(error)[0]}"
        what = f"not the result of a tier: {why}"
        remedy = "take the file that the run wrote: OUTPUT/<tier>.json, whole"
        raise errors.ResultFileError(what, where=result_path, remedy=remedy) from None
    keys, folder = read_keyring(project.root), project.root / FOLDER
    private = None if key is None else load_private(key)
    foreign = private is not None and keys.find(keyid=private.public.id) is None
    if private is not None and foreign:
        keys = Keyring(keys=(private.public, *keys.keys))
        folder = result_path.absolute().parent / "receipts"
    with tempfile.TemporaryDirectory() as work:
        try:
            draft = write_receipt(Path(work), statement, private)
            receipt, now = read_receipt(draft, keys), datetime.now(UTC)
            verify(project, receipt, now, keys)
            require_keys(receipt, now)
        except ForgeError as error:
            if error.where.startswith(work):  # gone when it is read
                error.where = str(result_path)
            raise
    path = write_receipt(folder, statement, private)
    if foreign:
        console.print(
            f"{path} is signed with a key that is not in {KEYS}. Send it with the public key: "
            "`receipts accept` verifies it, and puts it among the records.",
            markup=False,
        )
    return path


def compare_kernels(root: Path, receipt: Receipt) -> list[tuple[str, str, str]]:
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
            what = f"engine {engine} ran, and is recorded as: {answer.refused.message}"
            raise _contradicted(receipt, what)
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
    """Refuse a receipt whose engines took other kernels than those recorded without a GPU.

    If they differ, one of them is wrong. A boot log that does not name a kernel differs, too.
    """
    sku = receipt.statement.detail.sku
    for part, recorded, ran in compare_kernels(root, receipt):
        if recorded != ran:
            what = f"for {part} vLLM took {ran} on {sku}; recorded is {recorded}"
            raise _contradicted(receipt, what)


def _contradicted(receipt: Receipt, what: str) -> errors.ReceiptContradictedError:
    line = receipt.statement.detail.line
    return errors.ReceiptContradictedError(
        what,
        where=receipt.path,
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
