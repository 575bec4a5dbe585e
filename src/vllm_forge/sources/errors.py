"""Locks, the package index, wheels and source archives."""

from vllm_forge.errors import ForgeError

REFUSED = 20
FAULT = 23


class IndexUnreachableError(ForgeError, exit_code=FAULT):
    """The package index does not answer."""


class DownloadInterruptedError(ForgeError, exit_code=FAULT):
    """The connection broke more often than the retries allow; what arrived is kept."""


class HashMismatchError(ForgeError, exit_code=REFUSED):
    """The bytes are not those that the lock names."""


class TruncatedFileError(ForgeError, exit_code=FAULT):
    """A complete-looking file is shorter or longer than the index or the lock says."""


class LockFileError(ForgeError, exit_code=REFUSED):
    """A lock is missing, malformed, or was edited by hand."""


class ResolutionError(ForgeError, exit_code=REFUSED):
    """uv finds no set of versions that satisfies the line."""


class DistributionNotFoundError(ForgeError, exit_code=FAULT):
    """The index does not offer the file that the lock pins."""


class SdistError(ForgeError, exit_code=REFUSED):
    """A source archive cannot be read as one."""


class WheelError(ForgeError, exit_code=REFUSED):
    """A wheel that no installer should take, e.g. one that writes outside its environment."""
