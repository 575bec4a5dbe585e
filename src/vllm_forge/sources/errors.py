"""Locks, the package index, wheels and source archives."""

from __future__ import annotations

from vllm_forge.errors import ForgeError

REFUSED = 20
FAULT = 23


class IndexUnreachableError(ForgeError):
    """The package index does not answer."""

    exit_code = FAULT


class DownloadInterruptedError(ForgeError):
    """The connection broke more often than the retries allow; what arrived is kept."""

    exit_code = FAULT


class HashMismatchError(ForgeError):
    """The bytes are not those that the lock names."""

    exit_code = REFUSED


class TruncatedFileError(ForgeError):
    """A complete-looking file is shorter or longer than the index or the lock says."""

    exit_code = FAULT


class LockFileError(ForgeError):
    """A lock is missing, malformed, or was edited by hand."""

    exit_code = REFUSED


class ResolutionError(ForgeError):
    """uv finds no set of versions that satisfies the line."""

    exit_code = REFUSED


class DistributionNotFoundError(ForgeError):
    """The index does not offer the file that the lock pins."""

    exit_code = FAULT


class SdistError(ForgeError):
    """A source archive cannot be read as one."""

    exit_code = REFUSED


class WheelError(ForgeError):
    """A wheel that no installer should take, e.g. one that writes outside its environment."""

    exit_code = REFUSED
