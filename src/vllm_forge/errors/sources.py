"""Index, downloads, locks, source trees, wheels. Exit codes 20-29."""

from __future__ import annotations

from vllm_forge.errors.base import ForgeError


class IndexUnreachableError(ForgeError):
    """The package index does not answer."""

    exit_code = 20


class DownloadInterruptedError(ForgeError):
    """The connection broke more often than the retries allow; what arrived is kept."""

    exit_code = 21


class HashMismatchError(ForgeError):
    """The bytes are not those that the lock names."""

    exit_code = 22


class TruncatedFileError(ForgeError):
    """A complete-looking file is shorter or longer than the index or the lock says."""

    exit_code = 23


class LockFileError(ForgeError):
    """A lock is missing, malformed, or was edited by hand."""

    exit_code = 24


class ResolutionError(ForgeError):
    """uv finds no set of versions that satisfies the line."""

    exit_code = 25


class DistributionNotFoundError(ForgeError):
    """The index does not offer the file that the lock pins."""

    exit_code = 26


class SdistError(ForgeError):
    """A source archive cannot be read as one."""

    exit_code = 27


class WheelError(ForgeError):
    """A wheel that no installer should take, e.g. one that writes outside its environment."""

    exit_code = 28
