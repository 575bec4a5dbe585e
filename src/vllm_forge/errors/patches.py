"""Series, patches, trees and their proofs. Exit codes 40-59."""

from __future__ import annotations

from vllm_forge.errors.base import ForgeError


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


class DispositionError(ForgeError):
    """An entry of dispositions.toml that says nothing of a line, or that nothing can check."""

    exit_code = 59
