"""Every way this project fails, one class each.

A class has its own process exit code, and its message always says what happened, where,
and what to do about it. ``tests/unit/test_errors.py`` asserts that codes are unique.
"""

from __future__ import annotations

import re
from typing import ClassVar

# User and password of an index's address are nobody's business in a build log.
CREDENTIALS = re.compile(r"://[^/@\s]+@")


class ForgeError(Exception):
    """Base of all failures that are part of the contract with the user.

    Args:
        what: what happened, one sentence.
        where: the file, line, package or command it happened at.
        remedy: what the reader should do now.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where:  {self.where}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return CREDENTIALS.sub("://", "\n".join(lines))


# --- 10-19: what was asked for ------------------------------------------------------------


class UsageError(ForgeError):
    """The command line asks for something that does not exist."""

    exit_code = 2


class MatrixFileError(ForgeError):
    """matrix.toml is missing or is not TOML."""

    exit_code = 10


class UnknownKeyError(ForgeError):
    """matrix.toml has a key that the model does not know."""

    exit_code = 11


class MatrixValueError(ForgeError):
    """A value in matrix.toml has the wrong type, or contradicts another row."""

    exit_code = 12


class UnknownSkuError(ForgeError):
    """No SKU (or arch) of that name has a row in matrix.toml."""

    exit_code = 13


class UnknownLineError(ForgeError):
    """No line of that name has a row in matrix.toml."""

    exit_code = 14


class UnsupportedCellError(ForgeError):
    """The line cannot serve this SKU; the row says why."""

    exit_code = 15


# --- 20-29: sources -----------------------------------------------------------------------


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


# --- 30-39: the host ----------------------------------------------------------------------


class CommandFailedError(ForgeError):
    """A command that must succeed returned another code than 0."""

    exit_code = 30


class DiskSpaceError(ForgeError):
    """Not enough free disk for what is about to be written."""

    exit_code = 31


class BusyError(ForgeError):
    """Another process works on the same thing."""

    exit_code = 32


class CacheError(ForgeError):
    """A file of the cache is not what its name says."""

    exit_code = 33


class ToolMissingError(ForgeError):
    """A command that is needed is not on PATH."""

    exit_code = 34


# --- 40-59: patches -----------------------------------------------------------------------


class CorruptPatchError(ForgeError):
    """A patch whose hunks do not parse."""

    exit_code = 40


class WrongContextError(ForgeError):
    """A hunk's context is not in the tree; GNU patch might have taken it with fuzz."""

    exit_code = 41


class OffsetError(ForgeError):
    """A hunk applies, but not at the line that it names."""

    exit_code = 42


class EmptyPatchError(ForgeError):
    """A patch file without a hunk."""

    exit_code = 43


class AlreadyUpstreamError(ForgeError):
    """The pristine release has this change: drop the patch."""

    exit_code = 44


class AppliedTwiceError(ForgeError):
    """The series has already made this change."""

    exit_code = 45


class PatchMissingError(ForgeError):
    """The series lists a patch that is not there."""

    exit_code = 46


class PatchUnlistedError(ForgeError):
    """A patch file is there that the series does not list."""

    exit_code = 47


class WrongBaseError(ForgeError):
    """The tree to patch is not the one that the lock names."""

    exit_code = 48


class NonCanonicalPatchError(ForgeError):
    """A patch is not in the form that the exporter writes."""

    exit_code = 49


class PatchHeaderError(ForgeError):
    """A patch's DEP-3 header lacks a field, or has one that is not known."""

    exit_code = 50


class LineEndingError(ForgeError):
    """A patch has CRLF line endings."""

    exit_code = 51


class TreeMismatchError(ForgeError):
    """The series applies, but the resulting tree is not the locked one."""

    exit_code = 52


class WheelSourceError(ForgeError):
    """The wheel's files are not those of the source tree that the patches are for."""

    exit_code = 53


class UselessPatchError(ForgeError):
    """A patch whose proof is green without it: it proves nothing, drop it."""

    exit_code = 54


class ProofRedError(ForgeError):
    """A contract test is red although the whole series is applied."""

    exit_code = 55


class ProofNotRunError(ForgeError):
    """A proof was not run, was skipped or could not be collected, so it says nothing."""

    exit_code = 56


class InseparablePatchError(ForgeError):
    """A patch without which no tree can be made, so nothing shows that it is needed."""

    exit_code = 57


class SeriesOrderError(ForgeError):
    """The same patches applied in another way, or again, do not do what they must."""

    exit_code = 58


# --- 60-69: engines and images ------------------------------------------------------------


class EngineMissingError(ForgeError):
    """No container engine is installed."""

    exit_code = 60


class EngineTooOldError(ForgeError):
    """The engine is older than the oldest version the Dockerfile is tested with."""

    exit_code = 61


class ProvisionError(ForgeError):
    """The build tools cannot be installed on this host."""

    exit_code = 62


class BaseImageError(ForgeError):
    """The base image is not usable, or not pinned by digest."""

    exit_code = 63


class LayoutError(ForgeError):
    """An OCI layout is incomplete, or a blob is not what its digest says."""

    exit_code = 64


class ImageCheckError(ForgeError):
    """The image was built, but does not do what an image of this project must do."""

    exit_code = 65


class SizeBudgetError(ForgeError):
    """The image is larger than matrix.toml allows."""

    exit_code = 66


class EngineSetupError(ForgeError):
    """The engine is new enough, but not set up for what the build asks of it."""

    exit_code = 67


# --- 70-79: the installer -----------------------------------------------------------------


class InstalledVersionError(ForgeError):
    """The virtual environment holds another vLLM than the line's."""

    exit_code = 70


class DirtyTreeError(ForgeError):
    """Files of the installed vLLM are not the published ones."""

    exit_code = 71


class PartlyPatchedError(ForgeError):
    """Some of the files of the series are patched and some are not."""

    exit_code = 72


class NotPatchedError(ForgeError):
    """There is nothing to revert."""

    exit_code = 73


class AlreadyPatchedError(ForgeError):
    """The installed vLLM carries this series already."""

    exit_code = 74


class NoEnvironmentError(ForgeError):
    """No virtual environment to install into."""

    exit_code = 75
