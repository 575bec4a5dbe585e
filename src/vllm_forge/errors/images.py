"""Engines and images. Exit codes 60-69."""

from __future__ import annotations

from vllm_forge.errors.base import ForgeError


class EngineMissingError(ForgeError):
    """No container engine is installed."""

    exit_code = 60


class EngineTooOldError(ForgeError):
    """The engine is older than the oldest version the Dockerfile is tested with."""

    exit_code = 61


class ProvisionError(ForgeError):
    """The build tools cannot be installed on this host."""

    exit_code = 62


class BaseImageError(ForgeError):
    """The base image is not usable, or not pinned by digest."""

    exit_code = 63


class LayoutError(ForgeError):
    """An OCI layout is incomplete, or a blob is not what its digest says."""

    exit_code = 64


class ImageCheckError(ForgeError):
    """The image was built, but does not do what an image of this project must do."""

    exit_code = 65


class SizeBudgetError(ForgeError):
    """The image is larger than matrix.toml allows."""

    exit_code = 66


class EngineSetupError(ForgeError):
    """The engine is new enough, but not set up for what the build asks of it."""

    exit_code = 67
