"""Releases, the statements about them, and the registries that hold both."""

from vllm_forge.errors import ForgeError

REFUSED = 110
RED = 111
UNDECIDED = 112
FAULT = 113


class GateRefusedError(ForgeError, exit_code=RED):
    """An image lacks what its stage requires."""


class RequirementError(ForgeError, exit_code=RED):
    """A requirement of a stage is not met."""


class WaiverError(ForgeError, exit_code=REFUSED):
    """A waiver is incomplete, has expired, or is for a tier that needs none."""


class UnknownStageError(ForgeError, exit_code=REFUSED):
    """matrix.toml has no policy for a stage."""


class ManifestMissingError(ForgeError, exit_code=REFUSED):
    """The registry has no manifest under that tag or digest."""


class BundleFileError(ForgeError, exit_code=REFUSED):
    """A file beside an image, named as a bundle, cannot be read."""


class MirrorError(ForgeError, exit_code=REFUSED):
    """An image cannot be copied from or to what was named."""


class RegistryContentError(ForgeError, exit_code=RED):
    """A registry's bytes are not what their digest, size or type says."""


class RegistryAuthError(ForgeError, exit_code=FAULT):
    """The registry refuses the stored login, or there is none."""


class RegistryUnreachableError(ForgeError, exit_code=FAULT):
    """The registry does not answer, or not as a registry must."""


class SbomError(ForgeError, exit_code=REFUSED):
    """The SBOM of an image cannot be made, or read."""


class ProvenanceError(ForgeError, exit_code=REFUSED):
    """A build cannot be attested: what it was built from, or who built it, is not known."""


class VexError(ForgeError, exit_code=REFUSED):
    """records/vex.toml is invalid, or names what an image does not have."""


class OsvError(ForgeError, exit_code=REFUSED):
    """A file is not an export of OSV."""


class TagTakenError(ForgeError, exit_code=RED):
    """A tag that never moves names another image."""


class StatementMissingError(ForgeError, exit_code=RED):
    """A statement that a stage requires is not attached to an image."""


class StatementSubjectError(ForgeError, exit_code=RED):
    """A statement is about another image."""


class StatementKindError(ForgeError, exit_code=RED):
    """A statement is of another type than the place says where it was found."""


class StatementDuplicateError(ForgeError, exit_code=RED):
    """Statements of which there must be one differ."""


class StatementContentError(ForgeError, exit_code=RED):
    """A signed statement has unknown fields, or values that no image of this project has."""


class StatementExpiredError(ForgeError, exit_code=UNDECIDED):
    """A receipt, a waiver or a build is too old, or in the future."""


class DecisionError(ForgeError, exit_code=RED):
    """The gate's decision is for another stage or tag, or on other statements."""


class ImageContentError(ForgeError, exit_code=RED):
    """An image is not what its labels or its statements say."""


class RebuildDiffersError(ForgeError, exit_code=RED):
    """A build of the commit gave another image."""


class CommitMissingError(ForgeError, exit_code=REFUSED):
    """The checkout does not have the commit that is to be built."""
