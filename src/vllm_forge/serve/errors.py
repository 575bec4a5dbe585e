"""Presets and the host that serves them."""

from vllm_forge.errors import ForgeError

REFUSED = 80
RED = 81
UNDECIDED = 82
FAULT = 83


class UnknownPresetError(ForgeError, exit_code=REFUSED):
    """No preset of that name has a row for the SKU."""


class UnknownArtifactError(ForgeError, exit_code=REFUSED):
    """No such artifact, or the preset does not serve it."""


class PresetLintError(ForgeError, exit_code=RED):
    """A preset asks a line's vLLM for something that it refuses, ignores or does badly."""


class HostUnfitError(ForgeError, exit_code=RED):
    """This host cannot serve the preset; the red lines of the report say why."""


class NoGpuError(ForgeError, exit_code=FAULT):
    """A server was asked for where there is no GPU, or no engine that gives it to a container."""


class NotJudgedError(ForgeError, exit_code=UNDECIDED):
    """No record covers the flags, and the image's vLLM cannot be asked about them."""


class ModelFolderError(ForgeError, exit_code=RED):
    """A local folder does not hold the artifact that it is to be served as, or not readably."""
