"""Receipts that others sign: a committed one by the owner of a key, a new one from their hardware.

Whoever has a GPU that the maintainers lack runs the suite with a key of their own, and hands over
one file: the receipt, with the image's digest, every verdict and margin, GPU, driver and packages,
and what the boot logs say. ``accept_receipt`` checks all that a machine can check of it.
"""

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vllm_forge.errors import ForgeError
from vllm_forge.host import console
from vllm_forge.images.record import built_digest
from vllm_forge.project import Project
from vllm_forge.receipts import FOLDER, errors
from vllm_forge.receipts.receipt import (
    Receipt,
    closest_margin,
    read_receipt,
    store_receipt,
    write_receipt,
)
from vllm_forge.receipts.verification import require_keys, verify
from vllm_forge.signing import FOLDER as KEYS
from vllm_forge.signing import Keyring, PrivateKey, read_keyring
from vllm_forge.signing.errors import UnknownSignerError
from vllm_forge.signing.keys import TABLE

VALIDITY = timedelta(days=365)  # proposed for a new key
BUILD = "that this commit gives this image: build it here, and accept again"


def sign_receipt(project: Project, path: Path, key: PrivateKey) -> Path:
    """Sign a committed receipt in its place, after verifying it and saying what is signed.

    Raises UnknownSignerError: the key is not in the keyring; ReceiptKeyError: the receipt is not
    among the committed ones, or signed already; and what ``read_receipt`` and ``verify`` raise.
    """
    path, keys, now = path.absolute(), read_keyring(project.root), datetime.now(UTC)
    if (trusted := keys.find(keyid=key.public.id)) is None:
        what = f"key {key.public.id} is not in the keyring: what it signs would be refused"
        raise UnknownSignerError(what, where=path, remedy=_add_key(now))
    trusted.require("receipts", now, str(path))
    if path.parent.parent != project.root / FOLDER:
        what = f"the receipt is not in {FOLDER}/<digest>"
        remedy = "sign a committed one; those of others are accepted with: receipts accept FILE"
        raise errors.ReceiptKeyError(what, where=path, remedy=remedy)
    receipt = read_receipt(path, keys)
    if receipt.signed_by:
        what = f"the receipt is signed already, by {receipt.signed_by[0].name}"
        raise errors.ReceiptKeyError(what, where=path, remedy="keep it as it is")
    verify(project, receipt, now, Keyring())  # it is unsigned as yet
    _show(f"{trusted.name} signs", receipt)
    return write_receipt(project.root / FOLDER, receipt.statement, key)


def accept_receipt(project: Project, path: Path, keys: Keyring) -> Receipt:
    """Verify a signed receipt of others, and write it to its place in ``records/receipts``.

    ``keys``: the keyring, perhaps with keys that are trusted in this call. Only a signer who is in
    the keyring is accepted; for others all is checked, and nothing written.

    Raises ReceiptKeyError: unsigned, or the signer is not in the keyring; ReceiptSubjectError:
    another image was built here, or another receipt is in its place; and what ``read_receipt``,
    ``verify`` and ``require_keys`` raise.
    """
    now, receipt = datetime.now(UTC), read_receipt(path, keys)
    target = project.root / FOLDER / receipt.statement.sha256 / receipt.statement.file_name
    placed = replace(receipt, path=target)
    try:
        verify(project, placed, now, keys, signed=True)
        require_keys(placed, now)
        compared = _require_built(project, placed)
    except ForgeError as error:
        error.where = str(path) if error.where == str(target) else error.where
        raise
    owners = ", ".join(key.row.owner if key.row else "somebody" for key in receipt.signed_by)
    _show(f"{owners} vouches for", receipt)
    console.print("  not checked: that the run was honest" + ("" if compared else f"; {BUILD}"))
    if any(key.row is None for key in receipt.signed_by):
        what = "every check passed, but the signer is not in the keyring"
        raise errors.ReceiptKeyError(what, where=path, remedy=_add_key(now))
    _store(placed, path, keys)
    return placed


def _require_built(project: Project, receipt: Receipt) -> bool:
    """Whether the cell's image was built here; ReceiptSubjectError if it is another one."""
    detail = receipt.statement.detail
    cell = project.cell(detail.sku, detail.line)
    built = built_digest(project.root / "dist" / f"{cell.name}.json")
    if built not in (None, f"sha256:{receipt.statement.sha256}"):
        what = f"the receipt is for sha256:{receipt.statement.sha256}, built here is {built}"
        remedy = "ask which commit its image was built from; build that one, and compare"
        raise errors.ReceiptSubjectError(what, where=receipt.path, remedy=remedy)
    return built is not None


def _store(receipt: Receipt, path: Path, keys: Keyring) -> None:
    """Write a verified receipt to its place, unless it is there."""
    if os.path.lexists(receipt.path):
        present = read_receipt(receipt.path, keys)
        if (present.statement, present.signatures) != (receipt.statement, receipt.signatures):
            what = f"another receipt is already at {receipt.path}"
            remedy = "compare them; to replace the old one, delete it first"
            raise errors.ReceiptSubjectError(what, where=path, remedy=remedy)
    store_receipt(receipt.path, receipt.statement, receipt.signatures)


def _show(who: str, receipt: Receipt) -> None:
    """What a signature says, in full."""
    detail, statement = receipt.statement.detail, receipt.statement
    gpus = ", ".join(f"{gpu.name} (driver {gpu.driver})" for gpu in detail.gpus)
    rows = [
        f"{who} the result of tier {detail.tier}, {detail.sku}, line {detail.line}:",
        f"  image sha256:{statement.sha256}",
        f"  vLLM tree {statement.tree}, lock sha256:{detail.lock_sha256}",
        f"  suite {statement.suite}",
        f"  {len(statement.predicate.passed)} tests passed, on {gpus}",
        f"  closest margin: {closest_margin(detail)}",
        f"  ran until {detail.finished}, valid until {detail.expires}",
    ]
    console.print("\n".join(rows), markup=False)


def _add_key(now: datetime) -> str:
    row = (
        '[key.NAME]\n    owner = "A Person (address)"\n    roles = ["receipts"]\n'
        f"    valid_from = {now.date()}\n    valid_until = {now.date() + VALIDITY}"
    )
    return f"add the public key as {KEYS}/NAME.pem, and to {KEYS}/{TABLE}:\n    {row}"
