"""Models, recipes, quantized output and checkpoints."""

from vllm_forge.errors import ForgeError

REFUSED = 70
RED = 71
UNDECIDED = 72
FAULT = 73


class ModelInputError(ForgeError, exit_code=REFUSED):
    """The model folder is not a complete, unquantized DeepSeek-V4."""


class RecipeError(ForgeError, exit_code=REFUSED):
    """No recipe of that name, or a recipe that contradicts itself or the model."""


class ToolEnvironmentError(ForgeError, exit_code=FAULT):
    """The quantization tools cannot be installed, or are not what the lock says."""


class ResumeError(ForgeError, exit_code=REFUSED):
    """What lies in the output folder is of another run, so this one cannot go on from it."""


class QuantizedOutputError(ForgeError, exit_code=RED):
    """The tools ran, but what they made is not what the recipe says."""


class CheckpointRefusedError(ForgeError, exit_code=RED):
    """The checkpoint does not serve on the line that was asked for."""


class CheckpointDepartsError(ForgeError, exit_code=RED):
    """It serves, but it is not what its manifest, its source or its model's dtypes say."""


class CheckpointUnreadableError(ForgeError, exit_code=REFUSED):
    """Not a checkpoint of DeepSeek-V4, or a file of it is missing, cut off, malformed or absurd."""


class RehearsalError(ForgeError, exit_code=REFUSED):
    """A full-size fixture needs what is not recorded of its artifact, or its folder exists."""


class NotSparseError(ForgeError, exit_code=FAULT):
    """The file system keeps no holes, so a full-size fixture would take the artifact's size."""


class HubUnreachableError(ForgeError, exit_code=FAULT):
    """The model hub does not answer, or does not give this repository."""


class DryLoadError(ForgeError, exit_code=UNDECIDED):
    """A line's vLLM could not be asked, so nothing is known of what it would do."""
