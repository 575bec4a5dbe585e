"""Series, patches, trees and installed copies of vLLM."""

from __future__ import annotations

from vllm_forge.errors import ForgeError

REFUSED = 40
RED = 41


class InstalledVersionError(ForgeError):
    """The virtual environment holds another vLLM than the line's."""

    exit_code = REFUSED


class DirtyTreeError(ForgeError):
    """Files of the installed vLLM are not the published ones."""

    exit_code = REFUSED


class PartlyPatchedError(ForgeError):
    """Some of the files of the series are patched and some are not."""

    exit_code = REFUSED


class NotPatchedError(ForgeError):
    """There is nothing to revert."""

    exit_code = REFUSED


class AlreadyPatchedError(ForgeError):
    """The installed vLLM carries this series already."""

    exit_code = REFUSED


class NoEnvironmentError(ForgeError):
    """No virtual environment to install into."""

    exit_code = REFUSED


class CorruptPatchError(ForgeError):
    """A patch whose hunks do not parse."""

    exit_code = REFUSED


class WrongContextError(ForgeError):
    """A hunk's context is not in the tree; GNU patch might have taken it with fuzz."""

    exit_code = RED


class OffsetError(ForgeError):
    """A hunk applies, but not at the line that it names."""

    exit_code = RED


class EmptyPatchError(ForgeError):
    """A patch file without a hunk."""

    exit_code = REFUSED


class AlreadyUpstreamError(ForgeError):
    """The pristine release has this change: drop the patch."""

    exit_code = RED


class AppliedTwiceError(ForgeError):
    """The series has already made this change."""

    exit_code = RED


class PatchMissingError(ForgeError):
    """The series lists a patch that is not there."""

    exit_code = REFUSED


class PatchUnlistedError(ForgeError):
    """A patch file is there that the series does not list."""

    exit_code = REFUSED


class WrongBaseError(ForgeError):
    """The tree to patch is not the one that the lock names."""

    exit_code = REFUSED


class NonCanonicalPatchError(ForgeError):
    """A patch is not in the form that the exporter writes."""

    exit_code = REFUSED


class PatchHeaderError(ForgeError):
    """A patch's DEP-3 header lacks a field, or has one that is not known."""

    exit_code = REFUSED


class LineEndingError(ForgeError):
    """A patch has CRLF line endings."""

    exit_code = REFUSED


class TreeMismatchError(ForgeError):
    """The series applies, but the resulting tree is not the locked one."""

    exit_code = RED


class WheelSourceError(ForgeError):
    """The wheel's files are not those of the source tree that the patches are for."""

    exit_code = REFUSED


class DispositionError(ForgeError):
    """An entry of dispositions.toml that says nothing of a line, or that nothing can check."""

    exit_code = REFUSED


class InseparablePatchError(ForgeError):
    """A patch without which no tree can be made, so nothing shows that it is needed."""

    exit_code = RED


class SeriesOrderError(ForgeError):
    """The same patches applied in another way, or again, do not do what they must."""

    exit_code = RED
