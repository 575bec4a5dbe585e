"""Series, patches, trees and installed copies of vLLM."""

from vllm_forge.errors import ForgeError

REFUSED = 40
RED = 41


class DirtyTreeError(ForgeError, exit_code=REFUSED):
    """Files of the installed vLLM are not the published ones."""


class InstalledStateError(ForgeError, exit_code=REFUSED):
    """The installed vLLM is another release, patched already or in part, or as published."""


class NoEnvironmentError(ForgeError, exit_code=REFUSED):
    """No virtual environment to install into."""


class CorruptPatchError(ForgeError, exit_code=REFUSED):
    """A patch whose hunks do not parse."""


class WrongContextError(ForgeError, exit_code=RED):
    """A hunk's context is not in the tree; GNU patch might have taken it with fuzz."""


class OffsetError(ForgeError, exit_code=RED):
    """A hunk applies, but not at the line that it names."""


class EmptyPatchError(ForgeError, exit_code=REFUSED):
    """A patch file without a hunk."""


class AlreadyUpstreamError(ForgeError, exit_code=RED):
    """The pristine release has this change: drop the patch."""


class AppliedTwiceError(ForgeError, exit_code=RED):
    """The series has already made this change."""


class SeriesFileError(ForgeError, exit_code=REFUSED):
    """The series lists a patch that is not there, or does not list one that is."""


class WrongBaseError(ForgeError, exit_code=REFUSED):
    """The tree to patch is not the one that the lock names."""


class NonCanonicalPatchError(ForgeError, exit_code=REFUSED):
    """A patch is not in the form that the exporter writes."""


class PatchHeaderError(ForgeError, exit_code=REFUSED):
    """A patch's DEP-3 header lacks a field, or has an unknown one."""


class LineEndingError(ForgeError, exit_code=REFUSED):
    """A patch has CRLF line endings."""


class TreeMismatchError(ForgeError, exit_code=RED):
    """The series applies, but the resulting tree is not the locked one."""


class WheelSourceError(ForgeError, exit_code=REFUSED):
    """The wheel's files are not those of the source tree that the patches are for."""


class DispositionError(ForgeError, exit_code=REFUSED):
    """An entry of dispositions.toml that says nothing of a line, or that nothing can check."""


class InseparablePatchError(ForgeError, exit_code=RED):
    """A patch without which no tree can be made, so nothing shows that it is needed."""


class SeriesOrderError(ForgeError, exit_code=RED):
    """The same patches applied in another way, or again, do not do what they must."""
