"""Presets and the host that serves them."""

from __future__ import annotations

from vllm_forge.errors import ForgeError

REFUSED = 80
RED = 81
FAULT = 83


class UnknownPresetError(ForgeError):
    """No preset of that name has a row for the SKU."""

    exit_code = REFUSED


class UnknownArtifactError(ForgeError):
    """No such artifact, or the preset does not serve it."""

    exit_code = REFUSED


class PresetLintError(ForgeError):
    """A preset asks a line's vLLM for something that it refuses, ignores or does badly."""

    exit_code = RED


class HostUnfitError(ForgeError):
    """This host cannot serve the preset; the red lines of the report say why."""

    exit_code = RED


class NoGpuError(ForgeError):
    """A server was asked for where there is no GPU, or no engine that gives it to a container."""

    exit_code = FAULT
