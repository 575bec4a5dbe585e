"""Running the GPU suite, and kits for hosts without network."""

from __future__ import annotations

from vllm_forge.errors import ForgeError

REFUSED = 90
RED = 91
UNDECIDED = 92
FAULT = 93


class SuiteRedError(ForgeError):
    """A test of the GPU suite failed."""

    exit_code = RED


class SuiteUndecidedError(ForgeError):
    """The GPU suite did not run to its end, or a test has no verdict."""

    exit_code = UNDECIDED


class WrongGpuError(ForgeError):
    """No GPU, or not of the SKU that was asked for."""

    exit_code = FAULT


class KitError(ForgeError):
    """A kit for a GPU host cannot be made from what was given."""

    exit_code = REFUSED


class JitCacheError(ForgeError):
    """Compiled kernels are of another stack."""

    exit_code = REFUSED
