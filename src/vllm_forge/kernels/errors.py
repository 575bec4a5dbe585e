"""Kernel selection and kernel coverage."""

from __future__ import annotations

from vllm_forge.errors import ForgeError

REFUSED = 50
RED = 51
UNDECIDED = 52


class UnknownFatbinError(ForgeError):
    """Device code in an unknown layout, so that its targets are not known."""

    exit_code = UNDECIDED


class UnknownTargetError(ForgeError):
    """An invalid CUDA target, e.g. ``sm_199x``."""

    exit_code = REFUSED


class UnknownFamilyError(ForgeError):
    """A backend or a kernel family without a row in families.toml."""

    exit_code = UNDECIDED


class ContractError(ForgeError):
    """A cell needs kernels that its image does not have."""

    exit_code = RED


class StaleExceptionError(ForgeError):
    """An [[exception]] row that is not needed any more."""

    exit_code = RED


class SelectionChangedError(ForgeError):
    """A line's kernel selection changed since it was recorded."""

    exit_code = RED


class SelectionStaleError(ForgeError):
    """The recorded answers belong to another lock, series, artifact, preset or question."""

    exit_code = UNDECIDED


class SelectionFileError(ForgeError):
    """The recorded answers of a line are missing or malformed."""

    exit_code = REFUSED


class SelectionFailedError(ForgeError):
    """Asking a line's vLLM gave no answers, or a question failed in this project's code."""

    exit_code = UNDECIDED


class ArtifactConfigError(ForgeError):
    """An artifact's config.json is missing or malformed."""

    exit_code = REFUSED
