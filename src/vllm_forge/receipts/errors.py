"""Receipts and the suite that they are of."""

from vllm_forge.errors import ForgeError

REFUSED = 100
RED = 101
UNDECIDED = 102


class ReceiptUnreadableError(ForgeError, exit_code=REFUSED):
    """A file among the receipts is not one."""


class ReceiptEditedError(ForgeError, exit_code=RED):
    """A receipt's payload is not the one that was written or signed."""


class ReceiptExpiredError(ForgeError, exit_code=UNDECIDED):
    """A receipt is past its expiry, or says that it was made in the future."""


class ReceiptSubjectError(ForgeError, exit_code=RED):
    """A receipt is for other bytes: another image or source tree."""


class ReceiptSuiteError(ForgeError, exit_code=UNDECIDED):
    """A receipt was made by another suite than the repository's."""


class ReceiptIncompleteError(ForgeError, exit_code=RED):
    """A receipt lacks a test of its suite, or has a failed one."""


class SuiteDescriptionError(ForgeError, exit_code=REFUSED):
    """The GPU suite's files, or the list of its cases, are missing or do not fit each other."""


class ResultFileError(ForgeError, exit_code=REFUSED):
    """A file is not the result of a tier."""


class ReceiptKeyError(ForgeError, exit_code=REFUSED):
    """A receipt lacks the signature that is asked for."""


class ReceiptContradictedError(ForgeError, exit_code=RED):
    """The kernels that ran are not those that were recorded without a GPU."""
