"""Generated pages."""

from vllm_forge.errors import ForgeError

REFUSED, RED = 100, 101


class StalePageError(ForgeError, exit_code=RED):
    """A generated page differs from what the records give."""


class FaultsFileError(ForgeError, exit_code=REFUSED):
    """The table of known faults is missing or invalid."""
