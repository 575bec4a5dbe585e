"""Device code: what an image holds and what a cell needs. Exit codes 85-89."""

from __future__ import annotations

from vllm_forge.errors.base import ForgeError


class UnknownFatbinError(ForgeError):
    """Device code in a layout that the census does not know, so it cannot say what it is."""

    exit_code = 85


class UnknownTargetError(ForgeError):
    """A target, e.g. ``sm_199x``, that is not one of CUDA's names."""

    exit_code = 86


class UnknownFamilyError(ForgeError):
    """A backend or a kernel family that the census has no row for."""

    exit_code = 87


class ContractError(ForgeError):
    """A cell needs kernels that its image does not have."""

    exit_code = 88


class StaleExceptionError(ForgeError):
    """An exception of the contract that is not needed any more."""

    exit_code = 89
