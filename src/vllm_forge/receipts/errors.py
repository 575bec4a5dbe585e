"""Receipts and the suite that they are of."""

from __future__ import annotations

from vllm_forge.errors import ForgeError

REFUSED = 100
RED = 101
UNDECIDED = 102


class ReceiptUnreadableError(ForgeError):
    """A file among the receipts is not one."""

    exit_code = REFUSED


class ReceiptEditedError(ForgeError):
    """A receipt's payload is not the one that was written or signed."""

    exit_code = RED


class ReceiptExpiredError(ForgeError):
    """A receipt is past its expiry, or says that it was made in the future."""

    exit_code = UNDECIDED


class ReceiptSubjectError(ForgeError):
    """A receipt is for other bytes: another image, environment or source tree."""

    exit_code = RED


class ReceiptSuiteError(ForgeError):
    """A receipt was made by another suite than the repository's."""

    exit_code = UNDECIDED


class ReceiptIncompleteError(ForgeError):
    """A receipt lacks a test of its suite, or has one that is not green."""

    exit_code = RED


class SuiteDescriptionError(ForgeError):
    """The GPU suite's files, or the list of its cases, are missing or do not fit each other."""

    exit_code = REFUSED


class ResultFileError(ForgeError):
    """A file is not the result of a tier, or the list of packages beside it is missing."""

    exit_code = REFUSED


class ReceiptKeyError(ForgeError):
    """A key is not an Ed25519 key, or a receipt lacks the signature that is asked for."""

    exit_code = REFUSED


class ReceiptContradictedError(ForgeError):
    """What ran is not what the oracle says."""

    exit_code = RED
