"""Kernel selection and kernel coverage."""

from vllm_forge.errors import ForgeError

REFUSED = 50
RED = 51
UNDECIDED = 52


class UnknownFatbinError(ForgeError, exit_code=UNDECIDED):
    """Device code in an unknown layout, so that its targets are not known."""


class UnknownTargetError(ForgeError, exit_code=REFUSED):
    """An invalid CUDA target, e.g. ``sm_199x``."""


class UnknownFamilyError(ForgeError, exit_code=UNDECIDED):
    """A backend or a kernel family without a row in families.toml."""


class ContractError(ForgeError, exit_code=RED):
    """A cell needs kernels that its image does not have."""


class StaleExceptionError(ForgeError, exit_code=RED):
    """An [[exception]] row that is not needed any more."""


class SelectionChangedError(ForgeError, exit_code=RED):
    """A line's kernel selection changed since it was recorded."""


class SelectionStaleError(ForgeError, exit_code=UNDECIDED):
    """The recorded answers belong to another lock, series, artifact, preset or question."""


class SelectionFileError(ForgeError, exit_code=REFUSED):
    """The recorded answers of a line are missing or malformed."""


class SelectionFailedError(ForgeError, exit_code=UNDECIDED):
    """Asking a line's vLLM gave no answers, or a question failed in this project's code."""


class ArtifactConfigError(ForgeError, exit_code=REFUSED):
    """An artifact's config.json is missing or malformed."""
