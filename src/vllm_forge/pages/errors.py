"""Generated pages."""

from vllm_forge.errors import ForgeError

RED = 101


class StalePageError(ForgeError, exit_code=RED):
    """A generated page differs from what the records give."""
