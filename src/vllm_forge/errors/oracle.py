"""What a line's vLLM selects: asking it, and the committed answers. Exit codes 80-84."""

from __future__ import annotations

from vllm_forge.errors.base import ForgeError


class SelectionChangedError(ForgeError):
    """A line's vLLM answers otherwise than the committed row says."""

    exit_code = 80


class SelectionStaleError(ForgeError):
    """The committed answers are of other inputs: lock, series, artifacts, presets or questions."""

    exit_code = 81


class SelectionFileError(ForgeError):
    """The committed answers of a line are missing or malformed."""

    exit_code = 82


class OracleFailedError(ForgeError):
    """Asking a line's vLLM gave no answers, or a question failed in our own code."""

    exit_code = 83


class ArtifactConfigError(ForgeError):
    """The config.json of an artifact is not known, or its file is malformed."""

    exit_code = 84
