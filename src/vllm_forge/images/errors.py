"""Engines, layers, layouts and image checks."""

from __future__ import annotations

from vllm_forge.errors import ForgeError

REFUSED = 60
RED = 61
FAULT = 63


class EngineMissingError(ForgeError):
    """No container engine is installed."""

    exit_code = FAULT


class EngineTooOldError(ForgeError):
    """The engine is older than the oldest version the Dockerfile is tested with."""

    exit_code = FAULT


class EngineUnreachableError(ForgeError):
    """The docker daemon is not running, may not be used, or does not answer."""

    exit_code = FAULT


class ProvisionError(ForgeError):
    """The build tools cannot be installed on this host."""

    exit_code = FAULT


class BaseImageError(ForgeError):
    """The base image is not usable, or not pinned by digest."""

    exit_code = REFUSED


class LayoutError(ForgeError):
    """An OCI layout is incomplete, or a blob is not what its digest says."""

    exit_code = REFUSED


class ImageCheckError(ForgeError):
    """The image was built, but does not do what an image of this project must do."""

    exit_code = RED


class SizeBudgetError(ForgeError):
    """The image is larger than matrix.toml allows."""

    exit_code = RED


class EngineSetupError(ForgeError):
    """The engine is new enough, but not set up for what the build asks of it."""

    exit_code = FAULT


class BuildRecordError(ForgeError):
    """The record of a build cannot be read."""

    exit_code = REFUSED
