"""Running the GPU suite, and kits for hosts without network."""

from __future__ import annotations

from vllm_forge.errors import ForgeError

REFUSED = 90
FAULT = 93


class WrongGpuError(ForgeError):
    """There is no GPU, or it is not of the SKU that was asked for."""

    exit_code = FAULT


class KitError(ForgeError):
    """A kit for a GPU host cannot be made from what was given."""

    exit_code = REFUSED


class JitCacheError(ForgeError):
    """Kernels that were compiled before are not for this stack."""

    exit_code = REFUSED
