"""Running the GPU suite, and kits for hosts without network."""

from vllm_forge.errors import ForgeError

REFUSED = 90
RED = 91
UNDECIDED = 92
FAULT = 93


class SuiteRedError(ForgeError, exit_code=RED):
    """A test of the GPU suite failed."""


class SuiteUndecidedError(ForgeError, exit_code=UNDECIDED):
    """The GPU suite did not run to its end, or a test has no verdict."""


class WrongGpuError(ForgeError, exit_code=FAULT):
    """No GPU, or not of the SKU that was asked for."""


class KitError(ForgeError, exit_code=REFUSED):
    """A kit for a GPU host cannot be made from what was given."""


class JitCacheError(ForgeError, exit_code=REFUSED):
    """Compiled kernels are of another stack."""
