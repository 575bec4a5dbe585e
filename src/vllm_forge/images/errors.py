"""Engines, layers, layouts and image checks."""

from vllm_forge.errors import ForgeError

REFUSED = 60
RED = 61
FAULT = 63


class EngineMissingError(ForgeError, exit_code=FAULT):
    """No container engine is installed."""


class EngineTooOldError(ForgeError, exit_code=FAULT):
    """The engine is older than the oldest version the Dockerfile is tested with."""


class EngineUnreachableError(ForgeError, exit_code=FAULT):
    """The docker daemon is not running, may not be used, or does not answer."""


class ProvisionError(ForgeError, exit_code=FAULT):
    """The build tools cannot be installed on this host."""


class BaseImageError(ForgeError, exit_code=REFUSED):
    """The base image is not usable, or not pinned by digest."""


class LayoutError(ForgeError, exit_code=REFUSED):
    """An OCI layout is incomplete, or a blob is not what its digest says."""


class ImageCheckError(ForgeError, exit_code=RED):
    """The image was built, but does not do what an image of this project must do."""


class SizeBudgetError(ForgeError, exit_code=RED):
    """The image is larger than matrix.toml allows."""


class EngineSetupError(ForgeError, exit_code=FAULT):
    """The engine is new enough, but not set up for what the build asks of it."""


class ForeignFileError(ForgeError, exit_code=REFUSED):
    """A folder that others can write holds more than plain files."""


class BuildRecordError(ForgeError, exit_code=REFUSED):
    """The record of a build cannot be read."""
