"""Models, recipes, quantized output and checkpoints."""

from __future__ import annotations

from vllm_forge.errors import ForgeError

REFUSED = 70
RED = 71
UNDECIDED = 72
FAULT = 73


class ModelInputError(ForgeError):
    """The model folder is not a complete, unquantized DeepSeek-V4."""

    exit_code = REFUSED


class RecipeError(ForgeError):
    """No recipe of that name, or a recipe that contradicts itself or the model."""

    exit_code = REFUSED


class ToolEnvironmentError(ForgeError):
    """The quantization tools cannot be installed, or are not what the lock says."""

    exit_code = FAULT


class ResumeError(ForgeError):
    """What lies in the output folder is of another run, so this one cannot go on from it."""

    exit_code = REFUSED


class QuantizedOutputError(ForgeError):
    """The tools ran, but what they made is not what the recipe says."""

    exit_code = RED


class CheckpointRefusedError(ForgeError):
    """The checkpoint does not serve on the line that was asked for."""

    exit_code = RED


class CheckpointDepartsError(ForgeError):
    """It serves, but it is not what its manifest, its source or its model's dtypes say."""

    exit_code = RED


class CheckpointUnreadableError(ForgeError):
    """Not a checkpoint of DeepSeek-V4, or a file of it is missing, cut off, malformed or absurd."""

    exit_code = REFUSED


class HubUnreachableError(ForgeError):
    """The model hub does not answer, or does not give this repository."""

    exit_code = FAULT


class DryLoadError(ForgeError):
    """A line's vLLM could not be asked, so nothing is known of what it would do."""

    exit_code = UNDECIDED
