"""Checkpoints: the quantization recipe and what it works on. Exit codes 100-109."""

from __future__ import annotations

from vllm_forge.errors.base import ForgeError


class ModelInputError(ForgeError):
    """The model folder is not a complete, unquantized DeepSeek-V4."""

    exit_code = 100


class RecipeError(ForgeError):
    """No recipe of that name, or a recipe that contradicts itself or the model."""

    exit_code = 101


class ToolEnvironmentError(ForgeError):
    """The quantization tools cannot be installed, or are not what the lock says."""

    exit_code = 102


class ResumeError(ForgeError):
    """What lies in the output folder is of another run, so this one cannot go on from it."""

    exit_code = 103


class QuantizedOutputError(ForgeError):
    """The tools ran, but what they made is not what the recipe says."""

    exit_code = 104


class CheckpointRefusedError(ForgeError):
    """The checkpoint does not serve on the line that was asked for."""

    exit_code = 105


class CheckpointDepartsError(ForgeError):
    """It serves, but it is not what its manifest, its source or its model's dtypes say."""

    exit_code = 106


class CheckpointUnreadableError(ForgeError):
    """Not a checkpoint of DeepSeek-V4, or a file of it is missing, cut off, malformed or absurd."""

    exit_code = 107


class HubUnreachableError(ForgeError):
    """The model hub does not answer, or does not give this repository."""

    exit_code = 108


class DryLoadError(ForgeError):
    """A line's vLLM could not be asked, so nothing is known of what it would do."""

    exit_code = 109
