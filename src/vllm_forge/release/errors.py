"""Releases, the statements about them, and the registries that hold both."""

from vllm_forge.errors import ForgeError

REFUSED = 110
RED = 111
UNDECIDED = 112
FAULT = 113


class GateRefusedError(ForgeError, exit_code=RED):
    """An image lacks what its stage requires."""


class WaiverError(ForgeError, exit_code=REFUSED):
    """A waiver is incomplete, has expired, or is for a tier that needs none."""


class UnknownStageError(ForgeError, exit_code=REFUSED):
    """matrix.toml has no policy for a stage."""
