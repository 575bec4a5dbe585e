"""Receipts, the GPU suite and its kits. Exit codes 110-119."""

from __future__ import annotations

from vllm_forge.errors.base import ForgeError


class ReceiptUnreadableError(ForgeError):
    """A file among the receipts is not one."""

    exit_code = 110


class ReceiptEditedError(ForgeError):
    """A receipt's payload is not the one that was written or signed."""

    exit_code = 111


class ReceiptExpiredError(ForgeError):
    """A receipt is past its expiry, or says that it was made in the future."""

    exit_code = 112


class ReceiptSubjectError(ForgeError):
    """A receipt is for other bytes: another image, environment or source tree."""

    exit_code = 113


class ReceiptSuiteError(ForgeError):
    """A receipt was made by another suite than the repository's."""

    exit_code = 114


class ReceiptIncompleteError(ForgeError):
    """A receipt lacks a test of its suite, or has one that is not green."""

    exit_code = 115


class WrongGpuError(ForgeError):
    """There is no GPU, or it is not of the SKU that was asked for."""

    exit_code = 116


class GpuSuiteError(ForgeError):
    """The GPU suite is red, or did not run to its end."""

    exit_code = 117


class KitError(ForgeError):
    """A kit for a GPU host cannot be made from what was given."""

    exit_code = 118


class ReceiptKeyError(ForgeError):
    """A key is not an Ed25519 key, or a receipt lacks the signature that is asked for."""

    exit_code = 119


class JitCacheError(ForgeError):
    """Kernels that were compiled before are not for this stack."""

    exit_code = 120


class ReceiptContradictedError(ForgeError):
    """What ran is not what the oracle says."""

    exit_code = 121
