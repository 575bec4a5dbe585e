"""Kernel selection and kernel coverage."""

from __future__ import annotations

from vllm_forge.errors import ForgeError

REFUSED = 50
RED = 51
UNDECIDED = 52


class UnknownFatbinError(ForgeError):
    """Device code in a layout that the census does not know, so it cannot say what it is."""

    exit_code = UNDECIDED


class UnknownTargetError(ForgeError):
    """A target, e.g. ``sm_199x``, that is not one of CUDA's names."""

    exit_code = REFUSED


class UnknownFamilyError(ForgeError):
    """A backend or a kernel family that the census has no row for."""

    exit_code = UNDECIDED


class ContractError(ForgeError):
    """A cell needs kernels that its image does not have."""

    exit_code = RED


class StaleExceptionError(ForgeError):
    """An exception of the contract that is not needed any more."""

    exit_code = RED


class SelectionChangedError(ForgeError):
    """A line's vLLM answers otherwise than the committed row says."""

    exit_code = RED


class SelectionStaleError(ForgeError):
    """The committed answers are of other inputs: lock, series, artifacts, presets or questions."""

    exit_code = UNDECIDED


class SelectionFileError(ForgeError):
    """The committed answers of a line are missing or malformed."""

    exit_code = REFUSED


class OracleFailedError(ForgeError):
    """Asking a line's vLLM gave no answers, or a question failed in our own code."""

    exit_code = UNDECIDED


class ArtifactConfigError(ForgeError):
    """The config.json of an artifact is not known, or its file is malformed."""

    exit_code = REFUSED
